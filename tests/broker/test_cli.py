"""The `fleet` command: what it prints, in words and as JSON, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq_abort import Abortable

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.abort import JetStreamBackend as AbortBackend
from dramatiq_jetstream.cli import main
from dramatiq_jetstream.cli.context import Fleet as Options
from dramatiq_jetstream.events import Events, subscription
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.progress import Progress, progress
from tests.support.polling import eventually, holds
from tests.support.ports import free_port

Fleet = Callable[..., Any]


class Refused(Exception):
    """The command ended with a status other than 0; holds it and what was said."""

    def __init__(self, status: object, said: str) -> None:
        super().__init__(said)
        self.status = status


@pytest.fixture
def fleet(nats_url: str, namespace: str, capsys: pytest.CaptureFixture[str]) -> Fleet:
    """Run a command; returns its JSON if that was asked for, else its words."""

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        status: object = 0
        try:
            main(["--url", nats_url, "--namespace", namespace, *arguments])
        except SystemExit as leave:
            status = leave.code
        said = capsys.readouterr()
        if status:
            raise Refused(status, said.err + said.out)
        return json.loads(said.out) if "--json" in arguments else said.out

    return run


@pytest.fixture
def work(broker: JetStreamBroker) -> dramatiq.Actor[..., Any]:
    """An actor that fails for good when it is told to."""

    @dramatiq.actor(broker=broker, queue_name="mail", max_retries=0)
    def work(value: str) -> None:
        if value == "die":
            raise RuntimeError("no such address")

    return work


@pytest.fixture
def worker(broker: JetStreamBroker, work: dramatiq.Actor[..., Any]) -> Iterator[dramatiq.Worker]:
    """A running worker."""
    running = dramatiq.Worker(broker, worker_threads=2, worker_timeout=100)
    running.start()
    yield running
    running.stop()


def test_an_empty_namespace_says_how_another_is_named(fleet: Fleet, namespace: str) -> None:
    """A newcomer has named none, and looks into one that no program of theirs uses."""
    for command, empty in (("workers", "No worker is alive"), ("queues", "There are no queues")):
        assert fleet(command).strip() == f"{empty} in namespace {namespace!r}."
    assert Options().where == "namespace 'dramatiq' (--namespace or FLEET_NAMESPACE names another)"
    assert Options(program="shop").where == "namespace 'dramatiq'"


def test_queues_shows_every_count(fleet: Fleet, work: dramatiq.Actor[..., Any]) -> None:
    """Queues are read from the server, whichever program declared them."""
    work.send("a")
    work.send("b")
    work.send_with_options(args=("c",), delay=60_000)
    (mail,) = fleet("queues", "--json")
    assert (mail["queue"], mail["ready"], mail["delayed"], mail["dead"]) == ("mail", 2, 1, 0)
    assert mail["oldest_ready_age"] >= 0
    assert "mail" in fleet("queues")


def test_pause_and_resume_hold_for_the_fleet(
    fleet: Fleet, broker: JetStreamBroker, work: dramatiq.Actor[..., Any]
) -> None:
    """A paused queue says so, and delivers nothing until it goes on."""
    work.send("a")
    fleet("pause", "mail")
    assert fleet("queues", "--json")[0]["paused"]
    running = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
    running.start()
    try:
        assert fleet("queues", "--json")[0]["ready"] == 1
        fleet("resume", "mail")
        broker.join("mail", timeout=30_000)
    finally:
        running.stop()
    assert not fleet("queues", "--json")[0]["paused"]


def test_events_that_wait_for_actors_count_and_are_paused(
    fleet: Fleet, broker: JetStreamBroker, namespace: str
) -> None:
    """The command knows no actors; the durables say for which queue they work."""
    broker.add_middleware(Events(f"E{namespace}", [f"E{namespace}.>"]))
    seen: list[bytes] = []
    dramatiq.actor(
        seen.append,
        actor_name="note",
        broker=broker,
        queue_name="mail",
        subscribe=subscription(f"E{namespace}.made"),
    )
    broker.setup()
    broker.publish(f"E{namespace}.made", b"1")
    eventually(lambda: fleet("queues", "--json")[0]["ready"] == 1)
    assert fleet("queues", "--json")[0]["oldest_ready_age"] >= 0
    assert any("no worker" in f["detail"] for f in fleet("doctor", "--json"))
    fleet("pause", "mail")
    running = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
    running.start()
    try:
        holds(lambda: not seen, duration=1)
        fleet("resume", "mail")
        eventually(lambda: seen == [b"1"])
    finally:
        running.stop()


def test_dead_letters_are_listed_shown_replayed_and_dropped(
    fleet: Fleet, broker: JetStreamBroker, work: dramatiq.Actor[..., Any], worker: dramatiq.Worker
) -> None:
    """A replay that fails again is a new letter with the history of the first."""
    message = work.send("die")
    (letter,) = eventually(lambda: fleet("dead", "list", "--json"))
    assert (letter["actor"], letter["reason"]) == ("work", "retries exhausted")
    assert letter["message_id"] == message.message_id
    shown = fleet("dead", "show", letter["id"], "--json")
    assert json.loads(shown["data"])["args"] == ["die"]
    assert "no such address" in fleet("dead", "show", letter["id"])

    def seen() -> bool:
        with pytest.raises(Refused, match=r"no trace of an actor 'wrk'.*seen were: work"):
            fleet("dead", "list", "--actor", "wrk")
        return True

    eventually(seen)  # the worker reports what it ran within a second

    assert fleet("dead", "replay", letter["id"], "--json") == {"replayed": [letter["id"]]}
    (again,) = eventually(lambda: fleet("dead", "list", "--json"))
    assert again["id"] != letter["id"]
    assert [entry["error"] for entry in again["history"]] == [letter["error"]]

    assert fleet("dead", "replay", "--all", "--reason", "undecodable", "--json") == {"replayed": []}
    assert fleet("dead", "drop", "--all", "--yes", "--json") == {"dropped": [again["id"]]}
    assert fleet("dead", "list") == "There are no dead letters.\n"


def test_delayed_messages_are_listed_and_cancelled(fleet: Fleet, work: dramatiq.Actor[..., Any]) -> None:
    """A message that is not there (any more) is an error."""
    message = work.send_with_options(args=("later",), delay=60_000)
    (delayed,) = fleet("delayed", "list", "--json")
    assert (delayed["message_id"], delayed["queue"]) == (message.message_id, "mail")
    assert delayed["eta"] == message.options["eta"]
    assert delayed["actor"] == "work"
    other = work.send_with_options(args=("now",), delay=60_000)
    assert fleet("delayed", "run", other.message_id, "--json") == {"run": {other.message_id: 1}}
    eventually(lambda: len(fleet("delayed", "list", "--json")) == 1)
    fleet("delayed", "cancel", message.message_id, "--yes")
    assert fleet("delayed", "list", "--json") == []
    with pytest.raises(Refused, match="not delayed") as refused:
        fleet("delayed", "cancel", message.message_id, "--yes")
    assert refused.value.status == 1


def test_purge_drops_what_was_asked_for(fleet: Fleet, work: dramatiq.Actor[..., Any]) -> None:
    """Ready and delayed messages are two things."""
    work.send("a")
    work.send_with_options(args=("c",), delay=60_000)
    assert fleet("purge", "mail", "--ready", "--yes", "--json") == {"queue": "mail", "purged": 1}
    assert fleet("queues", "--json")[0]["delayed"] == 1
    assert fleet("purge", "mail", "--yes", "--json")["purged"] == 1


def test_doctor_finds_what_is_wrong(fleet: Fleet, work: dramatiq.Actor[..., Any]) -> None:
    """It names the check, and says how to mend what it found."""
    work.send("a")
    findings = {finding["check"]: finding for finding in fleet("doctor", "--json")}
    assert {"connection", "store", "clock", "storage"} <= set(findings)
    assert findings["connection"]["status"] == "ok"
    assert findings["queue mail"]["status"] == "warning"
    assert "no worker" in findings["queue mail"]["detail"]
    assert findings["queue mail"]["advice"]


def test_doctor_compares_every_setting(
    fleet: Fleet, work: dramatiq.Actor[..., Any], broker: JetStreamBroker
) -> None:
    """What an operator changed on a queue, its consumer, a bucket or the dead letters is found, and what else pulls."""
    broker.bucket("limits").put("k", b"v")
    work.send("a")
    assert {f["status"] for f in fleet("doctor", "--json") if f["check"] == "settings"} == {"ok"}
    api, names = broker.connection.api, broker.names
    stream, dead, bucket = names.queue_stream("mail"), names.dead_stream, broker.bucket("limits").stream
    for name, settings in ((stream, {"max_msgs": 10}), (bucket, {"max_msgs": 10, "deny_purge": False})):
        api(f"STREAM.UPDATE.{name}", {**api(f"STREAM.INFO.{name}")["config"], **settings})
    config = api(f"CONSUMER.INFO.{stream}.worker")["config"] | {"headers_only": True}
    create = f"CONSUMER.CREATE.{stream}.worker.{config['filter_subject']}"
    api(create, {"stream_name": stream, "config": config, "action": "update"})
    subject = names.all_delayed("mail")
    thief = {"name": "thief", "durable_name": "thief", "ack_policy": "explicit", "filter_subject": subject}
    api(
        f"CONSUMER.CREATE.{stream}.thief.{subject}",
        {"stream_name": stream, "config": thief, "action": "create"},
    )
    with pytest.raises(Refused) as failed:
        fleet("doctor", "--json")
    findings = {finding["check"]: finding for finding in json.loads(str(failed.value))}
    assert findings[f"stream {stream}"]["status"] == "failure"
    assert "max_msgs is 10" in findings[f"stream {stream}"]["detail"]
    assert "--update" in findings[f"stream {stream}"]["advice"]
    assert findings[f"stream {bucket}"]["status"] == "warning"  # it refuses to store and loses nothing
    assert "headers_only is True" in findings[f"consumer worker of stream {stream}"]["detail"]
    assert findings[f"consumer thief of stream {stream}"]["status"] == "failure"
    assert f"stream {dead}" not in findings
    assert "settings" not in findings


def test_doctor_finds_a_priority_that_no_worker_serves(fleet: Fleet, nats_url: str, namespace: str) -> None:
    """After `max_priority` was lowered, say: workers ask for what is below, and none for what is above."""
    broker = JetStreamBroker(nats_url, namespace=namespace, max_priority=3)
    broker.declare_queue("mail")
    broker.setup()
    broker.enqueue(dramatiq.Message("mail", "x", (), {}, {"broker_priority": 3}))
    connection = broker.connection
    subscription = connection.subscribe(connection.new_inbox(), lambda message: None)
    pull = f"$JS.API.CONSUMER.MSG.NEXT.{broker.names.queue_stream('mail')}.worker"
    connection.send(pull, b'{"batch": 1, "expires": 20000000000}', reply=subscription.subject)

    def found() -> bool:
        try:
            fleet("doctor", "--json")
        except Refused as failed:
            return "1 messages of priority 3 wait and no worker asks for that level" in str(failed)
        return False

    eventually(found)
    broker.close()


def test_setup_prepares_what_a_module_declares(
    fleet: Fleet, nats_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doing it twice changes nothing; a difference is reported, and --update brings it in line."""
    monkeypatch.chdir(tmp_path)
    source = (
        "import dramatiq\nfrom dramatiq_jetstream import JetStreamBroker\n"
        "dramatiq.set_broker(JetStreamBroker({url!r}, namespace={namespace!r}, ack_wait={wait}, declare=False))\n"
        "@dramatiq.actor(queue_name='jobs')\ndef job(): ...\n"
    )

    def program(wait: int) -> str:
        name = f"program_{namespace}_{wait}"
        text = source.format(url=nats_url, namespace=namespace, wait=wait)
        (tmp_path / f"{name}.py").write_text(text)
        return name

    first = fleet("setup", program(30_000), "--json")
    assert set(first.values()) == {"created"}
    again = subprocess.run(
        [sys.executable, "-m", "dramatiq_jetstream.cli", "setup", program(30_000)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "created" not in again.stdout
    with pytest.raises(Refused, match="--update"):
        fleet("setup", program(45_000))
    assert "updated" in fleet("setup", program(60_000), "--update", "--json").values()
    for option, other in (("--url", "nats://127.0.0.1:1"), ("--namespace", "elsewhere")):
        with pytest.raises(Refused, match=f"whatever {option} says"):
            fleet(option, other, "setup", program(60_000))


def test_schedules_are_listed_and_orphans_removed(
    fleet: Fleet, nats_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a program can say which schedules are orphans, so the command asks for one."""
    monkeypatch.chdir(tmp_path)
    periodic = JetStreamBroker(nats_url, namespace=namespace)
    periodic.add_middleware(Periodic())
    dramatiq.actor(lambda: None, actor_name="old", broker=periodic, every=60_000)
    dramatiq.actor(
        lambda: None, actor_name="kept", broker=periodic, cron="0 6 * * *", timezone="Europe/Berlin"
    )
    periodic.setup()
    periodic.close()
    listed = {entry["actor"]: entry for entry in fleet("schedules", "--json")}
    assert listed["kept"]["schedule"] == "0 0 6 * * *"
    assert listed["kept"]["next_tick"] > 0
    assert "orphan" not in listed["old"]
    with pytest.raises(Refused, match="--module"):
        fleet("schedules", "--remove-orphans")
    name = f"periodic_{namespace}"
    (tmp_path / f"{name}.py").write_text(
        "import dramatiq\nfrom dramatiq_jetstream import JetStreamBroker\n"
        "from dramatiq_jetstream.periodic import Periodic\n"
        f"broker = JetStreamBroker({nats_url!r}, namespace={namespace!r})\n"
        "broker.add_middleware(Periodic())\ndramatiq.set_broker(broker)\n"
        "@dramatiq.actor(cron='0 6 * * *', timezone='Europe/Berlin')\ndef kept(): ...\n"
    )
    outcome = fleet("schedules", "--module", name, "--remove-orphans", "--yes", "--json")
    assert outcome["removed"] == ["old"]
    assert [entry["actor"] for entry in fleet("schedules", "--json")] == ["kept"]


def test_a_running_message_shows_its_progress_and_is_aborted(fleet: Fleet, broker: JetStreamBroker) -> None:
    """From any process, by the message's id."""
    broker.add_middleware(Progress())
    broker.add_middleware(Abortable(backend=AbortBackend(broker)))
    ended = threading.Event()

    @dramatiq.actor(broker=broker, max_retries=0)
    def endless() -> None:
        try:
            while True:
                progress(1, 4, "working")
                time.sleep(0.02)
        finally:
            ended.set()

    running = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
    running.start()
    try:
        message = endless.send()
        with pytest.raises(Refused, match="said nothing"):
            fleet("progress", "nobody")

        def seen() -> Any:
            try:
                return fleet("progress", message.message_id, "--json")
            except Refused:
                return None

        assert eventually(seen)["note"] == "working"
        assert "1 of 4 (25%) working" in fleet("progress", message.message_id)
        assert not ended.is_set()
        fleet("abort", message.message_id)
        assert ended.wait(15)
    finally:
        running.stop()


def test_what_is_wrong_is_one_line_and_a_status(fleet: Fleet) -> None:
    """1 for what the server said, 2 for what was asked wrongly; never a traceback."""
    with pytest.raises(Refused, match="there is no queue 'nope'") as refused:
        fleet("pause", "nope")
    assert refused.value.status == 1
    with pytest.raises(Refused, match="there is no module 'nowhere_at_all'"):
        fleet("setup", "nowhere_at_all")
    with pytest.raises(Refused, match="name the ids of dead letters") as refused:
        fleet("dead", "replay")
    assert refused.value.status == 2
    with pytest.raises(Refused, match="Could not connect to NATS") as refused:
        fleet("--url", f"nats://127.0.0.1:{free_port()}", "queues")
    assert refused.value.status == 1
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "nowhere.settings",
            "DJANGO_SETTINGS_MODULE names 'nowhere.settings', and there is no module 'nowhere' here",
        ),
        (
            "json.settings",
            "DJANGO_SETTINGS_MODULE names 'json.settings', and there is no module 'json.settings' here",
        ),
        ("", "'django_dramatiq.setup' cannot be set up: Requested setting"),
    ],
)
def test_settings_that_django_cannot_use_are_one_sentence(settings: str, said: str, tmp_path: Path) -> None:
    """The commands name the variable that is wrong."""
    command = [sys.executable, "-m", "dramatiq_jetstream.cli", "setup", "django_dramatiq.setup"]
    variables = {**os.environ, "DJANGO_SETTINGS_MODULE": settings}
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"fleet: {said}"), done.stderr
    assert "Traceback" not in done.stderr


def test_server_runs_a_real_server_and_keeps_its_data(tmp_path: Path) -> None:
    """Ctrl-C ends it; started again it has what it had."""
    port = str(free_port())
    command = [sys.executable, "-m", "dramatiq_jetstream.cli", "server", "--port", port]
    command += ["--store-dir", str(tmp_path / "store")]
    broker = JetStreamBroker(f"nats://127.0.0.1:{port}")
    for expected in (0, 1):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        try:
            assert process.stdout is not None
            assert f":{port}" in process.stdout.readline()
            broker.declare_queue("default")
            broker.setup()
            eventually(lambda expected=expected: broker.queue_stats("default").ready == expected)
            broker.enqueue(dramatiq.Message("default", "x", (), {}, {}))
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    broker.close()
