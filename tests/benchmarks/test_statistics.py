"""The statistics of the benchmarks."""

from __future__ import annotations

import pytest

from benchmarks.statistics import percentile, summarise


def test_percentile_is_linear_between_ranks() -> None:
    """A percentile between two values lies between them in proportion."""
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile([10, 20, 30, 40, 50], 0.9) == pytest.approx(46)


def test_percentile_ends_are_the_extremes() -> None:
    """The lowest and highest percentile are the lowest and highest value."""
    assert percentile([7, 9, 8], 0) == 7
    assert percentile([7, 9, 8], 1) == 9


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_percentile_refuses_shares_outside_0_to_1(share: float) -> None:
    """A share such as 99 instead of 0.99 is an error, not a wrong figure."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        percentile([1.0], share)


def test_percentile_of_nothing_is_an_error() -> None:
    """No values give an error instead of a figure."""
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_summary_has_median_and_spread() -> None:
    """The median is not moved by an outlier; the spread shows it."""
    summary = summarise([100, 90, 200])
    assert (summary.median, summary.low, summary.high, summary.repetitions) == (100, 90, 200, 3)
    assert summary.spread == pytest.approx(0.55)
