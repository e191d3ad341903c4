"""The broker that a backend (results, rate limits, aborts) works with: the program's, or one of the backend's own.

In tests, a backend of Dramatiq's that keeps everything in memory answers for it: always when its broker is Dramatiq's
`StubBroker`, and for a while when a stub stands in for its broker (see `testing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from dramatiq.broker import Broker

from .broker import JetStreamBroker
from .errors import InvalidOption

__all__ = ["InMemory", "answer_for", "broker_for", "in_memory"]


@runtime_checkable
class InMemory(Protocol):
    """A backend for which one in memory can answer.

    Examples:
      >>> from dramatiq_jetstream.backends import InMemory
      >>> from dramatiq_jetstream.results import JetStreamBackend
      >>> isinstance(JetStreamBackend(broker), InMemory)
      True
    """

    def stub(self) -> object:
        """A new backend of the same kind that keeps everything in memory."""


def answer_for(backend: object, stub: object) -> None:
    """Have `stub` answer every call of `backend`, for good.

    Examples:
      >>> from dramatiq.rate_limits.backends import StubBackend
      >>> from dramatiq_jetstream.backends import answer_for
      >>> from dramatiq_jetstream.rate_limits import JetStreamBackend
      >>> limits = JetStreamBackend(broker)
      >>> answer_for(limits, StubBackend())
      >>> limits.add("scanner", 1, ttl=60_000)
      True
    """
    names = [name for name in dir(type(stub)) if not name.startswith("__") and callable(getattr(stub, name))]
    vars(backend).update({name: getattr(stub, name) for name in names})


@contextmanager
def in_memory(backend: InMemory) -> Iterator[None]:
    """Have a backend in memory answer every call of `backend` for a while.

    Examples:
      >>> from dramatiq_jetstream.backends import in_memory
      >>> from dramatiq_jetstream.rate_limits import JetStreamBackend
      >>> limits = JetStreamBackend(broker)
      >>> with in_memory(limits):
      ...     limits.add("scanner", 1, ttl=60_000)
      True
    """
    before = vars(backend).copy()
    answer_for(backend, backend.stub())
    try:
        yield
    finally:
        vars(backend).clear()
        vars(backend).update(before)


def broker_for(broker: Broker | None, url: str | Iterable[str] | None) -> tuple[JetStreamBroker, bool]:
    """Return the broker that a backend works with, and whether it is the backend's own to close.

    Raises:
      InvalidOption: When both or the wrong kind of broker are given.

    Examples:
      >>> from dramatiq_jetstream.backends import broker_for
      >>> chosen, is_own = broker_for(None, "nats://localhost:4222")
      >>> is_own
      True
    """
    if broker is None:
        return JetStreamBroker(url, middleware=[]), True
    if url is not None:
        raise InvalidOption("Give a backend either a broker or a url: with a broker it uses the broker's.")
    if not isinstance(broker, JetStreamBroker):
        raise InvalidOption(
            f"{type(broker).__name__} cannot be used: give a JetStreamBroker, or a url to connect to."
        )
    return broker, False
