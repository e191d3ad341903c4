"""The `dramatiq` command with this broker: several processes, forked and spawned, queues, reloading, gevent."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.polling import eventually, holds
from tests.support.processes import WORKER_READY, Process

#: When it reloads itself, the command looks for "python" on the PATH.
RELOADING = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def pids(fleet, names):
    """The processes in which the `hold`s of these names began."""
    lines = [line.split() for line in fleet.runs.read_text().splitlines()]
    return {words[2] for words in lines if words[0] == "began" and words[1] in names}


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_several_processes_share_the_work(make_fleet, start_method):
    """Every process takes its part, and no message runs twice."""
    fleet = make_fleet()
    arguments = ["--use-spawn"] if start_method == "spawn" else []
    workers = fleet.start(*arguments, processes=2, threads=1)
    assert len(workers.children()) >= 2
    names = list("abcdef")
    for name in names:
        fleet.send("hold", name)
    # A process with one thread begins one and fetches one more.
    eventually(lambda: len(pids(fleet, names)) == 2)
    for number in range(50):
        fleet.send("mark", f"m{number}")
    for name in names:
        fleet.open(name)
    fleet.broker.join("default", timeout=30_000)
    assert set(fleet.counts().values()) == {1}
    assert len(fleet.counts()) == 2 * len(names) + 50
    assert workers.stop() == 0
    assert "unexpected" not in workers.output


def test_queues_chooses_what_is_worked_on(make_fleet):
    """`--queues other` leaves the default queue to others."""
    fleet = make_fleet()
    fleet.start("--queues", "other")
    fleet.send("mark", "left")
    fleet.send("other", "taken", queue="other")
    fleet.wait_for("other taken")
    holds(lambda: fleet.broker.queue_stats("default").ready == 1, 0.3)
    assert fleet.counts() == {"other taken": 1}


def test_a_changed_source_reloads_the_workers(make_fleet, tmp_path):
    """`--watch`: the processes are replaced, and the new ones go on with the queue."""
    fleet = make_fleet(ack_wait=2_000)
    source = tmp_path / "watched" / "module.py"
    source.parent.mkdir()
    # Dramatiq's own pattern for sources, `**.py`, matches nothing in watchdog 7.
    arguments = ["--watch", str(source.parent), "--watch-include", "**/*.py"]
    workers = fleet.start(*arguments, threads=1, env=RELOADING)
    fleet.send("mark", "before")
    fleet.wait_for("ran before")

    def reloading():
        if "Detected changes" not in workers.output:
            source.write_text(f"CHANGED = {time.time()}\n")  # the watcher may begin after the workers
        return "Stopping worker process" in workers.output

    eventually(reloading, timeout=30, interval=0.5)
    workers.wait_for_output(WORKER_READY, count=2)
    fleet.send("mark", "after")
    fleet.wait_for("ran after")


def test_sighup_finishes_what_runs_and_goes_on(make_fleet):
    """A reload from outside: the old process finishes its message, the new one has what was not begun."""
    fleet = make_fleet(ack_wait=60_000)
    workers = fleet.start(threads=1, env=RELOADING)
    fleet.send("hold", "old")
    fleet.send("mark", "waiting")
    fleet.wait_for("began old")
    workers.send_signal(signal.SIGHUP)
    workers.wait_for_output("Shutting down")
    fleet.open("old")
    workers.wait_for_output(WORKER_READY, count=2)
    fleet.wait_for("ran waiting")
    fleet.broker.join("default", timeout=30_000)
    assert fleet.counts() == {"began old": 1, "ended old": 1, "ran waiting": 1}


def test_gevent_is_refused_with_a_reason(make_fleet, nats_url, namespace, tmp_path):
    """`dramatiq-gevent` replaces the threads that this broker needs: it says so and what to use instead."""
    fleet = make_fleet()
    command = [Path(sys.executable).parent / "dramatiq-gevent", "tests.broker.fleet_app", "--processes", "1"]
    env = {"FLEET_RUNS": str(fleet.runs), "FLEET_BROKER": json.dumps(fleet.options)}
    with Process(command, log=tmp_path / "gevent.log", env=env) as workers:
        workers.wait_for_output("does not run under gevent")
        assert "start workers with `dramatiq` instead of `dramatiq-gevent`" in workers.output


def test_workers_without_a_server_say_which_one_is_missing(make_fleet, tmp_path):
    """The command stays, says clearly what it cannot reach, and works when it can."""
    fleet = make_fleet(url="nats://127.0.0.1:1")
    workers = fleet.start()
    workers.wait_for_output(r"Could not connect to NATS at nats://127\.0\.0\.1:1")
    eventually(lambda: workers.running)
    assert workers.stop() == 0
