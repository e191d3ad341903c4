"""The few statistics that the report uses: median, spread, percentile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linear between the two nearest ranks."""
    if not values:
        raise ValueError("percentile of no values; measure at least one")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; give a number from 0 to 1")
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Summary:
    """Several repetitions of one figure."""

    median: float
    low: float
    high: float
    repetitions: int

    @property
    def spread(self) -> float:
        """Half the distance between the lowest and the highest, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarise(values: Sequence[float]) -> Summary:
    return Summary(percentile(values, 0.5), min(values), max(values), len(values))
