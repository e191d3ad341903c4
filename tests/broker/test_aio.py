"""Sending and waiting for results from coroutines, without blocking their event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import dramatiq
import pytest
from dramatiq.results import ResultFailure, Results, ResultTimeout

from dramatiq_jetstream import JetStreamBroker, aio
from dramatiq_jetstream.errors import BrokerConnectionError, InvalidOption, NotSent
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsServer, StubBroker, stub

#: How long a call waits for a server that stands still.
TIMEOUT_MS = 2_000


async def _longest_pause(work: Callable[[], Awaitable[object]]) -> float:
    """The longest time, in seconds, for which the event loop ran nothing else while `work` was done."""
    longest, last, task = 0.0, time.monotonic(), asyncio.ensure_future(work())
    while not task.done():
        await asyncio.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    await task
    return longest


def test_the_loop_goes_on_while_the_server_stands_still(own_nats_server: NatsServer) -> None:
    """Sending and waiting stop the loop for a fraction of the time for which a blocking send stops it."""
    broker = JetStreamBroker(own_nats_server.url, enqueue_timeout=TIMEOUT_MS)
    broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))

    @dramatiq.actor(broker=broker, actor_class=aio.AsyncActor)
    def work(number: int) -> int:
        return number

    message = work.send(1)

    async def blocking() -> None:
        with pytest.raises(BrokerConnectionError):
            work.send(2)

    async def awaiting() -> None:
        sent = await asyncio.gather(
            work.asend(3),
            broker.aenqueue(work.message(4), delay=60_000),
            aio.get_result(message, timeout=TIMEOUT_MS, broker=broker),
            return_exceptions=True,
        )
        assert [isinstance(error, BrokerConnectionError) for error in sent] == [True, True, False]
        assert isinstance(sent[2], ResultTimeout)

    own_nats_server.suspend()
    try:
        blocked = asyncio.run(_longest_pause(blocking))
        # A busy machine may stop any process for a while, so one of three has to do.
        pauses: list[float] = []
        while len(pauses) < 3 and min(pauses, default=blocked) > blocked / 4:
            pauses.append(asyncio.run(_longest_pause(awaiting)))
    finally:
        own_nats_server.resume()
        broker.close()
    assert blocked > TIMEOUT_MS / 1000 * 0.9
    assert min(pauses) < blocked / 4, pauses


def test_coroutines_send_and_wait_for_results(broker: JetStreamBroker) -> None:
    """More of them wait than there are threads, and what they wait for is still sent."""
    broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))

    @dramatiq.actor(max_retries=0)
    def half(number: int) -> float:
        if number % 2:
            raise ValueError(number)
        return number / 2

    async def ask(number: int) -> float:
        message = await half.asend(number)  # type: ignore[attr-defined]
        return await aio.get_result(message, timeout=60_000)

    async def all_of_them() -> None:
        waiting = [asyncio.ensure_future(ask(2 * number)) for number in range(2 * aio.THREADS)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        worker.start()
        assert await asyncio.gather(*waiting) == list(range(2 * aio.THREADS))
        with pytest.raises(ResultFailure, match="ValueError"):
            await ask(1)
        late = await half.asend_with_options(args=(2,), delay=3_600_000)  # type: ignore[attr-defined]
        with pytest.raises(ResultTimeout):
            await aio.get_result(late, timeout=0)
        assert broker.status(late).state == "delayed"

    worker = dramatiq.Worker(broker, worker_threads=4)
    try:
        asyncio.run(all_of_them())
    finally:
        worker.stop()


def test_a_call_that_gets_no_thread_is_not_made() -> None:
    """When all threads wait, a call gives up within its patience, and a cancelled one is never begun."""
    import threading

    release, made = threading.Event(), []

    async def crowd() -> None:
        holding = [asyncio.ensure_future(aio.in_thread(release.wait)) for _ in range(aio.THREADS)]
        await asyncio.sleep(0)
        with pytest.raises(NotSent):
            await aio.in_thread(lambda: made.append(1), patience=0.05)
        cancelled = asyncio.ensure_future(aio.in_thread(lambda: made.append(2)))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        release.set()
        await asyncio.gather(*holding)
        await aio.in_thread(lambda: made.append(3))

    try:
        asyncio.run(crowd())
    finally:
        release.set()
    assert made == [3]


def test_coroutines_are_tested_on_a_stub(broker: JetStreamBroker) -> None:
    """`asend`, `aenqueue` and results work in memory; without Results one sentence says so."""

    @dramatiq.actor
    def double(number: int) -> int:
        return 2 * number

    async def program(standing_in: StubBroker) -> None:
        message = await double.asend(2)  # type: ignore[attr-defined]
        await standing_in.aenqueue(double.message(3))
        standing_in.run()
        assert await aio.get_result(message) == 4

    with stub() as standing_in, pytest.raises(InvalidOption, match="Results middleware"):
        asyncio.run(program(standing_in))
    broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))
    with stub() as standing_in:
        asyncio.run(program(standing_in))
