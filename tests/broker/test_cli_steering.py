"""The `fleet` command, seeing and steering: states, attempts, sending, trying again, schedules, watching."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker, audit
from dramatiq_jetstream.cli import main
from dramatiq_jetstream.periodic import Periodic
from tests.broker.conformance.workers import running
from tests.support.polling import eventually

WAIT = 30.0

PROGRAM = """
import dramatiq
from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.periodic import Periodic
broker = JetStreamBroker({url!r}, namespace={namespace!r})
broker.add_middleware(Periodic())
dramatiq.set_broker(broker)
@dramatiq.actor(queue_name="mail", max_retries=0)
def post(address, *, copies=1):
    raise RuntimeError(f"no such address: {{address}} {{copies}}")
@dramatiq.actor(queue_name="mail", cron="0 6 * * *")
def nightly(): ...
"""


class Said:
    """What a command said, and its status."""

    def __init__(self, status: object, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command as it is given."""

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        status: object = 0
        try:
            main(list(arguments))
        except SystemExit as leave:
            status = leave.code
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run


@pytest.fixture
def fleet(run: Run, nats_url: str, namespace: str) -> Run:
    """Run a command in the test's namespace; the options stand behind it."""
    return lambda *arguments: run(*arguments, "--url", nats_url, "--namespace", namespace)


@pytest.fixture
def program(nats_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with two actors, one of them periodic, set up on the server."""
    monkeypatch.chdir(tmp_path)
    before = dramatiq.broker.global_broker
    name = f"program_{namespace}"
    (tmp_path / f"{name}.py").write_text(PROGRAM.format(url=nats_url, namespace=namespace))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(name)
    module.broker.setup()
    yield name
    module.broker.close()
    dramatiq.broker.global_broker = before


def broker_of(program: str) -> JetStreamBroker:
    found: JetStreamBroker = sys.modules[program].broker
    found.connection.reopen()  # a command that used it has closed it
    return found


def test_alone_it_prints_help(run: Run) -> None:
    """And ends well; so do --help and --version."""
    for arguments in ((), ("--help",), ("--version",), ("history", "--help")):
        said = run(*arguments)
        assert said.status == 0
        assert said.out
    assert "--namespace" in run("history", "--help").out


def test_options_before_and_after_the_command(
    run: Run, program: str, nats_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from the environment, or the program; what stands later counts."""
    shared = ("--url", nats_url, "--namespace", namespace, "--json")
    before = run(*shared, "queues")
    after = run("queues", *shared)
    assert before.json == after.json
    assert [queue["queue"] for queue in before.json] == ["mail"]
    assert run("--namespace", "elsewhere", "queues", *shared).json == before.json
    assert run("queues", "--broker", program, "--json").json == before.json
    monkeypatch.setenv("FLEET_NAMESPACE", namespace)
    monkeypatch.setenv("NATS_URL", nats_url)
    assert run("queues", "--json").json == before.json
    assert run("--namespace", "elsewhere", "queues", "--json").json == []
    assert run("--namespace", "", "queues").status == 2


def test_send_status_history_and_retry(fleet: Run, run: Run, program: str) -> None:
    """A message from the terminal, what became of it, and another try."""
    sent = run("send", "post", '{"address": "nowhere", "copies": 2}', "--broker", program, "--json").json
    assert sent["queue"] == "mail"
    message_id = sent["message_id"]
    assert fleet("status", message_id, "--json").json["state"] == "waiting"
    with running(broker_of(program), queues={"mail"}):
        eventually(lambda: fleet("status", message_id, "--json").json["state"] == "dead", timeout=WAIT)
        eventually(lambda: fleet("history", "--actor", "post", "--json").json, timeout=WAIT)
    (attempt,) = fleet("history", "--outcome", "failed", "--error", "no such", "--since", "1h", "--json").json
    assert (attempt["message_id"], attempt["arguments"]) == (message_id, "address='nowhere', copies=2")
    shown = fleet("status", message_id).out
    assert "RuntimeError: no such address: nowhere 2" in shown
    assert "Traceback" in shown
    (letter,) = fleet("dead", "list", "--json").json
    assert fleet("dead", "show", letter["id"], "--json").json["attempts"][0]["message_id"] == message_id
    assert fleet("retry", message_id, "--json").json == {"retried": {message_id: "replayed"}}
    assert fleet("status", message_id, "--json").json["state"] == "waiting"
    assert fleet("retry", message_id).status == 1
    assert fleet("status", "nothing", "--json").json["state"] == "unknown"


def test_send_with_any_arguments(fleet: Run, run: Run, program: str) -> None:
    """A list, one value, nothing; a delay; another queue without a program. What is wrong is one line."""
    for given, args in (('["a", 1]', ["a", 1]), ('"text"', ["text"]), (None, [])):
        arguments = ["post", *([given] if given else [])]
        sent = run("send", *arguments, "--broker", program, "--json").json
        broker = broker_of(program)
        assert broker.status(sent["message_id"]).state == "waiting"
        stored = broker.stream(broker.names.queue_stream("mail")).last(broker.names.task("mail"))
        assert stored is not None
        assert json.loads(stored.data)["args"] == args
    later = run("send", "post", "--delay", "3600000", "--broker", program, "--json").json
    broker = broker_of(program)
    assert broker.status(later["message_id"]).state == "delayed"
    assert fleet("retry", later["message_id"], "--json").json["retried"]
    eventually(lambda: broker.status(later["message_id"]).state == "waiting", timeout=WAIT)
    assert fleet("send", "any", "--queue", "mail").status == 0
    for wrong, status, text in (
        (("send", "post", "{", "--broker", program), 2, "not JSON"),
        (("send", "pots", "--broker", program), 1, "it has: nightly, post"),
        (("send", "post"), 2, "--queue"),
        (("send", "post", "--queue", "mial"), 1, "there are: mail"),
    ):
        said = run(*wrong) if "--broker" in wrong else fleet(*wrong)
        assert (said.status, text in said.err) == (status, True), said.err


def test_a_typo_in_a_filter_is_an_error(fleet: Run, program: str) -> None:
    """It never looks like an empty list."""
    for wrong in (
        ("history", "--actor", "pots"),
        ("history", "--queue", "mial"),
        ("history", "--outcome", "faild"),
        ("history", "--since", "yesterday"),
        ("history", "--cursor", "x"),
        ("dead", "list", "--queue", "mial"),
        ("dead", "replay", "--all", "--actor", "pots"),
        ("dead", "list", "--reason", "none"),
        ("delayed", "list", "--queue", "mial"),
        ("history", "--cursor", "9" * 30),
        ("dead", "list", "--after", "9" * 30),
        ("dead", "show", "²"),
        ("dead", "drop", "9" * 30),
        ("dead", "show", "0"),
        ("send", "", "[]", "--queue", "mail"),
        ("dead", "replay", "-x"),
    ):
        said = fleet(*wrong)
        assert said.status in (1, 2), wrong
        assert said.err.startswith("fleet: "), wrong
        assert "JetStream refused" not in said.err, wrong


def test_lists_that_are_cut_say_so_and_go_on(fleet: Run, program: str) -> None:
    """History by a cursor, dead letters by an id."""
    broker = broker_of(program)
    post = broker.get_actor("post")
    with running(broker, queues={"mail"}):
        broker.enqueue_many([post.message(str(number)) for number in range(5)])
        eventually(lambda: len(fleet("history", "--json").json) == 5, timeout=WAIT)
        eventually(lambda: broker.dead_letters.count() == 5, timeout=WAIT)
    for command, option in ((("history",), "--cursor"), (("dead", "list"), "--after")):
        seen: list[Any] = []
        more: list[str] = []
        while True:
            said = fleet(*command, "--limit", "2", "--json", *more)
            seen += [entry["message_id"] for entry in said.json]
            if option not in said.err:
                break
            more = said.err.split(option)[1].split()
            more.insert(0, option)
        assert len(set(seen)) == len(seen) == 5
    for name in ("a", "b"):
        broker.enqueue(post.message(name), delay=3_600_000)
    assert "more than 1 on mail" in fleet("delayed", "list", "--limit", "1").err


def test_any_text_of_an_error_is_shown_as_it_is(fleet: Run, program: str) -> None:
    """No error, log line or argument is taken for markup, and none steers the terminal."""
    broker = broker_of(program)
    address = "[/b] [red]x[/red] [mail] :bug: \x1b[2J\x07 \u202e"
    shown = "[/b] [red]x[/red] [mail] :bug: \\x1b[2J\\x07 \\u202e"
    with running(broker, queues={"mail"}):
        sent = broker.enqueue(broker.get_actor("post").message(address))
        eventually(lambda: broker.status(sent.message_id).letter, timeout=WAIT)
    letter = broker.status(sent.message_id).letter or ""
    for command in (
        ("history",),
        ("status", sent.message_id),
        ("dead", "list"),
        ("dead", "show", letter),
    ):
        said = fleet(*command)
        assert (said.status, said.err) == (0, ""), (command, said.err)
        assert shown in said.out, (command, said.out)
        assert "\x1b" not in said.out, command


def test_schedules_are_run_paused_and_resumed(fleet: Run, program: str) -> None:
    """By the name of the actor."""
    run_now = fleet("run-now", "nightly", "--json").json
    assert broker_of(program).status(run_now["message_id"]).state == "waiting"
    assert fleet("pause-schedule", "nightly", "--json").json["paused"]
    assert fleet("schedules", "--json").json[0]["paused"]
    assert "paused" in fleet("schedules").out
    assert not fleet("resume-schedule", "nightly", "--json").json["paused"]
    assert not fleet("schedules", "--json").json[0]["paused"]
    assert "there are: nightly" in fleet("run-now", "nightyl").err


def test_removing_asks_first(
    fleet: Run, program: str, nats_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a yes nothing is removed."""
    other = JetStreamBroker(nats_url, namespace=namespace)
    other.add_middleware(Periodic())
    dramatiq.actor(lambda: None, actor_name="gone", broker=other, queue_name="mail", every=3_600_000)
    other.setup()
    other.close()
    broker_of(program).get_actor("post").send("a")
    later = broker_of(program).get_actor("post").send_with_options(args=("b",), delay=3_600_000)
    for command in (
        ("schedules", "--remove-orphans", "--broker", program),
        ("purge", "mail"),
        ("delayed", "cancel", later.message_id),
    ):
        line = [sys.executable, "-m", "dramatiq_jetstream.cli", *command]
        environment = {**os.environ, "NATS_URL": nats_url, "FLEET_NAMESPACE": namespace}
        done = subprocess.run(
            line, env=environment, input="n\n", capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 130, done.stderr
        assert "for good?" in done.stderr
    assert {entry["actor"] for entry in fleet("schedules", "--json").json} == {"gone", "nightly"}
    stats = broker_of(program).queue_stats("mail")
    assert (stats.ready, stats.delayed) == (1, 1)


def test_abort_of_what_is_not_there_is_an_error(fleet: Run, program: str) -> None:
    """No signal is left for it."""
    said = fleet("abort", "nothing")
    assert (said.status, "no message nothing" in said.err) == (1, True)


def test_a_module_without_a_broker_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: str
) -> None:
    """It says what is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    name = f"empty_{namespace}"
    (tmp_path / f"{name}.py").write_text("")
    said = run("setup", name)
    assert said.status == 1
    assert said.err.startswith("fleet: ")
    assert "sets no broker" in said.err


def test_watching_prints_an_object_a_line(program: str, nats_url: str, namespace: str) -> None:
    """Until Ctrl-C; a followed history shows what ends meanwhile."""
    broker = broker_of(program)
    environment = {**os.environ, "NATS_URL": nats_url, "FLEET_NAMESPACE": namespace}

    def start(*command: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "dramatiq_jetstream.cli", *command, "--watch", "--json"]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)

    watching, following = start("queues"), start("history")
    try:
        assert watching.stdout is not None
        assert following.stdout is not None
        for _ in range(2):
            assert json.loads(watching.stdout.readline())["queue"] == "mail"
        with running(broker, queues={"mail"}):
            for _ in range(3):
                message = broker.get_actor("post").send("a")
                assert json.loads(following.stdout.readline())["message_id"] == message.message_id
        watching.send_signal(signal.SIGINT)
        assert watching.wait(WAIT) == 130
    finally:
        for process in (watching, following):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_names_are_completed(program: str, nats_url: str, namespace: str) -> None:
    """Of queues, and of the actors of the program; without a server, nothing is printed and nothing breaks."""

    def complete(line: str, url: str = nats_url) -> list[str]:
        words = line.split(" ")
        environment = {
            **os.environ,
            "NATS_URL": url,
            "FLEET_NAMESPACE": namespace,
            "_FLEET_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", "from dramatiq_jetstream.cli import main; main([])"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.stdout.split()

    assert complete("fleet pause ") == ["plain,mail"]
    assert complete(f"fleet --broker {program} send po") == ["plain,post"]
    assert "plain,history" in complete("fleet hi")
    assert complete("fleet pause ", "nats://127.0.0.1:1") == []


def test_doctor_finds_messages_that_dead_workers_hold(fleet: Run, program: str) -> None:
    """In flight, and no worker is alive."""
    broker = broker_of(program)
    broker.get_actor("post").send("a")
    lost = broker.consume("mail", prefetch=1, timeout=5_000)
    assert next(lost) is not None
    lost.stop_pulling()

    def found() -> Any:
        checks = {f["check"]: f for f in fleet("doctor", "--json").json}
        return "no worker of this queue is alive" in checks["queue mail"]["detail"]

    eventually(found, timeout=WAIT)
    lost.close()


def test_rows_are_not_folded_where_a_program_reads_them(fleet: Run, program: str) -> None:
    """One row is one line, whatever its length."""
    broker = broker_of(program)
    with running(broker, queues={"mail"}):
        message = broker.get_actor("post").send("x" * 100)
        eventually(lambda: fleet("history", "--json").json, timeout=WAIT)
    (line,) = [each for each in fleet("history").out.splitlines() if message.message_id in each]
    assert "RuntimeError: no such address: xxxx" in line


def test_changes_are_in_the_audit(fleet: Run, run: Run, program: str) -> None:
    """Each command that changes something records who did it, on which machine, and how much; others do not."""
    broker = broker_of(program)
    looking = ("queues", "workers", "running", "schedules", "history")
    assert [command for command in looking if fleet(command).status] == []
    assert audit.changes(broker) == []
    letter, later = (
        broker.get_actor("post").send("a"),
        broker.get_actor("post").send_with_options(args=("b",), delay=10**7),
    )
    with running(broker, queues={"mail"}):
        eventually(lambda: broker.dead_letters.count() == 1, timeout=WAIT)
    sent = run("send", "post", '["c"]', "--broker", program, "--json").json["message_id"]
    for command in (
        ("pause", "mail"),
        ("resume", "mail"),
        ("retry", letter.message_id),
        ("delayed", "run", later.message_id),
        ("run-now", "nightly"),
        ("pause-schedule", "nightly"),
        ("resume-schedule", "nightly"),
        ("purge", "mail", "--yes"),
        ("remove", "queue", "mail", "--yes"),
    ):
        assert fleet(*command).status == 0, command
    assert fleet("delayed", "cancel", "nothing", "--yes").status == 1
    broker_of(program)
    assert run("setup", program, "--update").status == 0
    broker = broker_of(program)
    found = audit.changes(broker)[::-1]
    assert [(one.what, one.target, one.done) for one in found] == [
        ("send", f"message {sent} of post on queue mail", 1),
        ("pause", "queue mail", 1),
        ("resume", "queue mail", 1),
        ("retry", f"message {letter.message_id}", 1),
        ("run", f"message {later.message_id}", 1),
        ("run-schedule", "schedule of nightly on queue mail", 1),
        ("pause-schedule", "schedule of nightly on queue mail", 1),
        ("resume-schedule", "schedule of nightly on queue mail", 1),
        ("purge", "queue mail", 4),
        ("remove", "queue mail", 1),
        ("cancel", "message nothing", 0),
        ("setup", program, 0),
    ]
    said = {(one.who, one.via, one.host, one.outcome) for one in found}
    assert said == {(getpass.getuser(), "command", socket.gethostname(), "finished")}
