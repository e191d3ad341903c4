"""What a broker does itself at Dramatiq's signals, around its middleware."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from dramatiq import Message, MessageProxy
from dramatiq.middleware import Middleware, MiddlewareError, Pipelines, Retries, SkipMessage
from dramatiq.results import Results

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
    broker._failed_in = lambda *arguments: failed.append(arguments)
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


class Recording:
    """Notes how the hooks of the middleware that it is mixed into are called."""

    def note(self, broker, hook, *arguments, **named):
        assert isinstance(broker, HookedBroker)
        self.calls = [*getattr(self, "calls", []), (hook, *arguments, named)]

    def before_process_message(self, broker, message):
        self.note(broker, "before_process_message", message)

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self.note(broker, "after_process_message", message, result=result, exception=exception)

    def after_skip_message(self, broker, message):
        self.note(broker, "after_skip_message", message)

    def after_nack(self, broker, message):
        self.note(broker, "after_nack", message)


class RecordingRetries(Recording, Retries):
    pass


class RecordingResults(Recording, Results):
    def __init__(self):
        pass


class Plain(Recording, Middleware):
    pass


@pytest.fixture
def aborts(monkeypatch):
    """Stands in for `dramatiq_abort`, which need not be installed: its error and its middleware."""
    module = ModuleType("dramatiq_abort")
    module.Abort = type("Abort", (BaseException,), {})
    module.Abortable = type("Abortable", (Middleware,), {})
    monkeypatch.setitem(sys.modules, "dramatiq_abort", module)
    return module


def proxy(**options):
    return MessageProxy(Message("q", "a", (), {}, options))


def quiet(*middleware):
    """A broker with this middleware, and what it was told of failures in it."""
    broker = HookedBroker(middleware=list(middleware))
    failures = []
    broker._failed_in = lambda *arguments: failures.append(arguments)
    return broker, failures


def test_a_hook_gets_the_broker_and_all_arguments_of_its_signal(when):
    heard = []

    class Hears(Middleware):
        def hear(self, broker, *arguments, **named):
            heard.append((broker, arguments, named))

        before_enqueue = after_enqueue = hear

    broker, _ = quiet(Hears())
    getattr(broker, f"emit_{when}")("enqueue", 1, 2, three=3)
    assert heard == [(broker, (1, 2), {"three": 3})]


def test_after_a_signal_middleware_is_called_in_reverse(when):
    heard = []
    first, second = Noting(heard), Noting(heard)
    first.before_ack = first.after_ack = lambda broker, message: heard.append("first")
    second.before_ack = second.after_ack = lambda broker, message: heard.append("second")
    broker, _ = quiet(first, second)
    getattr(broker, f"emit_{when}")("ack", "m")
    assert heard == (["first", "second"] if when == "before" else ["second", "first"])


def test_a_failure_is_told_and_logged_in_the_words_of_dramatiq(when, caplog):
    error = ValueError("wrong")
    middleware = Noting([], error)
    broker, failures = quiet(middleware)
    getattr(broker, f"emit_{when}")("ack", "m")
    assert failures == [(f"{when}_ack", middleware, error)]
    (record,) = caplog.records
    assert record.getMessage() == f"Unexpected failure in {when}_ack of {middleware!r}."
    assert record.levelname == "CRITICAL"
    assert record.exc_info[1] is error


def test_what_middleware_refuses_before_a_signal_is_refused():
    heard = []
    broker, failures = quiet(Noting(heard, MiddlewareError("no")), Noting(heard))
    with pytest.raises(MiddlewareError, match=r"^no$"):
        broker.emit_before("ack", "m")
    assert (heard, failures) == ([("before", "m")], [])


def test_a_hook_of_the_library_is_heard_by_the_middleware_that_has_it(caplog):
    heard = []

    class Hears(Middleware):
        def requeued(self, broker, *arguments, **named):
            heard.append((broker, arguments, named))

    class Fails(Middleware):
        def requeued(self, broker, *arguments, **named):
            raise error

    error = ValueError("wrong")
    fails = Fails()
    broker, failures = quiet(Plain(), fails, Hears())
    broker.emit_own("requeued", 1, two=2)
    assert heard == [(broker, (1,), {"two": 2})]
    assert failures == []
    (record,) = caplog.records
    assert record.getMessage() == f"Unexpected failure in requeued of {fails!r}."
    assert (record.levelname, record.exc_info[1]) == ("CRITICAL", error)
    broker.add_middleware(Hears())
    broker.emit_own("requeued", 3)
    broker.emit_own("unheard")
    assert [arguments for _, arguments, _ in heard] == [(1,), (3,), (3,)]


def test_an_inherited_hook_is_called_and_an_empty_one_is_not():
    """An attribute of a middleware object counts as much as a method of its class."""
    heard = []

    class Base(Middleware):
        def before_ack(self, broker, message):
            heard.append("inherited")

    class Derived(Base):
        pass

    assigned = Middleware()
    assigned.before_ack = lambda broker, message: heard.append("assigned")
    broker, _ = quiet(Derived(), Middleware(), assigned)
    broker.emit_before("ack", "m")
    assert heard == ["inherited", "assigned"]
    assert len(broker._hooks.before["ack"].listeners) == 2


def test_pipelines_are_asked_for_messages_with_a_next_step_alone():
    following = Pipelines()
    calls = []
    following.after_process_message = lambda *arguments, **named: calls.append((*arguments, named))
    broker, failures = quiet(following)
    last, middle, error = proxy(), proxy(pipe_target={}), ValueError()
    broker.emit_after("process_message", last, result=1)
    broker.emit_after("process_message", middle)
    broker.emit_after("process_message", middle, result=2, exception=error)
    assert calls == [
        (broker, middle, {"result": None, "exception": None}),
        (broker, middle, {"result": 2, "exception": error}),
    ]
    assert failures == []


def test_a_pipelines_of_the_programs_own_is_always_asked():
    class Own(Recording, Pipelines):
        pass

    own, message = Own(), proxy()
    broker, _ = quiet(own)
    broker.emit_after("process_message", message, result=1)
    assert own.calls == [("after_process_message", message, {"result": 1, "exception": None})]


def test_an_aborted_message_is_not_retried(aborts):
    retries, plain = RecordingRetries(), Plain()
    broker, failures = quiet(retries, plain)
    message, error = proxy(), ValueError()
    broker.emit_after("process_message", message, result=1)
    broker.emit_after("process_message", message, result=1, exception=error)
    assert not message.failed
    broker.emit_after("process_message", message, exception=aborts.Abort())
    assert message.failed
    broker.emit_after("process_message", message)
    assert [named for *_, named in retries.calls] == [
        {"result": 1, "exception": None},
        {"result": 1, "exception": error},
        {"result": None, "exception": None},
    ]
    assert all(called is message for _, called, _ in retries.calls)
    assert len(plain.calls) == 4
    assert failures == []


def test_what_an_abort_cancels_is_marked(aborts):
    class Skips(aborts.Abortable):
        def before_process_message(self, broker, message):
            seen.append((broker, message))
            if message.options:
                raise SkipMessage("aborted")

    seen, running, cancelled = [], proxy(), proxy(abort=True)
    broker, _ = quiet(Skips())
    broker.emit_before("process_message", running)
    with pytest.raises(SkipMessage, match=r"^aborted$"):
        broker.emit_before("process_message", cancelled)
    assert seen == [(broker, running), (broker, cancelled)]
    assert "is_cancelled" not in vars(running)
    assert vars(cancelled)["is_cancelled"] is True


def test_a_message_that_other_middleware_skips_is_not_cancelled(aborts):
    class Skips(Middleware):
        def before_process_message(self, broker, message):
            raise SkipMessage

    message = proxy()
    broker, _ = quiet(Skips())
    with pytest.raises(SkipMessage):
        broker.emit_before("process_message", message)
    assert "is_cancelled" not in vars(message)


def test_a_message_that_its_actor_put_off_has_no_result_yet():
    results, plain = RecordingResults(), Plain()
    broker, failures = quiet(results, plain)
    skipped, put_off = proxy(), proxy()
    vars(put_off)["put_off"] = 5
    broker.emit_after("skip_message", skipped)
    broker.emit_after("skip_message", put_off)
    assert results.calls == [("after_skip_message", skipped, {})]
    assert len(plain.calls) == 2
    assert failures == []


def test_a_failure_is_stored_as_a_result_before_the_nack():
    results, plain = RecordingResults(), Plain()
    broker, _ = quiet(results, plain)
    broker.emit_before("nack", "m")
    assert (results.calls, getattr(plain, "calls", [])) == ([("after_nack", "m", {})], [])
    broker.emit_after("nack", "m")
    assert (len(results.calls), plain.calls) == (1, [("after_nack", "m", {})])


def test_middleware_that_hears_of_a_nack_before_it_does_so_beside_results():
    heard = []

    class Hears(Middleware):
        def before_nack(self, broker, message):
            heard.append(message)

    results = RecordingResults()
    broker, _ = quiet(results, Hears())
    broker.emit_before("nack", "m")
    assert (heard, results.calls) == (["m"], [("after_nack", "m", {})])
