"""The numbers of a fleet in Prometheus' text format, all its workers summed.

What ended workers counted stays in the sums, so a counter never goes back while the supervisor lives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from .board import BOUNDS_SECONDS, Counts
from .slots import Series
from .supervisor import Supervisor

__all__ = ["CONTENT_TYPE", "metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

#: Labels and value of one line; the labels are written already.
_Sample = tuple[str, float]


def metrics(fleet: Supervisor) -> str:
    """The page that Prometheus reads."""
    workers = fleet.workers
    counts = sorted(fleet.counts().items())
    held = [each for worker in workers for each in worker.board.held() if not each.answered]
    begun = [each.begun_ms for each in held if each.begun]
    longest = time.monotonic() - min(begun) / 1000 if begun else 0.0
    pages = [
        _family("workers", "gauge", "Worker processes that take messages.", sum(w.serves for w in workers)),
        _family("workers_wanted", "gauge", "Worker processes that were asked for.", len(fleet.slots)),
        _family(
            "workers_stuck", "gauge", "Worker processes that do not move.", sum(w.is_stuck for w in workers)
        ),
        _family("worker_threads", "gauge", "Threads that run actors.", sum(w.threads for w in workers)),
        _family(
            "worker_restarts_total", "counter", "Workers replaced because they had died.", fleet.restarts
        ),
        _family("worker_recycled_total", "counter", "Workers replaced at a limit.", fleet.recycled),
        _family(
            "worker_killed_total",
            "counter",
            "Workers killed for an attempt past its hard time limit.",
            fleet.killed,
        ),
        _family("in_flight", "gauge", "Messages that workers hold.", len(held)),
        _family("running", "gauge", "Attempts that run.", len(begun)),
        _family(
            "longest_running_seconds", "gauge", "For how long the oldest running attempt has run.", longest
        ),
        _family("memory_bytes", "gauge", "Resident memory of all workers.", sum(w.memory() for w in workers)),
        _family(
            "attempts_total",
            "counter",
            "Attempts that ended.",
            *(_of(series, each.attempts) for series, each in counts),
        ),
        _family(
            "attempts_failed_total",
            "counter",
            "Attempts that ended with an error.",
            *(_of(series, each.failed) for series, each in counts),
        ),
        _family(
            "retries_total",
            "counter",
            "Retries that were stored after an attempt.",
            *(_of(series, each.retried) for series, each in counts),
        ),
        *_histogram("attempt_duration_seconds", "How long attempts took, their actor alone.", counts),
    ]
    return "".join(pages)


def _family(name: str, kind: str, text: str, *samples: _Sample | float) -> str:
    lines = [f"# HELP fleet_{name} {text}", f"# TYPE fleet_{name} {kind}"]
    for sample in samples:
        labels, value = sample if isinstance(sample, tuple) else ("", sample)
        lines.append(
            f"fleet_{name}{labels} {value:g}" if isinstance(value, float) else f"fleet_{name}{labels} {value}"
        )
    return "\n".join([*lines, ""])


def _histogram(name: str, text: str, counts: Iterable[tuple[Series, Counts]]) -> Iterator[str]:
    yield f"# HELP fleet_{name} {text}\n# TYPE fleet_{name} histogram\n"
    bounds = [*(f"{bound:g}" for bound in BOUNDS_SECONDS), "+Inf"]
    for series, each in counts:
        for bound, count in zip(bounds, accumulate(each.buckets), strict=True):
            yield f"fleet_{name}_bucket{_labels(*series, le=bound)} {count}\n"
        yield f"fleet_{name}_sum{_labels(*series)} {each.microseconds / 1e6}\n"
        yield f"fleet_{name}_count{_labels(*series)} {each.attempts}\n"


def _of(series: Series, value: float) -> _Sample:
    return _labels(*series), value


def _labels(actor: str, queue: str, **others: str) -> str:
    labels = {"actor": actor, "queue": queue, **others}
    escaped = {
        name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
