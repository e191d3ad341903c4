"""Random commands and faults against the broker and a real server, in one process, with a model of what was promised.

The model is small: what was acknowledged has run in the end, or was dropped by a command or fault of which that is
said; what raised an error that says *not stored* never runs. Here a few programs run, the same ones each time. To look
for longer, with other programs each time:

    python -m tests.broker.stateful 500                       500 programs
    python -m tests.broker.stateful 500 --broken NAME         until one finds the fault of a broken build
    python -m tests.broker.stateful                           the programs below, each with its broken build

Each of these faults is put into the code by `stateful/broken.py`, and found by the shortest program that shows it. That
is run by hand, because a machine that is busy enough shows nothing within the short time that calls have here:

- a message, a `put` or a purge whose call has raised `NotSent` is sent when the connection is back;
- a message is acked although its retry could not be stored, as when its time limit expired in an outage;
- a message is acked although its result could not be stored;
- acks of a stream's former life remove messages of the stream that took its name;
- a member of a group that runs twice is counted twice, and the group's callback comes early;
- one message of `enqueue_many` that is refused stops the others;
- a unique key is freed by a call whose outcome is not known, and the repeated call stores a second message;
- a unique key stays taken when its queue is flushed;
- a cancel that the loss of the connection repeats reports 0 for the delay that it has cancelled;
- a call that is interrupted leaves a slot taken, for which all later calls wait;
- after a login that was refused, the connection is not made again;
- a stream that was deleted is not made again by the next call, a consumer not under its worker;
- a retry with a long traceback is larger than the server takes, and becomes a dead letter;
- a negative delay is refused, so that a retry with one becomes a dead letter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dramatiq_jetstream.testing import NatsServer

from .stateful.machine import prepared, search


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server for this module, which is killed and emptied."""
    # What was acknowledged survives a kill without fsync.
    with NatsServer(store_dir=tmp_path_factory.mktemp("stateful"), sync="2m") as server, prepared(server):
        yield server


@pytest.mark.timeout(480)  # for the time that it may take to make a failure small
def test_promises_hold_over_random_commands_and_faults(server):
    """What was acknowledged runs; what was refused never does; keys, batches and values are as they were told."""
    search(6, derandomize=True)
