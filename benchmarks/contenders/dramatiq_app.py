"""What all Dramatiq contenders share: the actors, and how they are enqueued. Only the broker differs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.contenders.contender import THREADS, WAIT_SECONDS, App, Contender, Tasks, delay_until, padding

if TYPE_CHECKING:
    from dramatiq import Broker
    from dramatiq.results import ResultBackend

QUEUE = "bench"
BATCH = 1_000


class DramatiqContender(Contender):
    """A Dramatiq contender; its subclasses make the broker."""

    distributions: tuple[str, ...] = ("dramatiq",)
    fill_threads = THREADS

    def make_broker(self) -> Broker:
        raise NotImplementedError

    def make_results(self, broker: Broker) -> ResultBackend:
        raise NotImplementedError

    def workers(self, python: str, processes: int, threads: int) -> list[list[str]]:
        scale = ["--processes", str(processes), "--threads", str(threads)]
        return [[python, "-m", "dramatiq", "benchmarks.worker:broker", *scale]]

    def app(self) -> App:
        return DramatiqApp(self)


class DramatiqApp(App):
    """Dramatiq with its default middleware, and Results only where results are measured."""

    def __init__(self, contender: DramatiqContender) -> None:
        import dramatiq
        from dramatiq.results import Results

        if os.environ.get("BENCH_TELEMETRY"):
            _instrument()
        tasks = self.tasks = Tasks()
        self.padding = padding()
        self.broker = contender.make_broker()
        results = os.environ.get("BENCH_MEASUREMENT") == "roundtrip"
        if results:
            self.broker.add_middleware(Results(backend=contender.make_results(self.broker)))
        dramatiq.set_broker(self.broker)

        shared: dict[str, Any] = {"queue_name": QUEUE, "broker": self.broker}
        keep = {"store_results": True} if results else {}
        self.noop: Any = dramatiq.actor(tasks.noop, actor_name="noop", **shared)
        self.hold = dramatiq.actor(tasks.hold, actor_name="hold", time_limit=3_600_000, **shared)
        self.answer = dramatiq.actor(tasks.answer, actor_name="answer", **shared, **keep)

    def enqueue(self, index: int = -1) -> None:
        self.noop.send(index, *self.padding)

    def enqueue_batch(self, indices: Sequence[int]) -> None:
        from dramatiq import group

        for start in range(0, len(indices), BATCH):
            group([self.noop.message(index, *self.padding) for index in indices[start : start + BATCH]]).run()

    def enqueue_delayed(self, indices: Sequence[int], due_ns: int) -> None:
        for index in indices:
            self.noop.send_with_options(args=(index,), delay=delay_until(due_ns))

    def enqueue_hold(self, index: int) -> None:
        self.hold.send(index)

    def ask(self, index: int) -> int:
        answer: int = self.answer.send(index).get_result(block=True, timeout=int(WAIT_SECONDS * 1000))
        return answer

    def close(self) -> None:
        self.broker.close()


def _instrument() -> None:
    """Instrument this process as the OTEL_* variables say, in the way of the order service."""
    from opentelemetry import metrics
    from opentelemetry.distro import OpenTelemetryConfigurator
    from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor

    OpenTelemetryConfigurator().configure()
    exported = "OTEL_METRICS_EXPORTER" in os.environ
    meters = metrics.get_meter_provider() if exported else metrics.NoOpMeterProvider()
    DramatiqInstrumentor().instrument(meter_provider=meters)
