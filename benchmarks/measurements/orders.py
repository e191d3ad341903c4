"""Orders, with the whole service on the one machine.

`accept`: how many orders are answered with 202, stored, while no fleet runs, beside an endpoint that does nothing.
`burst`: orders as fast as they are accepted, until the last one is confirmed. `steady`: orders at a fixed rate, and
how long each takes from stored to confirmed (both are the stream's own times).
"""

from __future__ import annotations

import json

from benchmarks.contenders.contender import PROCESSES, THREADS, Contender
from benchmarks.measurements.measurement import Figure, Measurement, Options
from benchmarks.statistics import percentile
from benchmarks.trial import Trial

ORDERS = 5_000
STEADY_ORDERS = 1_500
STEADY_RATE = 50
CLIENTS = 16
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
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return [ACCEPT, BURST, STEADY] if contender.ours else [ACCEPT]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        orders = options.count(STEADY_ORDERS if case == STEADY else ORDERS)
        with Trial(contender, self.name) as trial:
            if case != ACCEPT:
                trial.start_workers(PROCESSES, THREADS)
            trial.drive("post", messages=CLIENTS, threads=CLIENTS)  # connects everything
            if case != ACCEPT:
                trial.drive("confirmed", messages=CLIENTS)
            server, fleet = trial.server_usage(), trial.worker_usage()
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
        return result


def _end_to_end(times: list[tuple[int, int]]) -> dict[str, float]:
    after = [(confirmed - created) / 1e6 for created, confirmed in times]
    seconds = (max(confirmed for _, confirmed in times) - min(created for created, _ in times)) / 1e9
    return {
        "confirmed_per_second": len(times) / seconds,
        "p50_ms": percentile(after, 0.5),
        "p99_ms": percentile(after, 0.99),
    }
