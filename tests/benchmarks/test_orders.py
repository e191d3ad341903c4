"""What is counted for each order."""

from __future__ import annotations

import pytest

from benchmarks.contenders.contender import Stored
from benchmarks.measurements.orders import written


def test_what_was_stored_before_does_not_count() -> None:
    """Ten orders: four events each in one stream, two writes each in another one that is new."""
    before = [Stored("ORDERS", 100, 5_000)]
    after = [Stored("ORDERS", 140, 9_000), Stored("KV", 20, 1_000)]
    assert written(before, after, 10) == pytest.approx({"writes": 6, "busiest": 4, "kept_bytes": 500})


def test_a_store_that_cannot_be_asked_has_no_figures() -> None:
    """Its columns stay empty."""
    assert written([], [], 10) == {}
