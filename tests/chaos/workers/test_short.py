"""A few kills of workers, in every way: the same trial as the long one."""

from __future__ import annotations

from tests.chaos.workers.trial import ACK_WAIT_MS, RELOAD, WAYS, run


def test_workers_that_are_killed_under_load_lose_nothing_and_hold_nothing_up(tmp_path):
    """What a dead worker held, begun or not, or was being sent, begins elsewhere long before its `ack_wait` is over."""
    result = run(tmp_path, kills=5, seconds=2, seed=5, rate=40.0)
    assert set(result.kills) == set(WAYS)
    assert (result.lost, result.unexplained) == ([], 0)
    assert result.fewest >= result.workers - 1
    assert max([*result.waits, *result.delays]) < ACK_WAIT_MS / 1000 / 4


def test_reloads_and_recycling_under_load_lose_and_repeat_nothing(tmp_path):
    """The successor is ready before the worker that it replaces stops, so the fleet is never incomplete."""
    result = run(
        tmp_path, kills=1, seconds=1, seed=5, rate=40.0, ways=[RELOAD], arguments=["--max-tasks", "100"]
    )
    assert (result.lost, result.repeats, result.unexplained) == ([], 0, 0)
    assert result.fewest == result.workers
