"""`fleet work` with real processes: replacement, handing on, recycling, reloading, stopping, probes, errors."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.polling import eventually, holds
from tests.support.ports import free_port
from tests.support.processes import WORKER_READY, supervised_workers

#: Far longer than a handed-on message needs, far shorter than `ack_wait`, after which it would come again anyway.
SOON = 60.0


def runner(fleet, name):
    """The process in which the `hold` of that name began last."""
    began = [
        line.split() for line in fleet.runs.read_text().splitlines() if line.startswith(f"began {name} ")
    ]
    return int(began[-1][2]) if began else None


def began(fleet, name):
    return fleet.counts()[f"began {name}"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_what_a_killed_worker_ran_begins_elsewhere_at_once(make_fleet, number):
    """Its message does not wait for `ack_wait`, and its neighbour's is left alone."""
    fleet = make_fleet(ack_wait=120_000)
    workers = fleet.start(supervised=True, processes=2, threads=1)
    fleet.send("hold", "a")
    victim = eventually(lambda: runner(fleet, "a"))
    # The victim fetches one of these ahead at most, so another worker runs the other.
    fleet.send("hold", "b")
    fleet.send("hold", "c")
    neighbour = eventually(
        lambda: next((name for name in "bc" if runner(fleet, name) not in (None, victim)), None)
    )
    os.kill(victim, number)
    eventually(lambda: workers.output.count("died: killed by") == 1)
    # The one that is left may have fetched "a" behind either of these.
    fleet.open("b")
    fleet.open("c")
    eventually(lambda: began(fleet, "a") == 2, timeout=SOON)
    assert runner(fleet, "a") != victim
    for name in "abc":
        fleet.open(name)
    fleet.broker.join("default", timeout=60_000)
    assert began(fleet, neighbour) == 1
    workers.wait_for_output(WORKER_READY, count=3)
    assert workers.running


def test_a_worker_that_leaves_is_replaced_alone(make_fleet):
    """`os._exit` in an actor takes one process; the others stay, and the fleet is complete again."""
    fleet = make_fleet(max_deliveries=1)
    workers = fleet.start(supervised=True, processes=2, threads=1)
    before = set(workers.children())
    fleet.send("die", "x")
    workers.wait_for_output(WORKER_READY, count=3)
    after = eventually(lambda: len(workers.children()) == 2 and set(workers.children()))
    assert len(before & after) == 1


def test_the_messages_that_were_not_begun_are_handed_on_too(make_fleet):
    """A worker fetches ahead; what it had not begun runs elsewhere at once, and is no nearer to a dead letter."""
    fleet = make_fleet(ack_wait=120_000)
    first = fleet.start(supervised=True, processes=1, threads=1)
    for name in "abc":
        fleet.send("hold", name)
    eventually(lambda: runner(fleet, "a"))
    second = fleet.start(supervised=True, processes=1, threads=2)
    os.kill(first.children()[0], signal.SIGKILL)
    for name in "abc":
        fleet.open(name)
    fleet.broker.join("default", timeout=60_000)
    assert {began(fleet, name) for name in "bc"} == {1}
    assert second.running


def test_a_program_that_does_not_import_is_one_error(tmp_path):
    """No loop, one sentence, the exit status of the `dramatiq` command."""
    process = supervised_workers("no_such_program", log=tmp_path / "log", processes=3).start()
    assert process.wait() == 2
    assert process.output.count("there is no module 'no_such_program' here") == 1
    assert "Traceback" not in process.output


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("", "sets no broker"),
        ("import dramatiq\n@dramatiq.actor\ndef work(): pass\n", "uses a RabbitmqBroker|sets no broker"),
    ],
)
def test_a_program_without_a_broker_is_one_error(tmp_path, source, why):
    """Whether Dramatiq finds its default, RabbitMQ, or not: what to do is said, without a traceback."""
    (tmp_path / "brokerless.py").write_text(source)
    process = supervised_workers("brokerless", log=tmp_path / "log", arguments=["-P", str(tmp_path)]).start()
    assert process.wait(timeout=60) == 2
    assert re.search(f"({why}).*: call dramatiq.set_broker", process.output)
    assert "Traceback" not in process.output


def test_a_program_that_raises_shows_its_own_traceback_once(tmp_path):
    """What the program raises is shown, because it is the program's to mend."""
    (tmp_path / "broken_program.py").write_text("1 / 0\n")
    process = supervised_workers(
        "broken_program", log=tmp_path / "log", arguments=["-P", str(tmp_path)]
    ).start()
    assert process.wait() == 2
    assert process.output.count("ZeroDivisionError") == 1


def test_a_crash_loop_ends_the_fleet_with_the_last_words(tmp_path):
    """Workers that die before they are ready are tried again a few times, with growing pauses."""
    (tmp_path / "dying_program.py").write_text(
        "import os, sys\nprint('my last words', flush=True)\nos._exit(7)\n"
    )
    process = supervised_workers(
        "dying_program", log=tmp_path / "log", arguments=["-P", str(tmp_path)]
    ).start()
    assert process.wait(timeout=60) == 1
    assert "5 workers in a row died before they were ready; the last (exit status 7) said:" in process.output
    assert process.output.rstrip().endswith("my last words")


def test_reloading_leaves_no_gap(make_fleet):
    """New workers are ready before the old ones finish; what runs is not cut off."""
    fleet = make_fleet()
    workers = fleet.start(supervised=True, processes=2, threads=1)
    old = set(workers.children())
    fleet.send("hold", "a")
    eventually(lambda: runner(fleet, "a"))
    workers.send_signal(signal.SIGHUP)
    workers.wait_for_output(WORKER_READY, count=4)
    fleet.send("mark", "m")
    fleet.wait_for("ran m")
    assert runner(fleet, "a") in workers.children()
    fleet.open("a")
    fleet.wait_for("ended a")
    eventually(lambda: len(workers.children()) == 2 and not old & set(workers.children()))
    assert began(fleet, "a") == 1


def test_a_worker_is_replaced_after_its_tasks(make_fleet):
    """One after the other, the successor first; nothing is lost and nothing runs twice."""
    fleet = make_fleet()
    workers = fleet.start("--max-tasks", "20", supervised=True, processes=2, threads=2)
    sent = []

    def both_were_replaced():
        for _ in range(20):
            sent.append(fleet.send("mark", f"m{len(sent)}"))
        return all(f"Worker {number} (PID" in workers.output for number in (0, 1))

    eventually(both_were_replaced, timeout=120, interval=0.5)
    fleet.broker.join("default", timeout=60_000)
    assert set(fleet.counts().values()) == {1}
    assert len(fleet.counts()) == len(sent)


def test_a_quiet_fleet_takes_nothing_more(make_fleet):
    """What runs goes on, what waits stays on the server for others; also after a reload."""
    fleet = make_fleet()
    workers = fleet.start(supervised=True, processes=1, threads=1)
    fleet.send("hold", "a")
    eventually(lambda: runner(fleet, "a"))
    workers.send_signal(signal.SIGUSR1)
    workers.wait_for_output("Taking nothing more")
    fleet.send("mark", "m")
    fleet.open("a")
    fleet.wait_for("ended a")
    holds(lambda: fleet.counts()["ran m"] == 0, 1.0)
    workers.send_signal(signal.SIGHUP)
    workers.wait_for_output(WORKER_READY, count=2)
    holds(lambda: fleet.counts()["ran m"] == 0, 2.0)
    assert workers.running
    other = fleet.start(supervised=True, processes=1, threads=1)
    fleet.wait_for("ran m")
    assert other.running


def test_a_second_signal_returns_what_runs(make_fleet):
    """The first waits for the actor; after the second its message begins elsewhere at once."""
    fleet = make_fleet(ack_wait=120_000)
    workers = fleet.start(supervised=True, processes=1, threads=1)
    fleet.send("hold", "a")
    eventually(lambda: runner(fleet, "a"))
    workers.send_signal(signal.SIGTERM)
    workers.wait_for_output("Stopping worker process")
    assert workers.running
    other = fleet.start(supervised=True, processes=1, threads=1)
    workers.send_signal(signal.SIGTERM)
    workers.wait()
    assert "Stopping now: what runs is returned" in workers.output
    assert "died" not in workers.output
    assert "1 process with 1 thread\n" in workers.output
    eventually(lambda: began(fleet, "a") == 2, timeout=SOON)
    fleet.open("a")
    fleet.wait_for("ended a")
    assert other.running


def test_a_thread_past_its_hard_limit_takes_its_process_along(make_fleet):
    """Its message has a dead letter with the stack of the thread; what ran beside it begins elsewhere at once."""
    fleet = make_fleet(ack_wait=120_000)
    workers = fleet.start(supervised=True, processes=1, threads=2)
    fleet.send("hold", "neighbour")
    eventually(lambda: runner(fleet, "neighbour"))
    fleet.send("block", "stuck")
    eventually(lambda: began(fleet, "neighbour") == 2, timeout=60)
    fleet.open("neighbour")
    (letter,) = eventually(lambda: fleet.broker.dead_letters.list("default"))
    assert (letter.reason, letter.actor) == ("killed after its time limit", "block")
    assert "in block" in letter.error
    fleet.broker.join("default", timeout=60_000)
    assert began(fleet, "stuck") == 1
    assert workers.output.count("outlived its hard time limit") == 1


def test_a_retry_follows_an_attempt_past_its_hard_limit(make_fleet):
    """Also when it let no other thread of its process run, and its message could be fetched by others only then."""
    fleet = make_fleet(ack_wait=120_000)
    workers = fleet.start(supervised=True, processes=2, threads=1)
    fleet.send("backtrack", "x")
    (letter,) = eventually(lambda: fleet.broker.dead_letters.list("default"), timeout=60)
    assert letter.reason == "killed after its time limit"
    assert "in backtrack" in letter.error
    assert began(fleet, "x") == 2
    workers.wait_for_output(WORKER_READY, count=4)
    fleet.broker.join("default", timeout=60_000)


def test_workers_stop_when_their_supervisor_is_killed(make_fleet):
    """kill -9 of the parent leaves no worker behind."""
    fleet = make_fleet()
    workers = fleet.start(supervised=True, processes=2, threads=1)
    children = workers.children()
    os.kill(workers.pid, signal.SIGKILL)

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    eventually(lambda: not any(map(alive, children)))


def test_processes_that_actors_leave_behind_are_reaped(make_fleet):
    """The supervisor inherits them as PID 1 of a container does, and leaves no zombie."""
    adopting = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); os.execv(sys.executable, sys.argv[1:])"
    fleet = make_fleet()
    workers = fleet.start(supervised=True, processes=1, threads=1, wait=False)
    workers.kill()
    # The same command again, as a process that adopts orphans (PR_SET_CHILD_SUBREAPER, which exec keeps).
    workers.command = [workers.command[0], "-c", adopting, *workers.command]
    workers.start().wait_for_output(WORKER_READY)
    fleet.send("orphan", "x")
    (left,) = eventually(
        lambda: re.findall(r"^left (\d+)$", fleet.runs.read_text(), re.MULTILINE), timeout=30
    )
    eventually(lambda: not Path(f"/proc/{left}").exists())
    assert workers.running


def test_the_probes_tell_a_stuck_worker_from_a_busy_one(make_fleet):
    """A worker that runs a long actor is alive; one that is stopped in its tracks is not, after a while."""
    fleet = make_fleet()
    port = free_port()

    def status(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    workers = fleet.start("--http", f"127.0.0.1:{port}", supervised=True, processes=1, threads=1)
    eventually(lambda: status("/health/ready") == 200)
    fleet.send("hold", "a")
    eventually(lambda: runner(fleet, "a"))
    assert status("/health/live") == 200
    head = urllib.request.Request(f"http://127.0.0.1:{port}/health/live", method="HEAD")
    with urllib.request.urlopen(head, timeout=30) as answer:
        assert (answer.status, answer.read()) == (200, b"")
    fleet.send("mark", "m")  # waits for the thread
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    assert re.search(r"^fleet_running 1$", metrics, re.MULTILINE)
    assert re.search(r"^fleet_workers 1$", metrics, re.MULTILINE)
    (child,) = workers.children()
    os.kill(child, signal.SIGSTOP)
    try:
        eventually(lambda: status("/health/live") == 503)
    finally:
        os.kill(child, signal.SIGCONT)
    eventually(lambda: status("/health/live") == 200)
    fleet.open("a")
    fleet.wait_for("ran m")

    def parsed():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}

    eventually(lambda: parsed().get(("fleet_attempts_total", "default", "mark")) == 1)
    samples = parsed()
    assert samples["fleet_attempt_duration_seconds_count", "default", "hold"] == 1
    assert samples["fleet_attempt_duration_seconds_bucket", "+Inf", "default", "hold"] == 1
    assert samples["fleet_attempt_duration_seconds_bucket", "0.005", "default", "hold"] == 0
    assert samples["fleet_attempts_failed_total", "default", "mark"] == 0


def test_wrong_options_are_one_sentence(tmp_path):
    """A wrong size, address or PID file says what to give instead, without a traceback."""
    taken = tmp_path / "pid"
    taken.write_text("not a pid")
    for arguments, sentence in (
        (["--max-memory", "much"], "is not a size: give bytes, such as 512M or 2G"),
        (["--http", "8080"], "is not an address: give HOST:PORT"),
        (["--pid-file", str(taken)], "is not a PID file"),
        (["--log-file", str(tmp_path / "no" / "log")], "cannot be written"),
    ):
        log = tmp_path / f"log{time.monotonic_ns()}"
        process = supervised_workers("tests.broker.fleet_app", log=log, arguments=arguments).start()
        assert process.wait() != 0
        assert sentence in " ".join(process.output.split())
        assert "Traceback" not in process.output
