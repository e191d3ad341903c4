"""The board that a worker shares with its supervisor: what is held, whatever is written in which order."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream.fleet.board import SLOTS, Board, Held


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
    worker.begin(first)
    assert set(supervisor.held()) == {Held("$JS.ACK.a", True), Held("$JS.ACK.b", False)}
    worker.move(first, "$JS.ACK.longer.than.before")
    worker.release(second)
    assert list(supervisor.held()) == [Held("$JS.ACK.longer.than.before", True)]


def test_counts_and_signs_of_life_are_shared(boards):
    """What a probe and a limit look at."""
    supervisor, worker = boards
    assert (supervisor.finished, supervisor.failed, supervisor.last_beat, supervisor.connected) == (
        0,
        0,
        0,
        False,
    )
    worker.note_finished(failed=False)
    worker.note_finished(failed=True)
    worker.beat(12_345)
    worker.note_connected(True)
    worker.note_threads_lost(2)
    assert (supervisor.finished, supervisor.failed, supervisor.last_beat) == (2, 1, 12_345)
    assert supervisor.connected
    assert supervisor.threads_lost == 2


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
                board.begin(slots[key])
                model[key] = True
            elif command == "release" and key in slots:
                board.release(slots.pop(key))
                del model[key]
        expected = {Held(f"subject.{key}", begun) for key, begun in model.items()}
        assert set(board.held()) == expected
    finally:
        board.close()
