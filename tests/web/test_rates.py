"""The limiter by itself: what it lets through over time, and what it remembers."""

from __future__ import annotations

import pytest

from tasks.settings import Settings
from web.problems import Problem
from web.rates import FAILURES, REMEMBERED, Rate, Rates, _network


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_worth_at_once_and_then_as_it_comes_back() -> None:
    """After the burst one request is let through for each interval, and the wait is told exactly."""
    clock = Clock()
    rate = Rate(6, clock)
    assert [rate.wait("a") for _ in range(6)] == [0.0] * 6
    assert rate.wait("a") == pytest.approx(10.0)
    clock.now += 9.0
    assert rate.wait("a") == pytest.approx(1.0)
    clock.now += 1.0
    assert rate.wait("a") == 0.0
    assert rate.wait("a") > 0
    clock.now += 3_600.0
    assert [rate.wait("a") for _ in range(7)].count(0.0) == 6


def test_a_refusal_costs_nothing() -> None:
    """One who keeps asking meanwhile does not wait longer for it."""
    clock = Clock()
    rate = Rate(60, clock)
    assert [rate.wait("a") for _ in range(60)].count(0.0) == 60
    assert [rate.wait("a") for _ in range(1_000)] == [pytest.approx(1.0)] * 1_000


def test_what_is_remembered_is_bounded() -> None:
    """Any number of callers costs no more than the bound, and each has a rate of its own."""
    rate = Rate(1, Clock())
    assert all(rate.wait(f"caller {number}") == 0.0 for number in range(REMEMBERED + 100))
    assert len(rate._full) == REMEMBERED
    assert rate.wait(f"caller {REMEMBERED + 99}") > 0


def test_passwords_that_are_tried_at_once_count_before_they_are_known_to_be_wrong() -> None:
    """To look at one takes long, so that hundreds may be under way; only a right one is given back."""
    rates = Rates(Settings())
    for _ in range(3 * FAILURES):
        rates.try_password("10.1.2.3")
        rates.was_right("10.1.2.3")
    for _ in range(FAILURES):
        rates.try_password("10.1.2.3")
    with pytest.raises(Problem) as refused:
        rates.try_password("10.1.2.3")
    assert refused.value.status == 429
    rates.try_password("10.1.2.4")
    rates.was_right("10.1.2.5")  # which tried nothing
    rates.was_right("10.1.2.3")
    rates.try_password("10.1.2.3")


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:2", "2001:db8::/64"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("nonsense", "nonsense"),
    ],
)
def test_what_counts_as_one_client(address: str, network: str) -> None:
    """An IPv6 client chooses among 2^64 addresses, and counts once."""
    assert _network(address) == network
