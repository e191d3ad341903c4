"""What a broker does itself at Dramatiq's signals, around its middleware."""

from __future__ import annotations

import pytest
from dramatiq.middleware import Middleware

from dramatiq_jetstream.worker.hooks import HookedBroker


class Noting(Middleware):
    def __init__(self, heard, error=None):
        self.heard = heard
        self.error = error

    def before_ack(self, broker, message):
        self.heard.append(("before", message))
        if self.error is not None:
            raise self.error

    def after_ack(self, broker, message):
        self.heard.append(("after", message))
        if self.error is not None:
            raise self.error

    before_enqueue = before_ack
    after_enqueue = after_ack


@pytest.fixture(params=["before", "after"])
def when(request):
    return request.param


def emitting(when, heard, *middleware):
    broker = HookedBroker(middleware=list(middleware))
    broker.first[f"{when}_ack"] = lambda message: heard.append(("first", message))
    broker.last[f"{when}_ack"] = lambda message: heard.append(("last", message))
    return broker, getattr(broker, f"emit_{when}")


def test_a_broker_comes_first_and_last(when):
    heard = []
    _, emit = emitting(when, heard, Noting(heard), Noting(heard))
    emit("ack", "m")
    assert heard == [("first", "m"), (when, "m"), (when, "m"), ("last", "m")]


def test_middleware_that_fails_keeps_nobody_from_hearing(when):
    heard = []
    _, emit = emitting(when, heard, Noting(heard, ValueError("wrong")), Noting(heard))
    emit("ack", "m")
    assert [who for who, _ in heard] == ["first", when, when, "last"]


def test_a_broker_comes_last_when_it_was_interrupted(when):
    """A time limit, a shutdown or an abort may strike in any middleware."""
    heard = []
    broker = HookedBroker(middleware=[Noting(heard, KeyboardInterrupt())])
    broker.first[f"{when}_enqueue"] = lambda message: heard.append(("first", message))
    broker.last[f"{when}_enqueue"] = lambda message: heard.append(("last", message))
    with pytest.raises(KeyboardInterrupt):
        getattr(broker, f"emit_{when}")("enqueue", "m")
    assert [who for who, _ in heard] == ["first", when, "last"]


@pytest.mark.parametrize("signal", ["process_message", "skip_message", "ack", "nack"])
def test_what_is_raised_after_a_message_keeps_no_middleware_from_hearing(signal):
    """A worker thread has a message to settle: `SystemExit` of a middleware is an error like any other."""
    heard, failed = [], []

    class Exits(Middleware):
        pass

    class Hears(Middleware):
        pass

    def leave(*_):
        raise SystemExit

    setattr(Exits, f"after_{signal}", leave)
    setattr(Hears, f"after_{signal}", lambda self, broker, message: heard.append(message))
    broker = HookedBroker(middleware=[Hears(), Exits()])
    broker.failed_in = lambda *arguments: failed.append(arguments)
    broker.emit_after(signal, "m")
    assert heard == ["m"]
    assert [(signal, type(middleware), type(error)) for signal, middleware, error in failed] == [
        (f"after_{signal}", Exits, SystemExit)
    ]


def test_middleware_that_is_added_later_is_heard(when):
    heard = []
    broker, emit = emitting(when, heard)
    emit("ack", 1)
    broker.add_middleware(Noting(heard))
    emit("ack", 2)
    assert heard == [("first", 1), ("last", 1), ("first", 2), (when, 2), ("last", 2)]
