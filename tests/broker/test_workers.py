"""Presence: live workers say what they are and run, and disappear when they stop or are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import dramatiq
import pytest

from dramatiq_jetstream.worker import presence
from dramatiq_jetstream.workers import list_workers
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


@pytest.fixture
def quick(monkeypatch):
    """Records are written ten times a second and live three seconds."""
    monkeypatch.setattr(presence, "BATCH_SECONDS", 0.1)
    monkeypatch.setattr(presence, "INTERVAL_SECONDS", 1.0)


def only(broker):
    found = list_workers(broker)
    return found[0] if len(found) == 1 else None


def test_a_worker_says_what_it_runs_and_what_it_has_done(broker, quick):
    """The running message with its arguments and attempt; afterwards the counts."""
    go = []

    @dramatiq.actor(max_retries=0)
    def work(name, *, loud):
        while not go:
            time.sleep(0.02)
        raise RuntimeError("as the test wants it")

    with running(broker, threads=2):
        message = work.send("a", loud=True)
        worker = eventually(lambda: (found := only(broker)) and found.running and found)
        (runs,) = worker.running
        assert (runs.message_id, runs.actor, runs.queue, runs.attempt) == (
            message.message_id,
            "work",
            "default",
            1,
        )
        assert runs.arguments == "'a', loud=True"
        assert (worker.pid, worker.threads, worker.queues) == (os.getpid(), 2, ["default"])
        assert worker.rss > 1_000_000
        go.append(True)
        eventually(
            lambda: (found := only(broker)) and (found.done, found.failed) == (1, 1) and not found.running
        )
    eventually(lambda: list_workers(broker) == [])


def test_a_program_decides_what_is_shown_of_arguments(broker, quick):
    """A hook makes the text; one that fails shows its error's type and nothing else."""
    shown = []
    broker.describe_arguments = lambda message: (
        shown.append(1) or ("x" * 300 if message.args == ("long",) else 1 / 0)
    )

    @dramatiq.actor
    def work(name):
        while name not in go:
            time.sleep(0.02)

    go = []
    with running(broker, threads=1):
        for name, text in (("long", "x" * 200), ("broken", "(ZeroDivisionError)")):
            work.send(name)
            eventually(
                lambda text=text: (found := only(broker)) and [r.arguments for r in found.running] == [text]
            )
            go.append(name)


def test_a_worker_with_nothing_to_do_stays_in_sight(broker, quick):
    """Its record is written again before it expires."""
    dramatiq.actor(lambda: None, actor_name="idle")
    with running(broker):
        first = eventually(lambda: only(broker))
        eventually(lambda: (found := only(broker)) and found.at > first.at + 3_500)


def test_a_deleted_bucket_is_made_again(broker, quick):
    """A server that forgot what it had in memory learns it again from the workers."""
    dramatiq.actor(lambda: None, actor_name="idle")
    with running(broker):
        eventually(lambda: only(broker))
        broker.connection.api(f"STREAM.DELETE.KV_{broker.names.bucket('workers')}")
        eventually(lambda: only(broker))


def test_a_killed_worker_is_gone_by_itself(make_fleet):
    """kill -9: its record expires; the command shows the others, and what they run."""
    fleet = make_fleet()
    workers = fleet.start(processes=2, threads=1)
    fleet.send("hold", "a")
    eventually(lambda: sum(len(worker.running) for worker in list_workers(fleet.broker)) == 1)

    def command(*arguments):
        line = [sys.executable, "-m", "dramatiq_jetstream.cli", "--json", *arguments]
        environment = {**os.environ, "NATS_URL": fleet.options["url"]}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    options = ("--namespace", fleet.options["namespace"])
    assert len(command(*options, "workers")) == 2
    (message,) = command(*options, "running")
    assert (message["actor"], message["arguments"]) == ("hold", "'a'")
    victim = message["pid"]
    os.kill(victim, signal.SIGKILL)
    workers.kill()
    eventually(lambda: victim not in [worker.pid for worker in list_workers(fleet.broker)], timeout=60)


def test_what_a_killed_worker_ran_shows_as_redelivered(make_fleet):
    """Another worker runs it, with a second delivery and the same attempt."""
    fleet = make_fleet(ack_wait=2_000)
    first = fleet.start(threads=1)
    message = fleet.send("hold", "a")

    def run_by():
        return {
            worker.pid: running
            for worker in list_workers(fleet.broker)
            for running in worker.running
            if running.message_id == message.message_id
        }

    (victim,) = eventually(run_by)
    os.kill(victim, signal.SIGKILL)
    first.kill()
    fleet.start(threads=1)
    found = eventually(lambda: {pid: running for pid, running in run_by().items() if pid != victim})
    (again,) = found.values()
    assert (again.attempt, again.deliveries) == (1, 2)


def test_an_idle_worker_writes_one_record_an_interval(broker, quick):
    """Whatever else it does, it writes no more."""
    dramatiq.actor(lambda: None, actor_name="idle")
    with running(broker):
        eventually(lambda: only(broker))
        stream = broker.stream(f"KV_{broker.names.bucket('workers')}")
        before, began = stream.range().last, time.monotonic()
        eventually(lambda: stream.range().last - before >= 3)
        written, seconds = stream.range().last - before, time.monotonic() - began
    assert written <= seconds / presence.INTERVAL_SECONDS + 1
