"""The archive beside the running service: real files, real processes that are killed, and the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dramatiq_jetstream import JetStreamBroker
from tasks.figures import USED
from tasks.index import BUCKET as INDEX
from tests.support.polling import eventually
from tests.support.processes import REPOSITORY, python
from tests.web.stack import Stack

#: Archives everything that may leave, whatever its age; killed after a step, if one is named.
PROGRAM = """
import os, signal, sys
from tasks import app, archives, retention

cut, made = sys.argv[1], app.retention

def dying(step):
    def run(self, *arguments):
        result = step(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        return result
    return run

def hurried():
    found = made()
    found._keep = 0
    return found

app.retention = hurried
if cut == "write":
    retention.Archive.write = dying(retention.Archive.write)
elif cut:
    setattr(retention.Retention, cut, dying(getattr(retention.Retention, cut)))
sys.exit(archives.main(["run"]))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("archives")
    (directory / "archive").mkdir()
    env = {"ARCHIVE_DIR": str(directory / "archive"), "RETENTION_DAYS": "1"}
    with Stack(directory, env=env) as stack:
        yield stack


def command(shop: Stack, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **shop.environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def counted(broker: JetStreamBroker, last: int) -> None:
    """Wait until the figures have counted an event, which the archive waits for."""
    bucket = broker.bucket(INDEX)

    def reached() -> bool:
        entry = bucket.get(USED)
        return entry is not None and json.loads(entry.value)["reached"] >= last

    eventually(reached, timeout=60)


def test_orders_leave_and_come_back(shop: Stack, tmp_path: Path) -> None:
    """Killed after each step, then carried on: the stream is empty, the archive whole, and an order comes back."""
    token = "tok_declined"
    orders = [shop.order()["order_id"], shop.order(payment_token=token)["order_id"]]
    before = {order_id: shop.final(order_id) for order_id in orders}
    broker = JetStreamBroker(shop.nats.url)
    stream = broker.stream("ORDERS")
    eventually(lambda: not any(one.waiting or one.in_flight for one in stream.consumers()), timeout=30)
    last = stream.range().last
    counted(broker, last)
    for cut in ("write", "_move", "_close"):
        env = shop.environment
        with python("-c", PROGRAM, cut, log=tmp_path / f"{cut}.log", env=env) as program:
            assert program.wait(120) == -signal.SIGKILL, program.output
        assert stream.range().first == 1
    assert "0 segments written" in command(shop, "-c", PROGRAM, "")
    assert stream.range().first == last + 1
    broker.close()
    assert f"1 segments are whole: {last} events, 2 orders" in command(shop, "-m", "tasks.archives", "verify")
    for order_id in orders:
        assert shop.get(f"/api/orders/{order_id}").status_code == 404
    assert "restored" in command(shop, "-m", "tasks.archives", "restore", orders[0])
    assert "not in the archive alone" in command(shop, "-m", "tasks.archives", "restore", orders[0], code=1)
    eventually(lambda: shop.get(f"/api/orders/{orders[0]}").json() == before[orders[0]], timeout=30)
    assert "0 removed" in command(shop, "-m", "tasks.rebuild")
    assert shop.get(f"/api/orders/{orders[0]}").json() == before[orders[0]]
    # It is on the lists again, and who brought it back is known.
    for asked in ({}, {"customer": "c-42"}, {"status": before[orders[0]]["status"]}):
        listed = shop.get("/api/orders", params=asked).json()["orders"]
        assert [one["order_id"] for one in listed] == [orders[0]], asked
    assert orders[0] in shop.get("/api/orders.csv").text
    acts = shop.get("/api/audit", params={"kind": "order", "target": orders[0]}).json()["acts"]
    assert [(one["act"], one["via"]) for one in acts] == [("order.restore", "command")]
    assert "Restored from the archive" in shop.get(f"/orders/{orders[0]}").text
    # It can be cancelled as before; the other is not there.
    assert shop.post(f"/api/orders/{orders[0]}/cancel").status_code == 202
    eventually(lambda: shop.get(f"/api/orders/{orders[0]}").json()["status"] == "cancelled", timeout=30)
    assert shop.post(f"/api/orders/{orders[1]}/cancel").status_code == 404
    said = command(shop, "-m", "tasks.audits", "--kind", "archive")
    assert said.count("unfinished") == 3
    assert said.count("archive.restore") == 2


def test_what_keeps_it_from_running(shop: Stack, tmp_path: Path) -> None:
    """A directory that is missing, and settings that are, are one sentence each."""
    environment = dict(shop.env)
    try:
        shop.env = {**environment, "ARCHIVE_DIR": str(tmp_path / "nowhere")}
        assert "which is no directory here" in command(shop, "-m", "tasks.archives", "run", code=1)
        shop.env = {"RETENTION_DAYS": "1"}
        assert "RETENTION_DAYS needs ARCHIVE_DIR" in command(shop, "-m", "tasks.archives", "run", code=1)
        shop.env = {"ARCHIVE_DIR": environment["ARCHIVE_DIR"]}
        assert "RETENTION_DAYS is not set" in command(shop, "-m", "tasks.archives", "run", code=1)
        shop.env = {}
        assert "set ARCHIVE_DIR" in command(shop, "-m", "tasks.archives", "verify", code=1)
    finally:
        shop.env = environment
