"""Every kind of call in every state of the connection: sent before its deadline, or never.

A call that was not sent says `NotSent` within its time, and has no effect when the connection is well again. Only one
whose bytes left the process may say that it is not known what became of it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import BrokerConnectionError, BrokerError, NotSent, StoreTimeout
from dramatiq_jetstream.jetstream.reading import message_at
from dramatiq_jetstream.wire import outbox
from dramatiq_jetstream.wire.connection import Connection, Publication
from dramatiq_jetstream.wire.ids import new_id
from tests.support.polling import eventually, holds
from tests.support.processes import python
from tests.support.proxy import Proxy

TIMEOUT_MS = 600

#: When an error is too late, in seconds: what waits for a sign of life (6 s) or for the default (10 s) is later.
LATE_SECONDS = 5.0


@dataclass
class Scene:
    """A broker behind a proxy with a queue and a bucket, and another one that the proxy does not concern."""

    broker: JetStreamBroker
    proxy: Proxy
    witness: JetStreamBroker

    @property
    def connection(self) -> Connection:
        return self.broker.connection

    @property
    def subject(self) -> str:
        return self.broker.names.task("default")

    @property
    def stream(self) -> str:
        return self.broker.names.queue_stream("default")

    def first_sequence(self) -> int:
        """Streams do not begin at 1: their first sequence is the time when they were made."""
        return int(self.witness.connection.api(f"STREAM.INFO.{self.stream}")["state"]["first_seq"])

    def publication(self, body: bytes = b"new") -> Publication:
        return Publication(self.subject, body, {"Nats-Msg-Id": new_id()})

    def effects(self) -> tuple[Any, ...]:
        """What the calls below change, as the server has it."""
        entry = self.witness.bucket("things").get("key")
        state = self.witness.connection.api(f"STREAM.INFO.{self.stream}")["state"]
        return entry and (entry.value, entry.revision), state["messages"], state["last_seq"]


@pytest.fixture
def scene(make_broker, proxy) -> Scene:
    witness = make_broker()
    witness.declare_queue("default")
    witness.setup()
    witness.bucket("things").put("key", b"old")
    scene = Scene(make_broker(proxy.url, declare=False, enqueue_timeout=TIMEOUT_MS), proxy, witness)
    witness.connection.publish(scene.subject, b"kept")
    scene.broker.declare_queue("default")
    return scene


def atomic_batch(scene: Scene) -> None:
    batch = new_id()
    items = []
    for number in (1, 2, 3):
        item = scene.publication()
        item.headers = {**(item.headers or {}), "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
        items.append(item)
    items[-1].headers = {**items[-1].headers, "Nats-Batch-Commit": "1"}
    scene.connection.publish_batch(items, timeout=TIMEOUT_MS)


def update_all(scene: Scene) -> None:
    scene.broker.bucket("things").update_all({"key": (b"new", 1)})


CALLS: dict[str, Callable[[Scene], object]] = {
    "publish": lambda s: s.connection.publish(
        s.subject, b"new", {"Nats-Msg-Id": new_id()}, timeout=TIMEOUT_MS
    ),
    "publish_many": lambda s: s.connection.publish_many(
        [s.publication() for _ in range(3)], timeout=TIMEOUT_MS
    ),
    "publish_batch": atomic_batch,
    "enqueue": lambda s: s.broker.enqueue(_message()),
    "enqueue with a delay": lambda s: s.broker.enqueue(_message(), delay=3_600_000),
    "kv put": lambda s: s.broker.bucket("things").put("key", b"new"),
    "kv create": lambda s: s.broker.bucket("things").create("other", b"new"),
    "kv update": lambda s: s.broker.bucket("things").update("key", b"new", revision=1),
    "kv update_all": update_all,
    "kv delete": lambda s: s.broker.bucket("things").delete("key"),
    "purge": lambda s: s.connection.api(f"STREAM.PURGE.{s.stream}", timeout=TIMEOUT_MS),
    "delete of a message": lambda s: s.connection.api(
        f"STREAM.MSG.DELETE.{s.stream}", {"seq": s.first_sequence()}, timeout=TIMEOUT_MS
    ),
    "delete of a stream": lambda s: s.connection.api(f"STREAM.DELETE.{s.stream}", timeout=TIMEOUT_MS),
    "question": lambda s: s.connection.api(f"STREAM.INFO.{s.stream}", timeout=TIMEOUT_MS),
    "flush of a queue": lambda s: s.broker.flush("default"),
    "request": lambda s: s.connection.request(s.subject, b"new", timeout=TIMEOUT_MS),
}


def _message() -> Any:
    from dramatiq import Message

    return Message("default", "work", (), {}, {})


def connected(scene: Scene) -> None:
    scene.connection.connect()


def never_there(scene: Scene) -> None:
    """Nothing listens at the address."""
    scene.proxy.lose()


def never_greets(scene: Scene) -> None:
    """The port accepts and is silent."""
    scene.proxy.hold()


def lost(scene: Scene) -> None:
    connected(scene)
    scene.proxy.lose()
    eventually(lambda: not scene.connection.is_open)


def lost_and_silent(scene: Scene) -> None:
    """Lost, and what listens at the address now does not greet."""
    connected(scene)
    scene.proxy.hold()
    scene.proxy.cut()
    eventually(lambda: not scene.connection.is_open)


def full(scene: Scene) -> None:
    """The socket takes nothing any more, and there is no other way."""
    connected(scene)
    scene.connection._link.lanes._not_before = float("inf")
    scene.proxy.hold()
    filler = [Publication("filler", bytes(500_000)) for _ in range(40)]
    threading.Thread(
        target=scene.connection.try_publish_many, args=(filler,), kwargs={"timeout": 20_000}, daemon=True
    ).start()
    eventually(lambda: scene.connection._link._client.paused)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("state", [never_there, never_greets, lost, lost_and_silent, full])
def test_what_cannot_be_sent_in_time_is_never_sent(scene, state, call):
    """The error comes within the call's time and says so; when all is well again, nothing has changed."""
    before = scene.effects()
    state(scene)
    began = time.monotonic()
    with pytest.raises(NotSent) as caught:
        call(scene)
    assert time.monotonic() - began < LATE_SECONDS
    assert "None" not in str(caught.value)
    scene.proxy.restore()
    scene.proxy.release()
    eventually(lambda: scene.connection.is_connected)
    # A question that goes the way that the others would have gone, behind them.
    scene.connection._link.lanes._not_before = float("inf")
    eventually(lambda: _answers(scene))
    assert scene.effects() == before


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_waits_when_the_connection_is_closed_is_never_sent(scene, call, monkeypatch):
    """It gets its error at once, and does not go out when the broker is used again."""
    before = scene.effects()
    lost(scene)
    scene.connection.timeout = 20_000
    monkeypatch.setattr(f"{__name__}.TIMEOUT_MS", 20_000)
    object.__setattr__(scene.broker.config, "enqueue_timeout", 20_000)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call(scene)
        except BrokerError as error:
            raised.append(error)

    calling = threading.Thread(target=run)
    calling.start()
    eventually(lambda: scene.connection._link.calls._waiting)
    scene.broker.close()
    calling.join(15)  # it would be 20 s
    assert [type(error) for error in raised] == [NotSent]
    scene.proxy.restore()
    scene.connection.reopen()
    assert scene.connection.api("INFO")
    assert scene.effects() == before


def _answers(scene: Scene) -> bool:
    try:
        return bool(scene.connection.api("INFO", timeout=5_000))
    except BrokerConnectionError:
        return False


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_is_not_answered_is_not_known(scene, call):
    """A server that takes everything and answers nothing: the error in time does not claim that nothing was sent."""
    connected(scene)
    scene.proxy.deaf = True
    began = time.monotonic()
    with pytest.raises(BrokerConnectionError) as caught:
        call(scene)
    assert not isinstance(caught.value, NotSent)
    assert time.monotonic() - began < LATE_SECONDS


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("state", [never_there, lost])
def test_a_connection_that_comes_back_in_time_is_enough(scene, state, call, monkeypatch):
    """Whatever the call, an outage shorter than its time is no error; nor is a server that starts after its client."""
    scene.connection.timeout = 20_000
    monkeypatch.setattr(f"{__name__}.TIMEOUT_MS", 20_000)
    object.__setattr__(scene.broker.config, "enqueue_timeout", 20_000)
    state(scene)
    timer = threading.Timer(0.5, scene.proxy.restore)
    timer.start()
    try:
        call(scene)
    finally:
        timer.join()


def test_what_the_socket_did_not_take_in_time_never_leaves(scene):
    """Bytes that wait in the transport are not sent later either: the connection is cut at the deadline."""
    connected(scene)
    scene.connection._link.lanes._not_before = float("inf")
    scene.proxy.hold()
    items = [scene.publication(b"%05d" % number + bytes(10_000)) for number in range(1_500)]
    outcomes = scene.connection.try_publish_many(items, timeout=1_000)
    unsent = {number for number, outcome in enumerate(outcomes) if isinstance(outcome, NotSent)}
    assert unsent
    assert all(isinstance(outcome, (NotSent, StoreTimeout)) for outcome in outcomes)
    scene.proxy.release()
    eventually(lambda: scene.connection.is_connected and _answers(scene))
    last = scene.witness.connection.api(f"STREAM.INFO.{scene.stream}")["state"]["last_seq"]
    found = set()
    for sequence in range(scene.first_sequence() + 1, last + 1):
        stored = message_at(scene.witness.connection, scene.stream, sequence)
        assert stored is not None
        found.add(int(stored.data[:5]))
    assert not found & unsent


def test_windows_of_a_batch_share_one_deadline(scene, monkeypatch):
    """A batch of many windows does not wait as often as it has windows."""
    monkeypatch.setattr("dramatiq_jetstream.wire.connection.BATCH_WINDOW", 2)
    connected(scene)
    scene.proxy.deaf = True
    began = time.monotonic()
    outcomes = scene.connection.try_publish_many([scene.publication() for _ in range(60)], timeout=1_000)
    assert time.monotonic() - began < 10
    assert all(isinstance(outcome, BrokerError) for outcome in outcomes)


@pytest.mark.parametrize("verb", ["STREAM.PURGE", "STREAM.MSG.DELETE"])
def test_what_tells_what_it_changed_is_not_repeated(scene, verb):
    """A purge whose answer is lost is not sent again, because the second answer would say that nothing was there."""
    connected(scene)
    scene.connection.timeout = 20_000
    scene.proxy.deaf = True
    failed: list[BaseException] = []
    question = {"seq": scene.first_sequence()} if "MSG" in verb else None

    def ask() -> None:
        try:
            scene.connection.api(f"{verb}.{scene.stream}", question)
        except BrokerError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: b"success" in scene.proxy.dropped)
    scene.proxy.restore()
    asking.join(10)
    assert len(failed) == 1
    assert isinstance(failed[0], StoreTimeout)


def test_messages_without_a_deadline_cannot_pile_up(scene, monkeypatch):
    """Fire-and-forget messages behind a socket that takes nothing end the connection, not the memory."""
    monkeypatch.setattr(outbox, "OUTBOX_BYTES", 4_000_000)
    connected(scene)
    scene.proxy.hold()
    client = scene.connection._link._client
    for _ in range(400):
        scene.connection.send("nowhere", bytes(100_000))
    eventually(lambda: client.lost.done())
    assert "waited to be written" in client.reason
    # The message that crosses the bound is the last one.
    eventually(lambda: scene.connection._link._outbox._bytes < 4_000_000 + 101_000)


def test_messages_posted_without_a_connection_do_not_pile_up(scene):
    """They are dropped, however many are posted."""
    lost(scene)
    for _ in range(10_000):
        scene.connection.send("nowhere", b"x")
    eventually(lambda: not scene.connection._link.loop._mailbox)
    assert not scene.connection._link._outbox


def test_an_interrupted_caller_takes_its_call_back(scene):
    """What was not sent when an exception struck the waiting thread is not sent later."""
    before = scene.effects()
    lost(scene)

    class Interrupt(BaseException):
        """Stands for what Dramatiq raises in a thread."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Interrupt):
            scene.connection.publish(scene.subject, b"new", {"Nats-Msg-Id": new_id()}, timeout=20_000)
    finally:
        signal.signal(signal.SIGALRM, previous)
    scene.proxy.restore()
    eventually(lambda: scene.connection.is_connected and _answers(scene))
    holds(lambda: scene.effects() == before, 0.3)


@pytest.mark.parametrize("way", ["lane", "loop"])
def test_a_ticking_timer_extends_no_wait(scene, way):
    """Signals that arrive all the time do not start any wait again."""
    connected(scene)
    scene.connection.publish(scene.subject, b"warm", timeout=5_000)
    if way == "loop":
        scene.connection._link.lanes._not_before = float("inf")
        scene.connection._link.lanes._close_idle()
    scene.proxy.hold()
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    began = time.monotonic()
    try:
        with pytest.raises(StoreTimeout):
            scene.connection.publish(scene.subject, b"new", {"Nats-Msg-Id": new_id()}, timeout=1_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - began < 20


HANDLER = """
import signal, sys
from dramatiq import Message
from dramatiq_jetstream import JetStreamBroker

broker = JetStreamBroker(sys.argv[2], middleware=[], enqueue_timeout=1_000)
broker.declare_queue("default")
message = Message("default", "work", (), {}, {})

def stop(*_):
    print("handler", flush=True)
    if sys.argv[1] == "close":
        broker.close()
    else:
        try:
            broker.enqueue(message)
        except Exception as error:
            print(type(error).__name__, flush=True)
    sys.exit(7)

signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
broker.connection.publish("x", b"", timeout=60_000)
"""


@pytest.mark.parametrize("what", ["close", "send"])
def test_a_signal_handler_may_close_or_send_while_the_main_thread_connects(tmp_path, proxy, what):
    """It waits for nothing that the code it interrupted holds."""
    proxy.hold()
    with python("-c", HANDLER, what, proxy.url, log=tmp_path / "log") as process:
        process.wait_for_output("ready")
        eventually(lambda: proxy._pairs)
        process.send_signal(signal.SIGTERM)
        process.wait_for_output("handler")
        assert process.wait(30) == 7, process.output
