"""This repository's broker: dramatiq-jetstream, synced on every message (what it ships with) or every second."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import ablations
from benchmarks.contenders.contender import App, delay_until
from benchmarks.contenders.dramatiq_app import BATCH, QUEUE, DramatiqApp, DramatiqContender
from benchmarks.contenders.limited import Limited
from benchmarks.servers import NatsServer, Server

if TYPE_CHECKING:
    from dramatiq import Broker
    from dramatiq.results import ResultBackend


class Jetstream(DramatiqContender):
    distributions = ("dramatiq", "dramatiq-jetstream", "nats-py", "uvloop")
    fills_fast = True
    fill_threads = 1  # enqueue_many is the fastest way
    ours = True
    atomic_batches = True
    replicas = 1

    def __init__(self, sync: str) -> None:
        self.sync = sync
        self.name = "jetstream" if sync == "always" else f"jetstream-{sync}"
        self.title = "Dramatiq / JetStream" if sync == "always" else f"Dramatiq / JetStream ({sync})"
        self.durability = f"JetStream file storage, sync_interval {sync}"

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return [NatsServer(store / "nats", self.sync)]

    def server_versions(self) -> dict[str, str]:
        return {NatsServer.name: NatsServer.version()}

    def unavailable(self) -> str | None:
        return NatsServer.missing()

    def fleet(self, python: str, processes: int, threads: int) -> list[list[str]]:
        scale = ["--processes", str(processes), "--threads", str(threads)]
        return [[python, "-m", "dramatiq_jetstream.cli", "work", "benchmarks.worker:broker", *scale]]

    def wait_until_settled(self, urls: list[str], timeout: int) -> bool:
        from dramatiq_jetstream import JetStreamBroker

        broker = JetStreamBroker(urls, replicas=self.replicas)
        try:
            broker.declare_queue(QUEUE)
            broker.join(QUEUE, interval=20, timeout=timeout)
        finally:
            broker.close()
        return True

    def make_broker(self) -> Broker:
        from dramatiq_jetstream import JetStreamBroker

        if os.environ.get("BENCH_UNSEEN"):
            from dramatiq_jetstream.worker import presence

            presence.BATCH_SECONDS = 86_400.0
        history = os.environ.get("BENCH_HISTORY", "failures")
        settings = {"none": None, "all": "all", "failures": "failures"}
        setting = settings[history] if history in settings else float(history)
        return JetStreamBroker(os.environ[NatsServer.variable], history=setting, replicas=self.replicas)

    def make_results(self, broker: Broker) -> ResultBackend:
        from dramatiq_jetstream.results import JetStreamBackend

        return JetStreamBackend(broker)

    def app(self) -> App:
        ablations.apply()
        return JetstreamApp(self)


class JetstreamApp(DramatiqApp):
    def __init__(self, contender: DramatiqContender) -> None:
        super().__init__(contender)
        if "BENCH_LIMITS" in os.environ:
            self.noop = Limited(self.broker, self.tasks, QUEUE)

    def enqueue_batch(self, indices: Sequence[int], *, atomic: bool = False) -> None:
        for start in range(0, len(indices), BATCH):
            messages = [self.noop.message(index, *self.padding) for index in indices[start : start + BATCH]]
            self.broker.enqueue_many(messages, atomic=atomic)

    def enqueue_atomic_batch(self, indices: Sequence[int]) -> None:
        self.enqueue_batch(indices, atomic=True)

    def enqueue_delayed(self, indices: Sequence[int], due_ns: int) -> None:
        for start in range(0, len(indices), BATCH):
            messages = [self.noop.message(index, *self.padding) for index in indices[start : start + BATCH]]
            self.broker.enqueue_many(messages, delay=delay_until(due_ns))
