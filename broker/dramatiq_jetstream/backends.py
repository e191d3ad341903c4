"""The broker that a backend (results, rate limits, aborts) works with: the program's, or one of the backend's own."""

from __future__ import annotations

from collections.abc import Iterable

from dramatiq.broker import Broker

from .broker import JetStreamBroker
from .errors import InvalidOption

__all__ = ["broker_for"]


def broker_for(broker: Broker | None, url: str | Iterable[str] | None) -> tuple[JetStreamBroker, bool]:
    """Return the broker that a backend works with, and whether it is the backend's own to close.

    Raises:
      InvalidOption: When both or the wrong kind of broker are given.
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
