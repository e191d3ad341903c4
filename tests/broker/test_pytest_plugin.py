"""The fixtures that pytest finds where the library is installed, used as a stranger's tests use them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import dramatiq
from dramatiq.results import Results
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.results import JetStreamBackend

broker = JetStreamBroker("nats://127.0.0.1:9")  # nothing listens there
broker.add_middleware(Results(backend=JetStreamBackend(broker), store_results=True))
broker.add_middleware(Periodic())
dramatiq.set_broker(broker)


@dramatiq.actor(every=60_000)
def remind(count=1):
    return count


def order():
    remind.send_with_options(args=(3,), delay=5_000)
"""

TESTS = """
import dramatiq
import shop


def test_an_order_reminds(stub_broker):
    shop.order()
    stub_broker.assert_enqueued(shop.remind.message(3), delay=5_000)
    stub_broker.run(within=60_000)
    stub_broker.assert_not_enqueued(shop.remind)


def test_a_worker_runs_what_is_sent(stub_broker, worker):
    message = shop.remind.send(4)
    assert message.get_result(block=True, timeout=30_000) == 4


def test_nothing_is_left_of_another_test(stub_broker):
    assert stub_broker.enqueued() == []


def test_a_real_server(worker, jetstream_broker):
    done = []

    @dramatiq.actor
    def note(what):
        done.append(what)

    note.send("here")
    jetstream_broker_is_empty(jetstream_broker, done)


def jetstream_broker_is_empty(broker, done):
    import time

    deadline = time.monotonic() + 30
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == ["here"]


def test_the_program_has_its_broker_again():
    assert dramatiq.get_broker() is shop.broker
    assert shop.remind.broker is shop.broker
"""

OVERRIDE = """
import pytest


@pytest.fixture
def stub_broker():
    return "mine"
"""


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_strangers_tests_use_the_fixtures(tmp_path: Path) -> None:
    """A program whose server is not there is tested on the stub, and an actor on a real server."""
    (tmp_path / "shop.py").write_text(PROGRAM)
    (tmp_path / "test_shop.py").write_text(TESTS)
    ran = _pytest(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "5 passed" in ran.stdout


def test_a_run_that_uses_no_fixture_pays_nothing(tmp_path: Path) -> None:
    """Neither the library nor Dramatiq is imported, and a conftest may have fixtures of the same names."""
    (tmp_path / "conftest.py").write_text(OVERRIDE)
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n\n"
        "def test_it(stub_broker):\n"
        "    assert stub_broker == 'mine'\n"
        "    assert 'pytest_dramatiq_jetstream' in sys.modules\n"
        "    assert not {'dramatiq', 'dramatiq_jetstream', 'nats'} & sys.modules.keys()\n"
    )
    ran = _pytest(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
