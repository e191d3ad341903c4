"""taskiq on JetStream (taskiq-nats): a pull consumer on a work queue stream."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.contenders.contender import WAIT_SECONDS, App, Contender, Tasks, padding
from benchmarks.servers import NatsServer, Server

BATCH = 100


class TaskiqNats(Contender):
    name = "taskiq-nats"
    title = "taskiq-nats"
    durability = "JetStream file storage, sync_interval always"
    note = f"fetches {BATCH} messages at a time to drain, 1 (its default) elsewhere; results asked for every 10 ms"
    environment = "taskiq"
    packages = ("taskiq-nats",)
    distributions = ("taskiq", "taskiq-nats", "nats-py")
    left_out: ClassVar[dict[str, str]] = {
        "delayed": "its broker has no delays; a separate scheduler process holds them",
    }

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return [NatsServer(store / "nats")]

    def server_versions(self) -> dict[str, str]:
        return {NatsServer.name: NatsServer.version()}

    def unavailable(self) -> str | None:
        return NatsServer.missing()

    def workers(self, python: str, processes: int, threads: int) -> list[list[str]]:
        limits = ["--workers", str(processes), "--max-threadpool-threads", str(threads)]
        command = [python, "-m", "taskiq", "worker", "benchmarks.worker:broker", *limits]
        return [[*command, "--max-async-tasks", str(threads), "--log-level", "WARNING"]]

    def app(self) -> App:
        return TaskiqApp()


class TaskiqApp(App):
    def __init__(self) -> None:
        from nats.js.api import RetentionPolicy, StreamConfig
        from taskiq_nats import NATSObjectStoreResultBackend, PullBasedJetStreamBroker

        tasks = Tasks()
        self.padding = padding()
        url = os.environ[NatsServer.variable]
        stream = StreamConfig(name="bench", subjects=["bench"], retention=RetentionPolicy.WORK_QUEUE)
        # With its default, one message a fetch, a drain is bound by round trips; with more, a message waits for
        # the fetch to fill up. So each measurement gets what serves it best.
        many = os.environ.get("BENCH_MEASUREMENT") in ("drain", "growth", "actor")
        self.broker = PullBasedJetStreamBroker(
            servers=url,
            subject="bench",
            stream_name="bench",
            stream_config=stream,
            pull_consume_batch=BATCH if many else 1,
            pull_consume_timeout=0.2 if many else None,
        )
        if os.environ.get("BENCH_MEASUREMENT") == "roundtrip":
            self.broker = self.broker.with_result_backend(NATSObjectStoreResultBackend(servers=url))
        self.noop = self.broker.register_task(
            lambda index, padding="": tasks.noop(index, padding), task_name="noop"
        )
        self.hold = self.broker.register_task(lambda index: tasks.hold(index), task_name="hold")
        self.answer = self.broker.register_task(lambda index: tasks.answer(index), task_name="answer")

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._run(self.broker.startup())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def enqueue(self, index: int = -1) -> None:
        self._run(self.noop.kiq(index, *self.padding))

    def enqueue_each(self, messages: int, threads: int) -> None:
        async def part(count: int) -> None:
            for _ in range(count):
                await self.noop.kiq(-1)

        async def all_parts() -> None:
            await asyncio.gather(*(part(messages // threads) for _ in range(threads)))

        self._run(all_parts())

    def pump(
        self, take: Callable[[], tuple[int, float] | None], threads: int, *, retry: bool = False
    ) -> None:
        async def part() -> None:
            while (work := take()) is not None:
                index, due = work
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self.noop.kiq(index, *self.padding)

        async def all_parts() -> None:
            await asyncio.gather(*(part() for _ in range(threads)))

        self._run(all_parts())

    def enqueue_batch(self, indices: Sequence[int]) -> None:
        async def batch() -> None:
            for start in range(0, len(indices), BATCH):
                await asyncio.gather(
                    *(self.noop.kiq(index, *self.padding) for index in indices[start : start + BATCH])
                )

        self._run(batch())

    def enqueue_hold(self, index: int) -> None:
        self._run(self.hold.kiq(index))

    def ask(self, index: int) -> int:
        async def ask() -> int:
            task = await self.answer.kiq(index)
            result = await task.wait_result(check_interval=0.01, timeout=WAIT_SECONDS)
            value: int = result.return_value
            return value

        answer: int = self._run(ask())
        return answer

    def close(self) -> None:
        self._run(self.broker.shutdown())
        self.loop.close()
