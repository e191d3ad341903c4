"""Events to actors: several actors, types and streams; retries, dead letters and replays; publishing once."""

from __future__ import annotations

import threading

import dramatiq
import pytest

from dramatiq_jetstream.errors import InvalidName, InvalidOption, TopologyMissing
from dramatiq_jetstream.events import Event, Events, current_event, subscription
from orders.v1.events_pb2 import OrderCreated
from tests.broker.conformance.workers import running
from tests.broker.services import order, publish_raw, subscribe
from tests.support.polling import eventually
from tests.support.wire import publish_wire


def test_an_event_without_any_header_reaches_its_actor(service, topic):
    """The body is the contract: no id, no type, no content type needed."""
    seen = subscribe(service, f"{topic}.created", OrderCreated)
    with running(service):
        publish_raw(service, f"{topic}.created", order("o-7").SerializeToString())
        eventually(lambda: seen)
        service.join("default", timeout=30_000)
    assert seen == [order("o-7")]
    assert service.dead_letters.list() == []


def test_the_actor_learns_where_its_event_comes_from(service, topic):
    """Subject, headers, stream, sequence and time; outside of actors there is no event."""
    found = []

    @dramatiq.actor(broker=service, subscribe=subscription(f"{topic}.>"))
    def look(data):
        found.append(current_event())

    @dramatiq.actor(broker=service)
    def ordinary():
        found.append(current_event())

    with running(service, threads=1):
        publish_raw(service, f"{topic}.a.b", b"\x00\xff", {"ce-id": "id-1", "x-other": "é"})
        eventually(lambda: found)
        ordinary.send()
        service.join("default", timeout=30_000)
    event = found[0]
    assert (event.subject, event.data, event.stream, event.sequence, event.id) == (
        f"{topic}.a.b",
        b"\x00\xff",
        topic,
        1,
        "id-1",
    )
    assert event.headers["x-other"] == "é"
    assert event.time > 1_700_000_000_000
    assert found[1] is None
    assert current_event() is None


def test_two_actors_receive_every_event_independently(make_service, topic):
    """One that fails, or is not running, holds the other up as little as one on another queue."""
    fast, slow = make_service(), make_service()
    seen = subscribe(fast, f"{topic}.created", name="fast")
    failing = []

    @dramatiq.actor(broker=fast, subscribe=subscription(f"{topic}.created"), max_retries=0)
    def fails(data):
        failing.append(data)
        raise RuntimeError

    late = subscribe(slow, f"{topic}.created", name="slow", queue_name="slow")
    for broker in (fast, slow):
        broker.setup()
    for number in range(5):
        fast.publish(f"{topic}.created", b"%d" % number)
    with running(fast):
        fast.join("default", timeout=30_000)
    assert len(seen) == len(failing) == 5
    assert late == []
    with running(slow):
        slow.join("slow", timeout=30_000)
    assert len(late) == 5
    assert fast.dead_letters.count() == 5


def test_an_event_goes_to_one_worker_of_an_actor(make_service, topic):
    """Processes of the same service share the events of an actor."""
    workers = [make_service() for _ in range(3)]
    seen = [subscribe(broker, f"{topic}.created") for broker in workers]
    workers[0].setup()
    with running(workers[0]), running(workers[1]), running(workers[2]):
        for number in range(60):
            workers[0].publish(f"{topic}.created", b"%d" % number)
        workers[0].join("default", timeout=30_000)
    assert sorted(map(int, sum(seen, []))) == list(range(60))  # noqa: RUF017


def test_a_wildcard_may_have_a_type_for_each_subject(service, topic):
    """Each subject is decoded by its own class or function; one without a type is undecodable."""
    types = {f"{topic}.created": OrderCreated, f"{topic}.noted": lambda event: event.data.decode().upper()}
    seen = subscribe(service, f"{topic}.*", types)
    service.setup()
    service.publish(f"{topic}.created", order())
    service.publish(f"{topic}.noted", b"text")
    service.publish(f"{topic}.unknown", b"what is this")
    with running(service, threads=1):
        service.join("default", timeout=30_000)
    assert seen == [order(), "TEXT"]
    (letter,) = service.dead_letters.list()
    assert (letter.reason, letter.actor, letter.data) == ("undecodable", "handle", b"what is this")
    assert f"no type is declared for events on {topic}.unknown" in letter.error


def test_time_limits_and_actor_priorities_hold_for_events(service, topic):
    """An event is a message to everything that Dramatiq does with messages."""
    order_of_runs = []
    gate = threading.Event()

    @dramatiq.actor(broker=service, subscribe=subscription(f"{topic}.x"), priority=10)
    def later(data):
        order_of_runs.append("later")

    @dramatiq.actor(broker=service, subscribe=subscription(f"{topic}.x"), priority=1)
    def sooner(data):
        order_of_runs.append("sooner")

    @dramatiq.actor(broker=service, subscribe=subscription(f"{topic}.slow"), time_limit=300, max_retries=0)
    def slow(data):
        while not gate.wait(0.05):
            pass

    service.emit_after("process_boot")  # starts the watch over time limits, as the dramatiq command does
    with running(service, threads=1, prefetch=16):
        service.setup()
        service.publish(f"{topic}.slow", b"")
        eventually(lambda: service.queue_stats("default").in_flight == 1)
        for _ in range(3):
            service.publish(f"{topic}.x", b"")
        eventually(lambda: service.queue_stats("default").in_flight == 7)
        eventually(lambda: len(order_of_runs) == 6)
        (letter,) = eventually(service.dead_letters.list)
    assert "TimeLimitExceeded" in letter.error
    assert order_of_runs == ["sooner"] * 3 + ["later"] * 3


def test_one_queue_may_have_events_of_several_streams(make_broker, topic, namespace):
    """Own messages, and subscriptions to two streams, all on one queue and in one worker."""
    broker = make_broker(max_priority=2)
    for name in ("A", "B"):
        broker.add_middleware(Events(stream=f"{topic}{name}", subjects=[f"{topic}{name}.>"]))
    seen = {
        name: subscribe(broker, f"{topic}{name}.x", name=f"on{name}", queue_name="mixed")
        for name in ("A", "B")
    }
    messages = []
    work = dramatiq.actor(messages.append, broker=broker, actor_name="work", queue_name="mixed")
    broker.setup()
    with running(broker, threads=2, prefetch=2):
        for number in range(100):
            for name in ("A", "B"):
                broker.publish(f"{topic}{name}.x", b"%d" % number)
            work.send_with_options(args=(number,), broker_priority=number % 3)
        broker.join("mixed", timeout=30_000)
    for received in (*seen.values(), messages):
        assert sorted(map(int, received)) == list(range(100))


@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_flood_in_one_source_does_not_starve_the_others(make_broker, topic, prefetch):
    """While one stream has thousands of events waiting, those of another and messages get their turn."""
    broker = make_broker()
    for name in ("A", "B"):
        broker.add_middleware(Events(stream=f"{topic}{name}", subjects=[f"{topic}{name}.>"]))
    flood = subscribe(broker, f"{topic}A.x", name="onA")
    rare = subscribe(broker, f"{topic}B.x", name="onB")
    messages = []
    work = dramatiq.actor(messages.append, broker=broker, actor_name="work")
    broker.setup()
    broker.connection.publish_many([_publication(f"{topic}A.x") for _ in range(3_000)])
    with running(broker, threads=1, prefetch=prefetch):
        eventually(lambda: flood)
        broker.publish(f"{topic}B.x", b"rare")
        work.send("message")
        eventually(lambda: rare and messages)
        assert len(flood) < 2_500
        broker.connection.api(f"STREAM.PURGE.{topic}A")


def _publication(subject):
    from dramatiq_jetstream.wire.connection import Publication

    return Publication(subject, b"x")


def test_an_event_id_is_stored_once(service, topic):
    """The same id within the duplicate window is one event; without an id, each is its own."""
    seen = subscribe(service, f"{topic}.>")
    service.setup()
    first = service.publish(f"{topic}.a", b"1", event_id="e-1", headers={"x": "y"})
    again = service.publish(f"{topic}.a", b"1", event_id="e-1")
    assert (first.duplicate, again.duplicate, again.seq) == (False, True, first.seq)
    service.publish(f"{topic}.a", b"2")
    service.publish(f"{topic}.a", order())
    with running(service, threads=1):
        service.join("default", timeout=30_000)
    assert seen == [b"1", b"2", order().SerializeToString()]


def test_publishing_where_nobody_keeps_events_is_an_error(make_broker, topic):
    """An event that no stream takes is not lost in silence."""
    broker = make_broker(enqueue_timeout=800)
    with pytest.raises(TopologyMissing, match=rf"No stream takes {topic}\.x"):
        broker.publish(f"{topic}.x", b"event")


def test_odd_headers_of_other_programs_do_no_harm(service, topic, nats_url):
    """Bytes that are no UTF-8, repeated names, endless ids: the event arrives, and so do the next ones."""
    seen = subscribe(service, f"{topic}.created", max_retries=0)
    service.setup()
    raw = [
        b"NATS/1.0\r\nx-bytes: \xff\xfe\r\n\r\n",
        b"NATS/1.0\r\nx: 1\r\nx: 2\r\nX: 3\r\n\r\n",
        b"NATS/1.0\r\nNats-Msg-Id: " + b"i" * 5_000 + b"\r\n\r\n",
        b"NATS/1.0\r\nDramatiq-Dead-History: nonsense\r\nStatus: 100\r\n\r\n",
        b"NATS/1.0\r\nno colon here\r\n\r\n",
        b"NATS/1.0\r\n\r\n",
    ]
    with running(service):
        for number, headers in enumerate(raw):
            publish_wire(nats_url, f"{topic}.created", headers, b"%d" % number)
        eventually(lambda: len(seen) == len(raw))
        service.join("default", timeout=30_000)
    assert sorted(map(int, seen)) == list(range(len(raw)))
    assert service.connection.state.reconnects == 0


def test_a_subscription_that_cannot_work_is_refused_at_its_declaration(make_broker, topic):
    """Wrong subjects, types and options are errors where the actor is declared."""
    broker = make_broker(max_in_flight={"limited": 2})
    broker.add_middleware(Events(stream=topic, subjects=[f"{topic}.>"]))
    with pytest.raises(InvalidName):
        subscription("not a subject")
    with pytest.raises(InvalidOption, match="subscription type 7"):
        subscription(f"{topic}.x", 7)
    with pytest.raises(InvalidOption, match=r"'elsewhere\.x', which no stream of events keeps"):
        subscribe(broker, "elsewhere.x", name="elsewhere")
    with pytest.raises(InvalidOption, match="give subscription"):
        dramatiq.actor(lambda event: None, broker=broker, actor_name="text", subscribe=f"{topic}.x")
    with pytest.raises(InvalidOption, match="max_in_flight"):
        subscribe(broker, f"{topic}.x", name="limited", queue_name="limited")
    with pytest.raises(InvalidOption, match="too long"):
        subscribe(broker, f"{topic}.x", name="a" * 300)
    with pytest.raises(ValueError, match="subscribe"):
        dramatiq.actor(
            lambda event: None,
            broker=make_broker(),
            actor_name="nowhere",
            subscribe=subscription(f"{topic}.x"),
        )
    assert broker.get_declared_actors() == set()


def test_an_event_has_an_identity_in_any_case():
    """The publisher's id, by CloudEvents or NATS, else the place in the stream."""
    assert Event("s", b"", {"ce-id": "a", "Nats-Msg-Id": "b"}, "S", 1).id == "a"
    assert Event("s", b"", {"Nats-Msg-Id": "b"}, "S", 1).id == "b"
    assert Event("s", b"", {}, "S", 1).id == "S:1"
