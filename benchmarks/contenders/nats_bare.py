"""The bound of the client: bare nats-py, awaited and pipelined publishes, fetch and ack."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.contenders.contender import App, Contender, Tasks
from benchmarks.servers import NatsServer, Server

if TYPE_CHECKING:
    from nats.js import JetStreamContext

STREAM = "bench"
FETCH = 200
IN_FLIGHT = 2_000


class NatsBare(Contender):
    name = "nats-py"
    title = "bound: bare nats-py"
    durability = "JetStream file storage, sync_interval always"
    note = "no task library: publish, publish_async, fetch(200) and ack in 2 processes without threads"
    distributions = ("nats-py",)
    bound = True
    left_out: ClassVar[dict[str, str]] = {
        "delayed": "no tasks",
        "roundtrip": "no tasks",
        "recovery": "no tasks",
        "sustained": "no tasks",
        "payload": "no tasks",
        "actor": "its workers have no threads",
    }

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return [NatsServer(store / "nats")]

    def server_versions(self) -> dict[str, str]:
        return {NatsServer.name: NatsServer.version()}

    def unavailable(self) -> str | None:
        return NatsServer.missing()

    def workers(self, python: str, processes: int, threads: int) -> list[list[str]]:
        run = "import asyncio; from benchmarks.contenders import nats_bare; asyncio.run(nats_bare.consume())"
        return [[python, "-c", run] for _ in range(processes)]

    def app(self) -> App:
        return BareApp()


class BareApp(App):
    broker = None

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._run(self._start())

    async def _start(self) -> None:
        import nats

        self.client = await nats.connect(os.environ[NatsServer.variable])
        self.js = self.client.jetstream(publish_async_max_pending=IN_FLIGHT)
        await declare(self.js)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @staticmethod
    def _body(index: int) -> bytes:
        return str(index).encode().ljust(256)

    def enqueue(self, index: int = -1) -> None:
        self._run(self.js.publish("bench", self._body(index)))

    def enqueue_each(self, messages: int, threads: int) -> None:
        async def part(count: int) -> None:
            for _ in range(count):
                await self.js.publish("bench", self._body(-1))

        async def all_parts() -> None:
            await asyncio.gather(*(part(messages // threads) for _ in range(threads)))

        self._run(all_parts())

    def enqueue_batch(self, indices: Sequence[int]) -> None:
        async def batch() -> None:
            for index in indices:
                await self.js.publish_async("bench", self._body(index), wait_stall=10)
            await asyncio.wait_for(self.js.publish_async_completed(), 60)

        self._run(batch())

    def close(self) -> None:
        self._run(self.client.close())
        self.loop.close()


async def declare(js: JetStreamContext) -> None:
    from nats.js.api import RetentionPolicy, StreamConfig

    await js.add_stream(StreamConfig(name=STREAM, subjects=["bench"], retention=RetentionPolicy.WORK_QUEUE))


async def consume() -> None:
    """One worker process: fetches, counts, acks, until it is stopped."""
    import nats
    from nats.errors import TimeoutError as FetchTimeout

    tasks = Tasks()
    client = await nats.connect(os.environ[NatsServer.variable])
    js = client.jetstream()
    await declare(js)
    subscription = await js.pull_subscribe("bench", durable="bench", stream=STREAM)
    while True:
        try:
            messages = await subscription.fetch(FETCH, timeout=5)
        except FetchTimeout:
            continue
        for message in messages:
            tasks.noop(int(message.data))
            await message.ack()
