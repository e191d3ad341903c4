"""Orders, with the whole service on the one machine.

`accept`: how many orders are answered with 202, stored, while no fleet runs, beside an endpoint that does nothing.
`burst`: orders as fast as they are accepted, until the last one is confirmed. `steady`: orders at a fixed rate, and
how long each takes from stored to confirmed (both are the store's own times).
"""

from __future__ import annotations

import json
import time

from benchmarks.contenders.contender import PROCESSES, THREADS, Contender, Stored
from benchmarks.measurements.measurement import Figure, Measurement, Options
from benchmarks.statistics import percentile
from benchmarks.trial import Trial

ORDERS = 5_000
STEADY_ORDERS = 1_500
STEADY_RATE = 50
CLIENTS = 16
#: How long the store may be busy with what follows the last order, in seconds.
STILL_TIMEOUT = 120.0
#: How much the service writes in a second without orders: periodic tasks note that they ran.
IDLE_WRITES = 10
ACCEPT, BURST, STEADY = "accept", "burst, end to end", f"steady, {STEADY_RATE} a second"


class Orders(Measurement):
    name = "orders"
    title = "Orders"
    figures = (
        Figure("accepted_per_second", "accepted/s", plotted=True),
        Figure("confirmed_per_second", "confirmed/s", plotted=True),
        Figure("answer_p50_ms", "answered p50", "ms"),
        Figure("answer_p99_ms", "answered p99", "ms"),
        Figure("p50_ms", "confirmed after p50", "ms", plotted=True),
        Figure("p99_ms", "confirmed after p99", "ms"),
        Figure("server_cpu_us", "servers' CPU", "µs/order"),
        Figure("worker_cpu_us", "fleet's CPU", "µs/order"),
        Figure("writes", "stored", "messages/order"),
        Figure("busiest", "by the busiest stream"),
        Figure("kept_bytes", "kept", "bytes/order"),
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [ACCEPT] if contender.bound else [ACCEPT, BURST, STEADY]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        orders = options.count(STEADY_ORDERS if case == STEADY else ORDERS)
        with Trial(contender, self.name) as trial:
            if case != ACCEPT:
                trial.start_workers(PROCESSES, THREADS)
            trial.drive("post", messages=CLIENTS, threads=CLIENTS)  # connects everything
            if case != ACCEPT:
                trial.drive("confirmed", messages=CLIENTS)
            stored = still(trial)
            server, fleet = trial.server_usage(), trial.worker_usage()
            each = trial.usage_of_servers()
            rate = STEADY_RATE if case == STEADY else 0
            posted = trial.drive("post", messages=orders, threads=CLIENTS, rate=rate)
            took = json.loads((trial.tally.directory / "took").read_text())
            result = {
                "accepted_per_second": posted["per_second"],
                "answer_p50_ms": percentile(took, 0.5) * 1e3,
                "answer_p99_ms": percentile(took, 0.99) * 1e3,
            }
            if case != ACCEPT:
                trial.drive("confirmed", messages=CLIENTS + orders)
                result |= _end_to_end(json.loads((trial.tally.directory / "orders").read_text())[-orders:])
            for key, used in (
                ("server_cpu_us", trial.server_usage().cpu_since(server)),
                ("worker_cpu_us", trial.worker_usage().cpu_since(fleet) if case != ACCEPT else None),
            ):
                if used is not None:
                    result[key] = used / orders * 1e6
            for name, usage in trial.usage_of_servers().items():
                if (used := usage.cpu_since(each[name])) is not None:
                    result[f"{name}_cpu_us"] = used / orders * 1e6
            return result | written(stored, still(trial), orders)


def still(trial: Trial) -> list[Stored]:
    """What is stored once hardly anything is written any more, so with what follows confirmed orders."""
    deadline = time.monotonic() + STILL_TIMEOUT
    stored = trial.contender.stored(trial.servers)
    while stored and time.monotonic() < deadline:
        before = sum(one.writes for one in stored)
        time.sleep(1.0)
        stored = trial.contender.stored(trial.servers)
        if sum(one.writes for one in stored) - before <= IDLE_WRITES:
            break
    return stored


def written(before: list[Stored], after: list[Stored], orders: int) -> dict[str, float]:
    """What was stored for each order."""
    if not after:
        return {}
    earlier = {stored.stream: stored for stored in before}
    none = Stored("", 0, 0)
    writes = [stored.writes - earlier.get(stored.stream, none).writes for stored in after]
    sizes = [stored.size - earlier.get(stored.stream, none).size for stored in after]
    return {
        "writes": sum(writes) / orders,
        "busiest": max(writes) / orders,
        "kept_bytes": sum(sizes) / orders,
    }


def _end_to_end(times: list[tuple[int, int]]) -> dict[str, float]:
    after = [(confirmed - created) / 1e6 for created, confirmed in times]
    seconds = (max(confirmed for _, confirmed in times) - min(created for created, _ in times)) / 1e9
    return {
        "confirmed_per_second": len(times) / seconds,
        "p50_ms": percentile(after, 0.5),
        "p99_ms": percentile(after, 0.99),
    }
