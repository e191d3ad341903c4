"""The board that a worker shares with its supervisor: what is held, whatever is written in which order."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream.fleet.board import BOUNDS_SECONDS, SLOTS, Board, Counts, Held


@pytest.fixture
def boards():
    """The supervisor's board, and the worker's over the same memory."""
    supervisor = Board.create()
    worker = Board(os.dup(supervisor.descriptor))
    yield supervisor, worker
    worker.close()
    supervisor.close()


def test_the_supervisor_sees_what_the_worker_notes(boards):
    """Held, begun, moved to another ack subject, and released."""
    supervisor, worker = boards
    first, second = worker.hold("$JS.ACK.a"), worker.hold("$JS.ACK.b")
    worker.begin(first, 7)
    assert set(supervisor.held()) == {Held("$JS.ACK.a", begun=True, begun_ms=7), Held("$JS.ACK.b")}
    worker.move(first, "$JS.ACK.longer.than.before")
    worker.answer(second)
    assert supervisor.in_flight() == 1
    worker.release(second)
    assert list(supervisor.held()) == [Held("$JS.ACK.longer.than.before", begun=True, begun_ms=7)]


def test_counts_and_signs_of_life_are_shared(boards):
    """What a probe and a limit look at."""
    supervisor, worker = boards
    assert (supervisor.last_beat, supervisor.connected) == (0, False)
    worker.beat(12_345)
    worker.note_connected(True)
    worker.note_threads_lost(2)
    assert supervisor.last_beat == 12_345
    assert supervisor.connected
    assert supervisor.threads_lost == 2


def test_attempts_are_counted_by_how_long_they_took(boards):
    """A bound belongs to the bucket below it; what took longer than the last bound has a bucket of its own."""
    supervisor, worker = boards
    for seconds in (BOUNDS_SECONDS[0], BOUNDS_SECONDS[0] * 1.01, 10 * BOUNDS_SECONDS[-1]):
        worker.count(3, seconds, failed=seconds > 1)
    worker.count_retry(3)
    counts = supervisor.counts(3)
    assert (counts.buckets[0], counts.buckets[1], counts.buckets[-1]) == (1, 1, 1)
    assert (counts.attempts, counts.failed, counts.retried) == (3, 1, 1)
    assert counts.microseconds == pytest.approx(3_000_010_050, abs=100)
    assert supervisor.counts(2) == Counts.none()
    counts += counts
    assert counts.attempts == 6


def test_what_outlives_its_hard_limit_is_found(boards):
    """Only while its actor runs: one that has returned, or was settled, kills nothing."""
    supervisor, worker = boards
    slot = worker.hold("$JS.ACK.a")
    worker.begin(slot, 1_000, 3_000, 42)
    assert supervisor.overdue(2_999) is None
    assert supervisor.overdue(3_000) == Held(
        "$JS.ACK.a", begun=True, begun_ms=1_000, kill_at_ms=3_000, thread=42
    )
    worker.end(slot)
    assert supervisor.overdue(9_999) is None
    worker.begin(slot, 1_000, 3_000, 42)
    worker.answer(slot)
    assert supervisor.overdue(9_999) is None
    worker.release(slot)
    worker.begin(worker.hold("$JS.ACK.b"), 4_000)
    assert supervisor.overdue(9_999) is None


def test_a_full_board_takes_nothing_more(boards):
    """One delivery more than there are slots, and one whose ack subject is too long, are not noted."""
    _, worker = boards
    assert worker.hold("x" * 600) is None
    slots = [worker.hold(f"s{number}") for number in range(SLOTS)]
    assert None not in slots
    assert worker.hold("one more") is None
    worker.release(slots[0])
    assert worker.hold("now") is not None


@given(st.lists(st.tuples(st.sampled_from(["hold", "begin", "release"]), st.integers(0, 7))))
def test_the_board_says_what_a_dictionary_would(commands):
    """Random commands, against a plain model."""
    board = Board.create()
    slots: dict[int, int] = {}
    model: dict[int, bool] = {}
    try:
        for command, key in commands:
            if command == "hold" and key not in slots:
                slot = board.hold(f"subject.{key}")
                assert slot is not None
                slots[key], model[key] = slot, False
            elif command == "begin" and key in slots:
                board.begin(slots[key], 0)
                model[key] = True
            elif command == "release" and key in slots:
                board.release(slots.pop(key))
                del model[key]
        expected = {Held(f"subject.{key}", begun=begun) for key, begun in model.items()}
        assert set(board.held()) == expected
    finally:
        board.close()
