"""Sustained load: threads await each send while the workers run, for a minute; then latency at half and nine tenths.

The rate counts what has run while messages were sent, so a queue that grows helps no contender. The paced loads send at
fixed times, and latency counts from those times to the first line of the task. Memory and disk are the servers', before
the minute and when everything of it has run.
"""

from __future__ import annotations

import json

from benchmarks.contenders.contender import Contender
from benchmarks.measurements.measurement import CPU, DRIVER, MB, Figure, Measurement, Options
from benchmarks.pace import lateness
from benchmarks.processes import BenchmarkError
from benchmarks.statistics import percentile
from benchmarks.trial import Trial

SECONDS = 60.0
PACED_SECONDS = 20.0
SENDERS = 4
SHARES = {"half": 0.5, "most": 0.9}
#: The highest paced rate: the time of each message is kept in memory.
MOST_PER_SECOND = 20_000
PAYLOADS = {"1 kB": 1_000, "64 kB": 64_000}
#: How long each payload is sent, in seconds.
PAYLOAD_SECONDS = 20.0
COSTS = (DRIVER[0], *CPU[:2])


class Sustained(Measurement):
    name = "sustained"
    title = f"Send and run at once, {SENDERS} threads send, 2 processes × 8 threads run"
    figures = (
        Figure("per_second", "messages/s", plotted=True),
        Figure("half_p50_ms", "p50 at half of that", "ms"),
        Figure("half_p99_ms", "p99 at half", "ms", plotted=True),
        Figure("most_p50_ms", "p50 at nine tenths", "ms"),
        Figure("most_p99_ms", "p99 at nine tenths", "ms"),
        Figure("backlog", "waiting at the end", "messages"),
        Figure("memory_mb", "server memory grew", "MB"),
        Figure("disk_mb", "disk grew", "MB"),
        *COSTS,
    )

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        seconds = max(2.0, PACED_SECONDS * options.scale)
        with Trial(contender, self.name, samples=2 * int(seconds * MOST_PER_SECOND)) as trial:
            warm_up(trial)
            result = sustain(trial, max(3.0, SECONDS * options.scale))
            first = 0
            for name, share in SHARES.items():
                rate = min(share * result["per_second"], MOST_PER_SECOND)
                took = paced(trial, rate, seconds, first)
                first += len(took)
                result[f"{name}_p50_ms"] = percentile(took, 0.5)
                result[f"{name}_p99_ms"] = percentile(took, 0.99)
        return result


class Payload(Measurement):
    name = "payload"
    title = "Send and run at once, with larger messages"
    figures = (
        Figure("per_second", "messages/s", plotted=True),
        Figure("backlog", "waiting at the end", "messages"),
        Figure("memory_mb", "server memory grew", "MB"),
        Figure("disk_mb", "disk grew", "MB"),
        *COSTS,
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return list(PAYLOADS)

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        with Trial(contender, self.name) as trial:
            trial.variables["BENCH_PADDING"] = str(PAYLOADS[case])
            warm_up(trial)
            return sustain(trial, max(3.0, PAYLOAD_SECONDS * options.scale))


def warm_up(trial: Trial) -> None:
    """Starts the workers, and waits until they run."""
    trial.start_workers()
    trial.fill(1)
    trial.wait_for(1)


def sustain(trial: Trial, seconds: float) -> dict[str, float]:
    """Sends as fast as it goes for some seconds, then waits until everything has run."""
    server, worker, disk = trial.server_usage(), trial.worker_usage(), trial.stored_bytes()
    before = trial.tally.read().messages
    figures = trial.drive("sustain", seconds=seconds, threads=SENDERS)
    sent = int(figures["sent"])
    trial.wait_for(before + sent + 1)  # the first message of a driver only connects it
    result = {
        "per_second": figures["run"] / figures["seconds"],
        "backlog": max(0.0, sent - figures["run"]),
        "disk_mb": (trial.stored_bytes() - disk) / MB,
        "driver_cpu_us": figures["driver_cpu"] / sent * 1e6,
    }
    server_after = trial.server_usage()
    if server.rss_bytes is not None and server_after.rss_bytes is not None:
        result["memory_mb"] = (server_after.rss_bytes - server.rss_bytes) / MB
    for name, used in (
        ("server", server_after.cpu_since(server)),
        ("worker", trial.worker_usage().cpu_since(worker)),
    ):
        if used is not None:
            result[f"{name}_cpu_us"] = used / sent * 1e6
    return result


def paced(trial: Trial, rate: float, seconds: float, first: int) -> list[float]:
    """Sends at a rate for some seconds; returns how late each message began, in milliseconds."""
    if rate <= 0:
        raise BenchmarkError("nothing was run, so there is no rate to send at")
    before = trial.tally.read().messages
    figures = trial.drive("sustain", seconds=seconds, threads=SENDERS, rate=rate, first=first)
    given = int(figures["sent"])
    trial.wait_for(before + given + 1)
    start = json.loads((trial.tally.directory / "paced").read_text())["start"]
    return lateness(start, rate, trial.tally.times()[first : first + given])
