"""The bound of Dramatiq itself: its StubBroker, in memory, one process with the worker's threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from benchmarks.contenders.contender import THREADS, App
from benchmarks.contenders.dramatiq_app import DramatiqApp, DramatiqContender

if TYPE_CHECKING:
    from dramatiq import Broker
    from dramatiq.results import ResultBackend


class Stub(DramatiqContender):
    name = "stub"
    title = "bound: Dramatiq StubBroker"
    durability = "none: in memory, one process"
    in_process = True
    bound = True
    left_out: ClassVar[dict[str, str]] = {
        "roundtrip": "its result backend polls with a backoff",
        "growth": "nothing is stored",
        "sustained": "nothing is stored",
        "payload": "nothing is stored",
        "actor": "its workers are threads of the program that sends",
        "delayed": "the delay queue is a sorted list in memory",
        "recovery": "nothing survives its process",
    }

    def make_broker(self) -> Broker:
        from dramatiq.brokers.stub import StubBroker

        return StubBroker()

    def make_results(self, broker: Broker) -> ResultBackend:
        from dramatiq.results.backends import StubBackend

        return StubBackend()

    def app(self) -> App:
        return StubApp(self)


class StubApp(DramatiqApp):
    def start_worker(self) -> None:
        from dramatiq import Worker

        self.worker = Worker(self.broker, worker_threads=THREADS, worker_timeout=100)
        self.worker.start()

    def close(self) -> None:
        if hasattr(self, "worker"):
            self.worker.stop(timeout=5_000)
        super().close()
