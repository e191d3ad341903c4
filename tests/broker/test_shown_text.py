"""What people see of errors, arguments and log lines: bounded, and whatever the program's own code does."""

from __future__ import annotations

import logging
import sys
import time

import pytest
from dramatiq import Message, MessageProxy

from dramatiq_jetstream.worker.arguments import describe_arguments, shown_arguments
from dramatiq_jetstream.worker.current import current_message
from dramatiq_jetstream.worker.log_lines import LogLines, lines_of
from dramatiq_jetstream.worker.tracebacks import text_of, traceback_of


class Unspeakable(Exception):
    """Cannot be shown."""

    def __str__(self):
        raise KeyError("broken")


def proxy(*args, **kwargs):
    return MessageProxy(Message("q", "a", args, kwargs, {}))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("wrong"), "wrong"),
        (ValueError("x" * 2_001), "x" * 2_000),
        (Unspeakable(), "(KeyError)"),
    ],
)
def test_what_an_error_says_is_bounded(error, text):
    assert text_of(error) == text


def test_a_traceback_is_shortened_in_its_middle():
    """A quarter is its beginning, three quarters are its end."""
    whole = "ValueError: " + "".join(map(chr, range(1_000, 1_400))) + "\n"
    error = ValueError(whole[12:-1])
    assert traceback_of(error, len(whole)) == whole
    assert traceback_of(error, 100) == f"{whole[:25]}\n…\n{whole[-75:]}"


@pytest.mark.parametrize(
    ("arguments", "named", "text"),
    [((), {}, ""), ((1, "a"), {}, "1, 'a'"), ((), {"b": None}, "b=None"), ((1,), {"b": "c"}, "1, b='c'")],
)
def test_arguments_are_shown_as_a_call_shows_them(arguments, named, text):
    assert describe_arguments(proxy(*arguments, **named)) == text


def test_shown_arguments_are_bounded_and_a_failure_shows_its_class_alone():
    message = proxy("x" * 300)
    assert shown_arguments(message, describe_arguments) == "'" + "x" * 199
    assert shown_arguments(message, lambda message: f"{len(message.args)} argument") == "1 argument"
    assert shown_arguments(message, lambda message: message.kwargs["secret"]) == "(KeyError)"


@pytest.fixture
def running():
    message = proxy()
    token = current_message.set(message)
    yield message
    current_message.reset(token)


def line(text="said %s", arguments=("so",), name="program", error=None):
    record = logging.LogRecord(name, logging.WARNING, "", 1, text, arguments, error)
    record.created, record.msecs = 1_700_000_000.5, 45.9
    return record


def wanting(*actors):
    return LogLines(lambda name: {"log_history": name in actors})


SECOND = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1_700_000_000.5))


def test_a_line_is_kept_with_the_message_whose_actor_wants_it(running):
    assert lines_of(running) == ()
    assert wanting("a").handle(line()) is True
    assert lines_of(running) == (f"{SECOND}.045 WARNING program: said so",)


@pytest.mark.parametrize("name", ["dramatiq.worker", "dramatiq.broker"])
def test_lines_of_dramatiq_are_left_out(running, name):
    wanting("a").handle(line(name=name))
    assert lines_of(running) == ()


def test_a_name_that_begins_like_dramatiqs_is_another(running):
    wanting("a").handle(line(name="dramatiq_jetstream"))
    assert len(lines_of(running)) == 1


def test_an_actor_that_wants_none_keeps_none_and_is_asked_once(running):
    asked = []
    handler = LogLines(lambda name: asked.append(name) or {})
    handler.handle(line())
    handler.handle(line())
    assert (lines_of(running), asked) == ((), ["a"])


def test_outside_a_message_nothing_is_kept():
    assert current_message.get() is None
    assert wanting("a").handle(line()) is True


def test_an_error_is_named_beside_its_line(running):
    try:
        raise ValueError("wrong")
    except ValueError:
        error = sys.exc_info()
    wanting("a").handle(line(error=error))
    wanting("a").handle(line(error=(None, None, None)))
    first, second = lines_of(running)
    assert first.endswith(": said so (ValueError: wrong)")
    assert second.endswith(": said so")


def test_lines_are_cut_and_the_first_ones_go(running):
    handler = wanting("a")
    for number in range(202):
        handler.handle(line("%s" + "x" * 600, (number,)))
    first, *kept = lines_of(running)
    assert first == "… 2 earlier lines"
    assert len(kept) == 200
    assert {len(one) for one in kept} == {500}
    assert kept[0].startswith(f"{SECOND}.045 WARNING program: 2xxx")


@pytest.mark.parametrize(("count", "more"), [(200, ()), (201, ("… 1 earlier lines",))])
def test_it_is_said_how_many_lines_went(running, count, more):
    handler = wanting("a")
    for _ in range(count):
        handler.handle(line())
    assert lines_of(running)[:-200] == more


def test_a_line_whose_arguments_are_wrong_fails_nobody(running, monkeypatch):
    failed = []
    handler = wanting("a")
    monkeypatch.setattr(handler, "handleError", failed.append)
    record = line("%d", ("no number",))
    assert handler.handle(record) is True
    assert (failed, lines_of(running)) == ([record], ())
