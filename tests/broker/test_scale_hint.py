"""`fleet scale-hint`: the number of processes, from what the workers say and what waits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dramatiq_jetstream.cli.scale_hint import Look, hint
from dramatiq_jetstream.workers import Running, WorkerInfo
from tests.support.processes import REPOSITORY


def worker(done: int, running: int, *, threads: int = 8, identity: str = "w1") -> WorkerInfo:
    """A worker that has done and runs so much."""
    tasks = [Running("m", "a", "default", 1, 0, "") for _ in range(running)]
    facts = {"id": identity, "threads": threads, "done": done, "running": tasks}
    return WorkerInfo(**{**_ANY, **facts})


_ANY = {
    "host": "h",
    "pid": 1,
    "version": "0",
    "since": 0,
    "at": 0,
    "queues": ["default"],
    "failed": 0,
    "rss": 0,
    "cpu": 0.0,
}

FREE = {"within": 10.0, "at_least": 0, "at_most": 100}


def test_a_backlog_needs_what_one_process_does_in_the_time():
    """8 threads, 8 attempts at a time, 40 in 5 s: 1 s each, so 8 a second; 400 in 10 s take five processes."""
    looks = [Look(0.0, 400, (worker(0, 8),)), Look(5.0, 360, (worker(40, 8),))]
    found = hint(looks, **FREE)
    assert (found.each, found.arriving) == (8.0, 0.0)
    assert found.processes == 5  # 360 / 10 s / 8


def test_what_arrives_meanwhile_needs_processes_too():
    """16 a second arrive, which is two processes more."""
    looks = [Look(0.0, 400, (worker(0, 8),)), Look(5.0, 440, (worker(40, 8),))]
    found = hint(looks, **FREE)
    assert found.arriving == 16.0
    assert found.processes == 8  # 44 + 16 a second, at 8


def test_workers_that_are_not_busy_show_how_long_attempts_take():
    """Two of eight threads are busy at a time, and 2 a second end: 1 s each all the same."""
    looks = [Look(0.0, 2, (worker(0, 2),)), Look(5.0, 2, (worker(10, 2),))]
    found = hint(looks, **FREE)
    assert found.each == 8.0
    assert found.processes == 1


@pytest.mark.parametrize(
    ("backlog", "running", "expected"),
    [(0, 0, 0), (5, 0, 1), (5, 3, 3)],
)
def test_without_an_attempt_the_fleet_stays_as_it_is(backlog, running, expected):
    """Nothing that waits needs nothing; what waits needs at least one."""
    workers = tuple(worker(0, 0, identity=str(number)) for number in range(running))
    found = hint([Look(0.0, backlog, workers), Look(5.0, backlog, workers)], **FREE)
    assert (found.processes, found.each) == (expected, None)


def test_recorded_attempts_tell_how_long_they_take_when_no_worker_runs():
    """2 s each and 8 threads are 4 a second."""
    looks = [Look(0.0, 400, ()), Look(5.0, 400, ())]
    assert hint(looks, **FREE, seconds_each=2.0).processes == 10


def test_a_hint_keeps_to_what_is_allowed():
    """Neither fewer than `at_least` nor more than `at_most`."""
    looks = [Look(0.0, 10_000, (worker(0, 8),)), Look(5.0, 10_000, (worker(1, 8),))]
    assert hint(looks, within=1.0, at_least=1, at_most=20).processes == 20
    assert hint([Look(0.0, 0, ()), Look(5.0, 0, ())], within=1.0, at_least=2, at_most=20).processes == 2


def test_the_command_prints_the_number_alone(make_fleet):
    """A platform's script takes standard output as it is; real workers hold real messages."""
    fleet = make_fleet()
    fleet.start(supervised=True, processes=1, threads=2)
    for name in "ab":
        fleet.send("hold", name)
    fleet.wait_for("began a")
    options = ["--url", fleet.options["url"], "--namespace", fleet.options["namespace"]]
    command = [sys.executable, "-m", "dramatiq_jetstream.cli", *options, "scale-hint", "--sample", "2"]
    words = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=REPOSITORY)
    assert words.stdout == "1\n"
    assert "2 messages wait or run" in words.stderr
    numbers = subprocess.run(
        [*command, "--json"], capture_output=True, check=True, timeout=60, cwd=REPOSITORY
    )
    assert json.loads(numbers.stdout)["running"] == 1
    for name in "ab":
        fleet.open(name)
