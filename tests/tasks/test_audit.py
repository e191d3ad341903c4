"""An act is recorded before it is carried out: whatever dies when, nothing is done without a record."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dramatiq_jetstream.testing import NatsServer
from tasks.audit import FAILED, UNFINISHED, Act, AuditLog, Sought, Who
from tests.support.processes import python

ANN = Who("ann", "operator", "command", "here")

#: Does something in the block of a record and is killed there, or where the record of its end is stored.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from tasks import app
from tasks.audit import Who

log = app.audit_log()
if sys.argv[1] == "ending":
    store, calls = log._store, []

    def dying(subject, record, record_id):
        if subject.endswith(".ended"):
            os.kill(os.getpid(), signal.SIGKILL)
        store(subject, record, record_id)

    log._store = dying
with log.record("product.restock", "MUG-01", Who("ann", "operator", "command", "here")):
    Path(sys.argv[2]).write_text("done")
    if sys.argv[1] == "acting":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(store_dir=tmp_path_factory.mktemp("audit") / "nats", sync="2m") as server:
        yield server


def log(nats: NatsServer) -> AuditLog:
    from dramatiq_jetstream import JetStreamBroker
    from dramatiq_jetstream.events import Events
    from tasks import audit

    broker = JetStreamBroker(nats.url)
    stream = Events(audit.STREAM, [audit.SUBJECTS], append_only=True)
    stream.ensure(broker)
    return AuditLog(
        lambda subject, record, record_id: broker.publish(subject, record, event_id=record_id),
        lambda: broker.stream(audit.STREAM),
        lambda count: [],
        lambda: 1_000,
    )


@pytest.mark.parametrize("moment", ["acting", "ending"])
def test_an_act_that_is_cut_off(nats: NatsServer, tmp_path: Path, moment: str) -> None:
    """Killed between the act and the record of its end: the act is known, and known to be unfinished."""
    done = tmp_path / "done"
    with python("-c", PROGRAM, moment, done, log=tmp_path / "log", env={"NATS_URL": nats.url}) as program:
        assert program.wait(60) == -signal.SIGKILL
    assert done.read_text() == "done"
    (newest, *_) = log(nats).search(Sought()).acts
    assert (newest.act, newest.name, newest.outcome) == ("product.restock", "ann", UNFINISHED)


def test_nothing_is_done_without_a_record() -> None:
    """When the first record cannot be stored, the block is not entered."""

    def store(subject: str, record: bytes, record_id: str) -> None:
        raise ConnectionError("away")

    entered = False
    with pytest.raises(ConnectionError):
        with AuditLog(store, None, lambda count: [], lambda: 0).record("key.make", "x", ANN):  # type: ignore[arg-type]
            entered = True
    assert not entered


def interrupted(audit: AuditLog, target: str) -> None:
    with audit.record("product.change", target, ANN, note="begun") as act:
        act.detail["reached"] = "half"
        raise KeyboardInterrupt


def test_how_it_ended(nats: NatsServer) -> None:
    """An interrupt is recorded as well, and every target is found by itself, whatever it is called."""
    audit = log(nats)
    for target in ("a.b", "*", "müsli >", "", "x" * 100):
        with pytest.raises(KeyboardInterrupt):
            interrupted(audit, target)
        (found, *_) = audit.of("product", target[:63] + "…" if len(target) > 64 else target)
        assert (found.outcome, found.detail) == (FAILED, {"note": "begun", "reached": "half"})


def test_what_others_store_there(nats: NatsServer) -> None:
    """A message that is no record is passed over."""
    audit = log(nats)
    audit._store("AUDIT.order.x.y.begun", b"no record", "other")
    with audit.record("order.cancel", "x", ANN):
        pass
    assert [act.act for act in audit.of("order", "x")] == ["order.cancel"]


def test_the_pid_of_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have none."""
    import getpass

    from tasks.audit import at_terminal

    def no_name() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", no_name)
    assert at_terminal().name == f"user {os.getuid()}"


def test_an_act_in_words() -> None:
    """A customer has no name here."""
    act = Act("1", "order.cancel", "o-1", "", "customer", "page", "", 0)
    assert act.who == "customer"
