"""Limits of an actor: what they cost where none is exceeded, how exact they are, and who waits for whom.

*Without* has the same messages and no limit. *Not exceeded* has a limit for each of 10,000 customers that no customer
reaches: the cost of looking. *Exceeded* has ten customers with far more than their limit. *One far over*: one customer
has a backlog of half of all messages before those of a thousand others, which have one each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders.contender import Contender
from benchmarks.contenders.limited import customer_of
from benchmarks.measurements.drain import drain
from benchmarks.measurements.measurement import CPU, Figure, Measurement, Options
from benchmarks.trial import Trial

#: The rate of the cases that exceed it, for each customer in a second.
RATE = 50


@dataclass(frozen=True)
class Case:
    """An actor's options, and how many messages which customers send."""

    options: dict[str, Any]
    messages: int
    customers: int
    backlog: bool = False  # whether the first half of all messages is of one customer


CASES = {
    "without": Case({}, 10_000, 10_000),
    "rate, not exceeded": Case({"rate": "1000/s"}, 10_000, 10_000),
    "concurrency, not exceeded": Case({"concurrency": 16}, 10_000, 10_000),
    "rate, exceeded": Case({"rate": f"{RATE}/s"}, 2_000, 10),
    "concurrency, exceeded": Case({"concurrency": 1}, 2_000, 10),
    "rate, one far over": Case({"rate": f"{RATE}/s"}, 2_000, 1_000, backlog=True),
}


class Limits(Measurement):
    name = "limits"
    title = "Limits of an actor"
    quick = False
    figures = (
        Figure("per_second", "messages/s", plotted=True),
        Figure("most", "most starts of a customer in any second"),
        Figure("others_ms", "until the last of the others has begun", "ms"),
        *CPU,
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        return list(CASES) if contender.ours and not contender.only else []

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        wanted = CASES[case]
        messages = options.count(wanted.messages)
        backlog = messages // 2 if wanted.backlog else 0
        with Trial(contender, self.name, samples=messages) as trial:
            trial.variables |= {
                "BENCH_LIMITS": json.dumps({**wanted.options, "key": "customer"} if wanted.options else {}),
                "BENCH_CUSTOMERS": str(wanted.customers),
                "BENCH_BACKLOG": str(backlog),
            }
            trial.fill(messages)
            figures = drain(trial, messages)
            times = trial.tally.times()
        begun: dict[int, list[int]] = {}
        for index, moment in enumerate(times):
            begun.setdefault(customer_of(index, wanted.customers, backlog), []).append(moment)
        if "rate" in wanted.options:
            figures["most"] = max(_most_in_a_second(sorted(moments)) for moments in begun.values())
        if backlog:
            figures["others_ms"] = (max(times[backlog:]) - min(times)) / 1e6
        return figures


def _most_in_a_second(moments: list[int]) -> int:
    """Return how many of these moments, in nanoseconds and in order, are within one second at most."""
    first, most = 0, 0
    for last, moment in enumerate(moments):
        while moment - moments[first] >= 1_000_000_000:
            first += 1
        most = max(most, last - first + 1)
    return most
