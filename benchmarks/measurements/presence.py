"""What idle workers cost: how often each writes that it is there, and the CPU time of workers and server for it."""

from __future__ import annotations

import time

from benchmarks.contenders.contender import PROCESSES, Contender
from benchmarks.measurements.measurement import Figure, Measurement, Options
from benchmarks.processes import wait_until
from benchmarks.trial import Trial

WARM_UP_SECONDS = 45.0
WATCHED_SECONDS = 60.0


class Presence(Measurement):
    name = "presence"
    title = "Idle, 2 processes × 8 threads"
    quick = False
    figures = (
        Figure("writes_per_process", "presence of a process", "writes/s"),
        Figure("worker_cpu_ms", "worker CPU", "ms/s"),
        Figure("server_cpu_ms", "server CPU", "ms/s"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [""] if contender.ours and not contender.only else []

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        from dramatiq_jetstream import JetStreamBroker

        with Trial(contender, self.name) as trial:
            trial.start_workers()
            broker = JetStreamBroker([server.url for server in trial.servers], declare=False, middleware=[])
            try:
                return self._watch(trial, broker, WATCHED_SECONDS * min(1.0, options.scale))
            finally:
                broker.close()

    def _watch(self, trial: Trial, broker: object, seconds: float) -> dict[str, float]:
        from dramatiq_jetstream import JetStreamBroker
        from dramatiq_jetstream.workers import list_workers

        assert isinstance(broker, JetStreamBroker)
        wait_until(lambda: len(list_workers(broker)) == PROCESSES, WARM_UP_SECONDS, "the workers are seen")
        stream = broker.stream(f"KV_{broker.names.bucket('workers')}")
        began, before = time.monotonic(), stream.range().last
        worker_before, server_before = trial.worker_usage(), trial.server_usage()
        time.sleep(seconds)
        seconds = time.monotonic() - began
        result = {"writes_per_process": (stream.range().last - before) / PROCESSES / seconds}
        for name, now, then in (
            ("worker_cpu_ms", trial.worker_usage(), worker_before),
            ("server_cpu_ms", trial.server_usage(), server_before),
        ):
            cpu = now.cpu_since(then)
            if cpu is not None:
                result[name] = cpu / seconds * 1000
        return result
