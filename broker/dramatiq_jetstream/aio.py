"""For programs on asyncio, such as FastAPI's: send and wait for results without blocking the event loop.

    @app.post("/orders")
    async def order(...):
        message = await charge.asend(order_id)
        return await get_result(message, timeout=5_000)

Every actor of a `JetStreamBroker` has `asend` and `asend_with_options`. A call that has to wait for the server runs in
one of `THREADS` threads that all loops of the process share; the loop goes on. Any number of coroutines may wait for
results, which takes no thread. Type checkers know the methods of an actor that is declared with
`@dramatiq.actor(actor_class=AsyncActor)`.

A coroutine that is cancelled while it sends does not learn whether the message is stored, as a process that dies does
not. A call for which no thread comes free in time is not made: `NotSent`.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import dramatiq
from dramatiq.actor import Actor
from dramatiq.broker import Broker
from dramatiq.message import Message
from dramatiq.results import Results
from dramatiq.results.backend import DEFAULT_TIMEOUT

from .errors import InvalidOption, NotSent

__all__ = ["THREADS", "AsyncActor", "get_result"]

#: How many calls of a process may wait for the server at once.
THREADS: Final = 32

#: How long a call waits for a thread, in seconds, where nothing says otherwise.
PATIENCE_SECONDS: Final = 10.0

P = ParamSpec("P")
R = TypeVar("R")

_pool: tuple[int, ThreadPoolExecutor] | None = None


def _threads() -> ThreadPoolExecutor:
    """The threads of this process; a fork has none of its parent's."""
    global _pool
    if _pool is None or _pool[0] != os.getpid():
        _pool = os.getpid(), ThreadPoolExecutor(THREADS, thread_name_prefix="dramatiq-jetstream-aio")
    return _pool[1]


async def in_thread(call: Callable[[], R], *, patience: float = PATIENCE_SECONDS) -> R:
    """Run a blocking call in a thread, in the caller's context, and await what it returns.

    Parameters:
      patience: How many seconds to wait for a free thread.

    Raises:
      NotSent: When none came free; the call was not made.
    """
    job = _threads().submit(contextvars.copy_context().run, call)
    ended = asyncio.wrap_future(job)
    try:
        done, _ = await asyncio.wait([ended], timeout=patience)
        if not done and job.cancel():
            raise NotSent(
                f"Nothing was sent: {THREADS} calls of this process have waited for the server for {patience:.0f} s."
            )
        return await ended
    except asyncio.CancelledError:
        ended.cancel()  # also the job, unless it has begun
        raise


class AsyncActor(Actor[P, R]):
    """An actor that coroutines can send to. An actor of Dramatiq's own class becomes one on a `JetStreamBroker`.

    Examples:
      >>> from dramatiq_jetstream.aio import AsyncActor
      >>> @dramatiq.actor(actor_class=AsyncActor)
      ... def bill(customer: str) -> None: ...
      >>> async def order() -> None:
      ...     await bill.asend("c-42")
      ...     await bill.asend_with_options(args=("c-43",), delay=60_000)
      >>> asyncio.run(order())
    """

    async def asend(self, *args: P.args, **kwargs: P.kwargs) -> Message[R]:
        """Send a message as `send` does, without blocking the event loop.

        Raises:
          As `send`.
        """
        return await self.asend_with_options(args=args, kwargs=kwargs)

    async def asend_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        delay: timedelta | int | None = None,
        **options: Any,
    ) -> Message[R]:
        """Send a message as `send_with_options` does, without blocking the event loop.

        Parameters:
          delay: Milliseconds until it runs, or a timedelta; None for at once.

        Raises:
          As `send_with_options`.
        """
        send = partial(self.send_with_options, args=args, kwargs=kwargs, delay=delay, **options)
        return await in_thread(send, patience=_patience(self.broker))


def with_asend(actor: Actor[Any, Any]) -> None:
    """Give an actor of Dramatiq's own class the methods of `AsyncActor`, which has no state of its own."""
    if type(actor) is Actor:
        actor.__class__ = AsyncActor


def _patience(broker: Broker) -> float:
    config = getattr(broker, "config", None)
    return PATIENCE_SECONDS if config is None else float(config.enqueue_timeout / 1000)


async def get_result(
    message: Message[R],
    *,
    timeout: int | None = None,  # noqa: ASYNC109 - as Dramatiq's
    broker: Broker | None = None,
) -> R:
    """Wait for the result of a message without blocking the event loop.

    Parameters:
      timeout: Milliseconds to wait at most; 10 seconds by default.
      broker: None takes Dramatiq's global broker.

    Raises:
      ResultTimeout: When there was none in time.
      ResultFailure: When the actor failed, or its result can never be stored.
      InvalidOption: When the broker has no `Results` middleware.

    Examples:
      >>> from dramatiq_jetstream import aio
      >>> async def order() -> int:
      ...     message = await charge.asend("c-42", 20)
      ...     return await aio.get_result(message, timeout=30_000)
      >>> asyncio.run(order())
      20
    """
    chosen = dramatiq.get_broker() if broker is None else broker
    backend: Any = next((one.backend for one in chosen.middleware if isinstance(one, Results)), None)
    if backend is None:
        raise InvalidOption(
            "There are no results: add Dramatiq's Results middleware with a backend to the broker."
        )
    if hasattr(backend, "aget_result"):
        found = await backend.aget_result(message, timeout=timeout)
    else:
        wait = DEFAULT_TIMEOUT if timeout is None else timeout
        found = await in_thread(partial(backend.get_result, message, block=True, timeout=wait))
    return found  # type: ignore[no-any-return]
