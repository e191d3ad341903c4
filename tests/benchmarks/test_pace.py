"""The steady load, and what is worked out of it."""

from __future__ import annotations

import pytest

from benchmarks import contenders
from benchmarks.measurements.cluster import LOSS, Cluster
from benchmarks.measurements.measurement import Options
from benchmarks.measurements.short_actor import share_of_bound
from benchmarks.pace import Pace, lateness, longest_gap


def test_a_rate_gives_each_message_its_time() -> None:
    """Four a second for a second: a quarter of a second apart, whatever the clock says when they are taken."""
    pace = Pace(4, 1, first=10, clock=lambda: 100.0)
    assert list(iter(pace.take, None)) == [(10, 100.0), (11, 100.25), (12, 100.5), (13, 100.75)]
    assert pace.given == 4


def test_without_a_rate_messages_are_given_until_the_time_is_over() -> None:
    """They have no index, and are due at once."""
    moments = iter([0.0, 0.5, 0.9, 1.0])
    pace = Pace(0, 1, clock=lambda: next(moments))
    assert [pace.take(), pace.take(), pace.take()] == [(-1, 0.5), (-1, 0.9), None]
    assert pace.given == 2


def test_lateness_counts_from_when_a_message_was_to_be_sent() -> None:
    """A sender that was held up does not make its messages younger."""
    assert lateness(2.0, 10, [2_001_000_000, 2_600_000_000]) == pytest.approx([1, 500])


def test_a_message_that_was_not_run_has_no_lateness() -> None:
    """It would be left out of a percentile silently."""
    with pytest.raises(ValueError, match="1 of 2 messages were not run"):
        lateness(2.0, 10, [2_001_000_000, 0])


def test_the_longest_gap_begins_at_the_earliest_with_the_loss() -> None:
    """What happened before it does not count, and messages that never began do not either."""
    seconds = 10**9
    assert longest_gap([1 * seconds, 5 * seconds, 0, 6 * seconds, 9 * seconds], 4 * seconds) == 3
    assert longest_gap([1 * seconds], 4 * seconds) == 0


def test_sixteen_threads_do_3200_tasks_of_5_ms() -> None:
    """Half of that is a share of a half."""
    assert share_of_bound(1_600) == pytest.approx(0.5)


def test_only_what_fails_over_loses_its_leader() -> None:
    """Redis without Sentinel has no other one."""
    cases = {
        contender.name: LOSS in Cluster().cases(Options(), contender)
        for contender in contenders.CONTENDERS
        if contender.takes("cluster")
    }
    assert cases == {
        "jetstream-r3": True,
        "jetstream-1s-r3": True,
        "dramatiq-rabbitmq-quorum": True,
        "dramatiq-redis-everysec-wait": False,
        "dramatiq-redis-always-wait": False,
    }
