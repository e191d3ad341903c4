"""Keeps every event of the stream as it was published, however soon it leaves for the archive or is erased.

A durable consumer of its own brings the events. Neither a run of the archive nor an erasure removes an event that a
consumer has not settled, so the tape has all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

import nats
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.client import JetStreamContext

from tests.chaos.books import Event, parse
from tests.chaos.reading import Stored

DURABLE = "chaos-tape"

_ACK_WAIT_SECONDS = 5.0


class Tape:
    """Runs until it is closed; what is recorded stays readable."""

    def __init__(self, nats_url: str) -> None:
        self._nats_url = nats_url
        self._stored: dict[int, Stored] = {}
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="tape", daemon=True)

    def __enter__(self) -> Tape:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the tape did not come to an end"

    def events(self, start: int = 0) -> list[Event]:
        """Return the events in the order in which they came, without the first `start`."""
        with self._lock:
            return self._events[start:]

    def stored(self) -> list[Stored]:
        """Return all messages by their places in the stream."""
        with self._lock:
            return [self._stored[place] for place in sorted(self._stored)]

    async def _run(self) -> None:
        async def ignore(_error: Exception) -> None:
            pass

        client = await nats.connect(
            self._nats_url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=ignore
        )
        try:
            while not self._stop.is_set():
                with contextlib.suppress(NatsError, TimeoutError, OSError):
                    await self._record(client.jetstream(timeout=5))
                await asyncio.sleep(0.2)
        finally:
            await client.close()

    async def _record(self, js: JetStreamContext) -> None:
        config = ConsumerConfig(
            durable_name=DURABLE,
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=_ACK_WAIT_SECONDS,
            max_ack_pending=20_000,
            filter_subject="ORDER.>",
        )
        await js.add_consumer("ORDERS", config)
        subscription = await js.pull_subscribe_bind(durable=DURABLE, stream="ORDERS")
        try:
            while not self._stop.is_set():
                with contextlib.suppress(NatsTimeout, asyncio.TimeoutError):
                    for message in await subscription.fetch(200, timeout=0.5):
                        meta = message.metadata
                        self._keep(
                            Stored(
                                meta.sequence.stream,
                                message.subject,
                                message.data,
                                message.headers or {},
                                meta.timestamp.timestamp(),
                            )
                        )
                        await message.ack()
        finally:
            await subscription.unsubscribe()

    def _keep(self, stored: Stored) -> None:
        with self._lock:
            if stored.sequence not in self._stored:
                self._stored[stored.sequence] = stored
                self._events += parse(stored)
