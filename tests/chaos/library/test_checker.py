"""The checker finds what a broken build would do: a promise that cannot be broken proves nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.chaos.library.books import Books, Call, Period, Run, Size
from tests.chaos.library.broken import BREAKS, BREAKS_PROMISE
from tests.chaos.library.checker import PROMISES, check, unfinished

MIB = 2**20


def _call(kind: str, *labels: str, actor: str = "work", told: str = "stored", **more: object) -> Call:
    actors = () if kind == "event" else tuple(actor for _ in labels)
    return Call(
        f"call {labels[0]}",
        kind,
        10.0,
        labels,
        actors,
        actors,
        dict.fromkeys(labels, told),
        10.1,
        0.1,
        **more,  # type: ignore[arg-type]
    )


def _runs(label: str, actor: str = "work", at: float = 11.0, end: str = "ended", **more: object) -> list[Run]:
    more = {"stored": 10_500, **more}
    return [
        Run(when, 1, what, actor, label, f"id of {label}", **more)  # type: ignore[arg-type]
        for when, what in ((at, "began"), (at + 0.5, end))
    ]


def _ticks(*times: float) -> Iterable[Run]:
    for at in times:
        yield from _runs("tick", "tick", at, stored=int(at * 1000))


@pytest.fixture
def books() -> Books:
    """The books of one call of each kind, as they should be."""
    return Books(
        calls=[
            _call("send", "plain"),
            _call("send", "refused", told="not stored"),
            _call("send", "letter", actor="doomed"),
            _call("send", "asked", actor="answer"),
            _call("group", "m1", "m2", actor="member", callback="both"),
            _call("unique", "u1", key="k"),
            _call("unique", "u2", key="k", told="not stored"),
            _call("event", "seen"),
        ],
        runs=[
            *_runs("plain"),
            *_runs("letter", "doomed", end="failed"),
            *_runs("asked", "answer"),
            *_runs("m1", "member"),
            *_runs("m2", "member"),
            *_runs("both", "complete", 12.0),
            *_runs("u1"),
            *_runs("seen", "on_made"),
            *_runs("seen", "on_made_too"),
            *_ticks(10, 12, 14, 16),
        ],
        letters=[{"label": "letter", "actor": "doomed", "reason": "retries exhausted", "error": ""}],
        results=frozenset({"asked"}),
        consumers={"chaos_q_first": ["worker"], "CHAOS": ["on_made", "on_made_too"]},
        sizes={1: (Size(100 * MIB, 10, 20), Size(110 * MIB, 11, 22))},
        began=9.0,
        ended=18.0,
    )


def _broken(books: Books) -> set[str]:
    return {verdict.promise for verdict in check(books) if not verdict.kept}


def _without(books: Books, label: str) -> Books:
    return replace(books, runs=[run for run in books.runs if run.label != label])


def test_good_books_are_good(books: Books) -> None:
    """Every promise gets a verdict, and all were kept."""
    assert _broken(books) == set()
    assert unfinished(books) == []
    assert len(PROMISES) == len(set(BREAKS_PROMISE.values())) == len(BREAKS)


@pytest.mark.parametrize("label", ["plain", "seen"])
def test_what_is_lost_is_found(books: Books, label: str) -> None:
    """A message, and an event, that were acknowledged and never ran."""
    assert _broken(_without(books, label)) == {"what is stored is done, or a dead letter"}
    assert unfinished(_without(books, label)) == [label]


def test_a_letter_that_is_lost_is_found(books: Books) -> None:
    """A message that always fails was run and is no dead letter."""
    assert _broken(replace(books, letters=[])) == {"what is stored is done, or a dead letter"}


def test_what_a_destroyed_store_has_lost_is_not_held_against_it(books: Books) -> None:
    """Before the fault a message may be lost, after it may not."""
    emptied = Period("store-emptied", 10.5, 11.0, destroys=True)
    assert _broken(_without(replace(books, periods=[emptied]), "plain")) == set()
    earlier = Period("store-emptied", 5.0, 6.0, destroys=True)
    assert _broken(_without(replace(books, periods=[earlier]), "plain")) != set()


@pytest.mark.parametrize("where", ["runs", "letters", "waiting"])
def test_a_ghost_is_found(books: Books, where: str) -> None:
    """What raised an error that says *not stored* runs, is a dead letter, or waits."""
    ghost = {
        "runs": replace(books, runs=[*books.runs, *_runs("refused")]),
        "letters": replace(books, letters=[*books.letters, {**books.letters[0], "label": "refused"}]),
        "waiting": replace(books, waiting_labels=frozenset({"refused"})),
    }
    assert _broken(ghost[where]) == {"what is not stored never appears"}


def test_a_repeated_run_is_found(books: Books) -> None:
    """Without a fault, and over one that is no reason; over one that is, it is allowed."""
    again = replace(books, runs=[*books.runs, *_runs("plain", at=14.0)])
    repeated = {"a run is repeated only where that is said"}
    assert _broken(again) == repeated
    assert _broken(replace(again, periods=[Period("links-cut", 12.0, 13.0)])) == repeated
    assert _broken(replace(again, periods=[Period("worker-killed", 12.0, 13.0, repeats=True)])) == set()
    assert _broken(replace(again, periods=[Period("worker-killed", 15.0, 16.0, repeats=True)])) == repeated


def test_a_callback_that_is_early_doubled_or_missing_is_found(books: Books) -> None:
    """A group's callback comes once, after all members."""
    wrong = {"a group's callback comes once, after all members"}
    assert _broken(_without(books, "both")) == wrong
    early = _without(books, "both")
    assert _broken(replace(early, runs=[*early.runs, *_runs("both", "complete", 11.2)])) == wrong
    second = [
        replace(run, id="another", stored=1) for run in _runs("both", "complete", 13.0)
    ]  # a second message, not a second run of the first
    assert _broken(replace(books, runs=[*books.runs, *second])) == wrong


def test_a_key_that_is_taken_twice_is_found(books: Books) -> None:
    """Both calls with one unique key were told that theirs is stored, and both ran."""
    calls = [replace(call, told={"u2": "stored"}) if call.labels == ("u2",) else call for call in books.calls]
    twice = replace(books, calls=calls, runs=[*books.runs, *_runs("u2")])
    assert _broken(twice) == {"a unique key stands for one message"}


def test_a_missing_result_is_found(books: Books) -> None:
    """The actor has ended, and there is no result."""
    assert _broken(replace(books, results=frozenset())) == {"what is done has its result"}


def test_a_letter_without_a_reason_is_found(books: Books) -> None:
    """A message that need not have failed is a dead letter."""
    letter = {"label": "plain", "actor": "work", "reason": "retries exhausted", "error": ""}
    assert _broken(replace(books, letters=[*books.letters, letter])) == {"only what fails is a dead letter"}


def test_more_turns_than_a_limiter_has_are_found(books: Books) -> None:
    """Three runs hold one of two turns at once; two of them do after the first has given back its own, or is dead."""

    def turn(name: str, took: float, gave: float | None) -> list[Run]:
        lines = [(took, "took"), (gave, "gave")]
        return [Run(at, 1, what, "limited", name, name) for at, what in lines if at is not None]

    def held(*turns: list[Run]) -> Books:
        return replace(books, runs=[*books.runs, *(run for one in turns for run in one)])

    assert _broken(held(turn("a", 11, 12), turn("b", 11.1, 13), turn("c", 12.1, 13))) == set()
    assert _broken(held(turn("a", 11, None), turn("b", 11.1, 13), turn("c", 11.2, 13))) == set()
    three = held(turn("a", 11, 12), turn("b", 11.1, 13), turn("c", 11.9, 13))
    assert _broken(three) == {"a limiter gives no more turns than it has"}
    emptied = Period("store-emptied", 11.3, 11.4, destroys=True)
    assert "a limiter gives no more turns than it has" not in _broken(replace(three, periods=[emptied]))


@pytest.mark.parametrize("times", [(10, 10.2, 12, 14, 16), (10,), ()], ids=["two", "stopped", "none"])
def test_wrong_ticks_are_found(books: Books, times: tuple[float, ...]) -> None:
    """Two at once, none any more, and none at all."""
    quiet = _without(books, "tick")
    found = replace(quiet, runs=[*quiet.runs, *_ticks(*times)], ended=40.0 if len(times) < 2 else 18.0)
    assert _broken(found) == {"ticks come as scheduled"}


def test_a_call_that_is_late_or_raises_something_else_is_found(books: Books) -> None:
    """A call that took half a minute, and one that raised an `AttributeError`."""
    for change in ({"seconds": 30.0}, {"error": "AttributeError()", "surprise": True}):
        calls = [replace(books.calls[0], **change), *books.calls[1:]]  # type: ignore[arg-type]
        assert _broken(replace(books, calls=calls)) == {"every call ends in time, with a known error"}


def test_what_is_stuck_dead_or_grown_is_found(books: Books) -> None:
    """A message that waits, a worker that is dead, and memory, threads, files and consumers that are left."""
    assert _broken(replace(books, waiting=["work x in first"])) == {"nothing is stuck"}
    assert _broken(replace(books, unhealthy=["fleet 1 is not live"])) == {"every process and thread is alive"}
    first = Size(100 * MIB, 10, 20)
    for last in (Size(300 * MIB, 10, 20), Size(100 * MIB, 30, 20), Size(100 * MIB, 10, 80)):
        assert _broken(replace(books, sizes={1: (first, last)})) == {"nothing grows"}
    assert _broken(replace(books, consumers={"CHAOS": ["a", "b", "c"]})) == {"nothing grows"}
