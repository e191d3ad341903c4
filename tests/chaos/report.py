"""Writes what was measured: a table for people, JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.faults import BY_NAME
from tests.chaos.trial import Measured, Result

RESULTS = Path(__file__).parent / "results"

CONFIGURATION = {
    "single": "1 node, fsync always",
    "cluster": "3 nodes, 3 replicas, fsync always",
}


def table(results: Sequence[Result]) -> str:
    """Return a markdown table: fault × configuration → lost, repeated, recovered in."""
    grouped: defaultdict[tuple[str, str], list[Measured]] = defaultdict(list)
    for result in results:
        for measured in result.measured:
            grouped[measured.fault, measured.topology].append(measured)
    lines = [
        (
            "| Fault | Configuration | Times | Lost | Repeated runs | Dead letters replayed | Accepted again after |"
            " All finished after |"
        ),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, topology), group in grouped.items():
        title = BY_NAME[name].title if name in BY_NAME else "several of these at once"
        lines.append(
            f"| {title} | {CONFIGURATION[topology]} | {len(group)} | {sum(m.lost for m in group)} "
            f"| {sum(m.repeated for m in group)} | {sum(m.dead_letters for m in group)} "
            f"| {in_words([m.accepted_again for m in group])} | {in_words([m.recovered for m in group])} |"
        )
    return "\n".join(lines)


def in_words(values: list[float | None]) -> str:
    """Return the range of some seconds; None is one that never came."""
    known = [value for value in values if value is not None]
    never = len(values) - len(known)
    if not known:
        return "never"
    low, high = min(known), max(known)
    text = f"{high:.1f} s" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f}–{high:.1f} s"
    return f"{text}, {never} × never" if never else text


def verdict_lines(result: Result) -> list[str]:
    """Return one line per promise, under a heading."""
    return [
        (
            f"{result.topology} (seed {result.seed}): {result.accepted} orders accepted, {result.runs} runs of actors, "
            f"{result.repeated} repeated; answers {result.answers}"
        ),
        *(f"  {verdict.line()}" for verdict in result.verdicts),
    ]


def machine() -> str:
    """Return the machine as the documents name it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def write(results: Sequence[Result], seed: int, minutes: float) -> Path:
    """Write everything as JSON and return where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y-%m-%dT%H%M%S')}-{seed}.json"
    document = {
        "seed": seed,
        "minutes": minutes,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "results": [result.to_json() for result in results],
    }
    path.write_text(json.dumps(document, indent=1))
    return path
