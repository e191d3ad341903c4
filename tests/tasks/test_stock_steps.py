"""The stock, step by step: what is written and read, in which order, and what a process finds that others were in.

What is taken and given back under any schedule is in the property tests; here each decision is tried by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import tasks.levels
import tasks.stock
from dramatiq_jetstream.errors import RevisionConflict
from tasks.claims import Claim
from tasks.ledger import WRITTEN_OFF, PricedItem, Record
from tasks.levels import GIVEN_BACK, PREFIX, TAKEN, Adjustment, Found, Level, StockBusy
from tasks.stock import InvalidAdjustment, RecordBehind, Stock
from tests.tasks.fakes import FakeBucket, FakeEntry

ORDER, KEY = "o-1", "order.o-1"
INITIAL = {"A": 3, "B": 2, "C": 1}
NOW = 1_000
UNREADABLE = r"^the record of order o-1 cannot be read as it is now\.$"


class Bucket(FakeBucket):
    """Notes reads and writes. The test says what a read is answered, and what happens before a write."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, bool]] = []
        self.writes: list[str] = []
        self.answers: dict[str, list[FakeEntry | None]] = {}
        self.before: dict[str, Callable[[], Any]] = {}
        self.contended = ""

    def get(self, key: str, *, linearizable: bool = False) -> FakeEntry | None:
        self.reads.append((key, linearizable))
        if self.answers.get(key):
            return self.answers[key].pop(0)
        return super().get(key, linearizable=linearizable)

    def update(self, key: str, value: bytes, *, revision: int, ttl: int | None = None) -> int:
        self.writes.append(key)
        self.before.pop(key, lambda: None)()
        if key == self.contended:
            raise RevisionConflict(key)
        return super().update(key, value, revision=revision, ttl=ttl)

    @property
    def record(self) -> FakeEntry:
        return self.entries[KEY]

    def level(self, sku: str) -> Level:
        return Level.decode(self.entries[f"{PREFIX}{sku}"].value)

    @property
    def looks(self) -> list[bool]:
        """How the order's record was read: True for linearizable."""
        return [linearizable for key, linearizable in self.reads if key == KEY]


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bucket(clock: Clock) -> Bucket:
    """A store that every product has its key in."""
    bucket = Bucket()
    process(bucket, clock).available()
    bucket.reads.clear()
    bucket.writes.clear()
    return bucket


def process(bucket: Bucket, clock: Callable[[], int], initial: Mapping[str, int] = INITIAL) -> Stock:
    return Stock(bucket, initial, clock)


@pytest.fixture
def stock(bucket: Bucket, clock: Clock) -> Stock:
    return process(bucket, clock)


@pytest.fixture
def other(bucket: Bucket, clock: Clock) -> Stock:
    """The stock as another process has it."""
    return process(bucket, clock)


def wanted(**lines: int) -> Record:
    return Record("held", {"held": NOW}, lines=tuple(PricedItem(sku, n, 100) for sku, n in lines.items()))


def moved(by: Stock, /, *states: str, **facts: str) -> Found:
    """Move the order's record on."""
    found = by.find(ORDER)
    assert found is not None
    for state in states:
        found = by.forward(ORDER, found, found.record.forward(state, NOW + 1, **facts))
    return found


# Open


def test_an_order_takes_its_products_in_their_order_and_leaves_notes(bucket: Bucket, stock: Stock) -> None:
    """Then its record is created; the next change of a product drops the note."""
    found = stock.open(ORDER, wanted(C=1, A=2))
    assert bucket.writes == ["level.A", "level.C", KEY]
    assert found == Found(wanted(C=1, A=2), bucket.record.revision, fresh=True)
    assert stock.available() == {"A": 1, "B": 2, "C": 0}
    for sku, quantity in (("A", 2), ("C", 1)):
        ((order_id, note),) = bucket.level(sku).notes.items()
        assert (order_id, note.kind, note.quantity, note.at) == (ORDER, TAKEN, quantity, NOW)
    stock.open("o-2", wanted(A=1))
    assert bucket.level("A").notes.keys() == {"o-2"}
    assert bucket.level("C").notes.keys() == {ORDER}


def test_an_order_that_is_short_gives_back_what_it_took(bucket: Bucket, stock: Stock) -> None:
    """And has taken nothing of the rest."""
    found = stock.open(ORDER, wanted(A=1, B=3, C=1))
    rejected = Record("rejected", {"rejected": NOW}, code="OUT_OF_STOCK", reason="3 × B ordered, 2 in stock")
    assert found == Found(rejected, bucket.record.revision, fresh=True)
    assert stock.available() == INITIAL
    assert not any(bucket.level(sku).notes for sku in INITIAL)
    assert "level.C" not in bucket.writes


@pytest.mark.parametrize("is_dropped", [False, True])
def test_an_order_that_is_opened_again_takes_nothing_more(
    bucket: Bucket, stock: Stock, other: Stock, is_dropped: bool
) -> None:
    """Whether its notes are still there or not; its record is as it was."""
    first = stock.open(ORDER, wanted(A=1, B=1))
    if is_dropped:
        stock.restock("A", 0, "r", by="ann", reason="")
        assert bucket.level("A").notes == {}
    bucket.writes.clear()
    assert other.open(ORDER, wanted(A=1, B=1)) == Found(first.record, first.revision)
    assert bucket.writes == ([] if is_dropped else [KEY])
    assert stock.available() == {"A": 2, "B": 1, "C": 1}
    other.restock("A", 0, "r-2", by="ann", reason="")
    assert bucket.level("A").notes == {}


def test_an_order_goes_on_where_a_killed_process_left_it(bucket: Bucket, stock: Stock, other: Stock) -> None:
    other._shelf("A").take(ORDER, 2)
    assert stock.open(ORDER, wanted(A=2, B=1)).record.state == "held"
    assert stock.available() == {"A": 1, "B": 1, "C": 1}


def test_what_a_killed_process_took_is_given_back_when_the_order_holds_nothing(
    bucket: Bucket, stock: Stock, other: Stock
) -> None:
    """Of all its products, although the first one was given back before."""
    other._shelf("B").take(ORDER, 1)
    other._create(ORDER, wanted(A=1, B=1).rejected("OUT_OF_STOCK", ""))
    assert stock.open(ORDER, wanted(A=1, B=1)).record.state == "rejected"
    assert stock.available() == INITIAL


def test_another_run_may_have_taken_more_before_it_left_its_record(
    bucket: Bucket, stock: Stock, other: Stock
) -> None:
    """This one found too little of B, and was overtaken by a run that had C."""

    def overtake() -> None:
        other._shelf("C").take(ORDER, 1)
        other._create(ORDER, wanted(A=1).rejected("OUT_OF_STOCK", "short"))

    bucket.before[KEY] = overtake
    found = stock.open(ORDER, wanted(A=1, B=3, C=1))
    assert (found.record.reason, found.fresh) == ("short", False)
    assert stock.available() == INITIAL


# Offers


class Offering:
    """Makes the offer of an order, and notes what of."""

    def __init__(self, of: Record) -> None:
        self.of = of
        self.asked: list[Mapping[str, int]] = []

    def __call__(self, pieces: Mapping[str, int]) -> Record:
        self.asked.append(dict(pieces))
        return self.of.offered(pieces, {}, NOW + 60_000)


def test_what_there_is_is_offered_and_held(bucket: Bucket, stock: Stock, other: Stock) -> None:
    """Of every product, also behind the one that ran short; opened again, nothing more."""
    order = wanted(A=5, B=1, C=2)
    offering = Offering(order)
    found = stock.open(ORDER, order, offering)
    assert offering.asked == [{"A": 3, "B": 1, "C": 1}]
    assert found == Found(offering({"A": 3, "B": 1, "C": 1}), bucket.record.revision, fresh=True)
    assert stock.available() == {"A": 0, "B": 1, "C": 0}
    assert [bucket.level(sku).notes[ORDER].quantity for sku in "ABC"] == [3, 1, 1]
    for again in (offering, None):
        assert other.open(ORDER, order, again) == replace(found, fresh=False)
    stock.restock("A", 0, "r", by="ann", reason="")
    assert bucket.level("A").notes == {}
    assert other.open(ORDER, order) == replace(found, fresh=False)
    assert stock.available() == {"A": 0, "B": 1, "C": 0}


def test_a_product_of_which_there_is_nothing_is_not_held(bucket: Bucket, stock: Stock) -> None:
    """If there is nothing of any, the order is rejected for the first."""
    stock.open("o-2", wanted(B=2))
    order = wanted(A=1, B=2)
    offering = Offering(order)
    assert stock.open(ORDER, order, offering).record == order.offered({"A": 1}, {}, NOW + 60_000)
    assert offering.asked == [{"A": 1}]
    assert "o-1" not in bucket.level("B").notes
    stock.open("o-4", wanted(C=1))
    order = wanted(B=1, C=2)
    offering = Offering(order)
    found = stock.open("o-3", order, offering)
    assert (found.record.state, found.record.reason) == ("rejected", "1 × B ordered, 0 in stock")
    assert (offering.asked, found.fresh) == ([], True)


def test_all_of_an_order_is_no_offer(bucket: Bucket, stock: Stock) -> None:
    """Where offers are made, too."""
    offering = Offering(wanted(A=3, B=2))
    assert stock.open(ORDER, wanted(A=3, B=2), offering).record == wanted(A=3, B=2)
    assert offering.asked == []


def test_what_a_run_took_that_makes_offers_is_given_back_by_one_that_makes_none(
    bucket: Bucket, stock: Stock, other: Stock
) -> None:
    """It finds less than was ordered, and rejects the order."""
    other._shelf("A").take(ORDER, 5, in_part=True)
    found = stock.open(ORDER, wanted(A=5, B=1))
    assert (found.record.state, found.record.reason) == ("rejected", "5 × A ordered, 3 in stock")
    assert stock.available() == INITIAL


def test_what_another_run_took_beyond_its_offer_is_given_back(
    bucket: Bucket, stock: Stock, other: Stock
) -> None:
    """The record says what is offered; what it does not name is sold to others."""
    order = wanted(A=5, B=1)
    bucket.before[KEY] = lambda: other._create(ORDER, order.offered({"A": 3}, {}, NOW))
    found = stock.open(ORDER, order, Offering(order))
    assert (found.record.state, found.fresh) == ("offered", False)
    assert stock.available() == {"A": 0, "B": 2, "C": 1}


def test_an_offer_that_is_cancelled_gives_back_what_it_held(bucket: Bucket, stock: Stock) -> None:
    """Once, although its claim says what was ordered; it is never released."""
    order = wanted(A=5, B=1)
    stock.claims.claim(ORDER, Claim(1, "digest", "c-1", order.lines, 600, "EUR"))
    stock.open(ORDER, order, Offering(order))
    offered = bucket.record
    with pytest.raises(RecordBehind, match=UNREADABLE):
        stock.release(ORDER, 7)
    found = stock.cancel(ORDER, 7, "no")
    assert found.record.at == {"offered": NOW, "cancelling": 7, "cancelled": 7}
    assert stock.available() == INITIAL
    bucket.answers[KEY] = [offered]
    assert stock.release(ORDER, 8) == replace(found, fresh=False)


def test_the_levels_are_those_of_the_store(bucket: Bucket, clock: Clock) -> None:
    """With their revisions; without what it has no key of."""
    newer = process(bucket, clock, {**INITIAL, "E": 4})
    newer.restock("A", 2, "r-1", by="ann", reason="")
    levels = newer.levels()
    assert {sku: level.pieces for sku, (level, _) in levels.items()} == {"A": 5, "B": 2, "C": 1}
    assert {sku: revision for sku, (_, revision) in levels.items()} == {
        sku: bucket.entries[f"level.{sku}"].revision for sku in INITIAL
    }


# Records


def test_claims_and_notes_are_in_the_same_store(bucket: Bucket, stock: Stock) -> None:
    stock.claims.claim(ORDER, Claim(1, "digest"))
    stock.notes.unsettle(ORDER, 1, 2)
    assert {"claim.o-1", "refund.o-1"} <= bucket.entries.keys()


def test_a_record_that_another_run_created_is_found(bucket: Bucket, stock: Stock, other: Stock) -> None:
    """On a server that is not behind, if need be; if it is not found there either, the step waits."""
    bucket.before[KEY] = lambda: other._create(ORDER, wanted(A=1))
    bucket.answers[KEY] = [None]
    assert stock.open(ORDER, wanted(A=1)) == Found(wanted(A=1), bucket.record.revision)
    assert bucket.looks == [False, True]

    bucket.before["order.o-2"] = lambda: other._create("o-2", wanted(A=1))
    bucket.answers["order.o-2"] = [None, None]
    with pytest.raises(RecordBehind, match=r"^the record of order o-2 cannot be read as it is now\.$"):
        stock.open("o-2", wanted(A=1))


def test_a_record_is_moved_on_by_one(bucket: Bucket, stock: Stock, other: Stock) -> None:
    """The other learns what is recorded then."""
    found = stock.open(ORDER, wanted(A=1))
    bucket.reads.clear()
    paid = stock.forward(ORDER, found, found.record.forward("paid", 5))
    assert paid == Found(found.record.forward("paid", 5), bucket.record.revision, fresh=True)
    assert other.forward(ORDER, found, found.record.forward("declined", 6)) == replace(paid, fresh=False)
    assert bucket.looks == [False]


def test_a_refusal_is_believed_when_the_newer_record_is_read(
    bucket: Bucket, stock: Stock, other: Stock
) -> None:
    """Of servers that are behind, the second is asked linearizably; if both are, the step waits."""
    found = stock.open(ORDER, wanted(A=1))
    held = bucket.record
    paid = stock.forward(ORDER, found, found.record.forward("paid", 5))
    bucket.reads.clear()
    for outdated in (held, None):
        bucket.answers[KEY] = [outdated]
        assert other.forward(ORDER, found, found.record.forward("declined", 6)).record == paid.record
        bucket.answers[KEY] = [outdated, outdated]
        with pytest.raises(RecordBehind, match=UNREADABLE):
            other.forward(ORDER, found, found.record.forward("declined", 6))
    assert bucket.looks == [False, True] * 4


def test_a_record_is_read_as_it_is_asked_for(bucket: Bucket, stock: Stock) -> None:
    """And twice only if the first seems to be behind."""
    assert stock.find(ORDER) is None
    found = replace(stock.open(ORDER, wanted(A=1)), fresh=False)
    bucket.reads.clear()
    assert (stock.find(ORDER), stock.find(ORDER, linearizable=True)) == (found, found)
    assert bucket.looks == [False, True]
    bucket.reads.clear()
    seen: list[Found | None] = []

    def is_newer(one: Found | None) -> bool:
        seen.append(one)
        return len(seen) > 1

    assert stock.find_newer(ORDER, is_newer) == found
    assert bucket.looks == [False, True]
    assert stock.find_newer(ORDER, is_newer) == found
    assert bucket.looks == [False, True, False]
    assert seen == [found, found]


def test_a_process_remembers_what_it_wrote_for_a_minute(
    bucket: Bucket, stock: Stock, other: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not whether it was new, and not what others wrote."""
    seconds = SimpleNamespace(now=500.0)
    monkeypatch.setattr(tasks.stock, "time", SimpleNamespace(monotonic=lambda: seconds.now))
    found = stock.open(ORDER, wanted(A=1))
    assert stock.recall(ORDER) == replace(found, fresh=False)
    assert (stock.recall("o-2"), other.recall(ORDER)) == (None, None)
    seconds.now += 30
    paid = stock.forward(ORDER, found, found.record.forward("paid", 5))
    seconds.now += 59.9
    assert stock.recall(ORDER) == replace(paid, fresh=False)
    seconds.now = 500.0 + 90
    assert stock.recall(ORDER) is None


def test_what_a_process_remembers_is_bounded(
    bucket: Bucket, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written least recently is forgotten."""
    monkeypatch.setattr(tasks.stock, "REMEMBERED", 2)
    first = stock.open("o-1", wanted(A=1))
    stock.open("o-2", wanted(B=1))
    assert stock.recall("o-1") is not None
    stock.forward("o-1", first, first.record.forward("paid", 5))
    stock.open("o-3", wanted(C=1))
    assert [stock.recall(one) is not None for one in ("o-1", "o-2", "o-3")] == [True, False, True]


# Levels


def test_what_is_available(bucket: Bucket, clock: Clock, stock: Stock) -> None:
    """By the store; a product that has no key there yet has its first pieces."""
    bucket.create("level.D", Level(7).encode())
    newer = process(bucket, clock, {**INITIAL, "E": 4})
    newer.restock("A", 2, "r-1", by="ann", reason="")
    assert newer.available() == {"A": 5, "B": 2, "C": 1, "D": 7, "E": 4}
    assert newer.level("D") == (Level(7), bucket.entries["level.D"].revision)
    assert newer.level("E") == (Level(4), 0)
    assert newer.level("F") == (Level(0), 0)
    assert newer.adjustments("F") == []
    assert newer.open(ORDER, wanted(E=5)).record.reason == "5 × E ordered, 4 in stock"
    assert newer.open("o-2", wanted(F=1)).record.reason == "1 × F ordered, 0 in stock"


def test_stock_is_adjusted_once_for_each_id(bucket: Bucket, clock: Clock, stock: Stock, other: Stock) -> None:
    """By how many pieces, or to how many; who did it, when and why is kept."""
    added = stock.restock("A", 2, "r-1", by="ann", reason="a delivery")
    assert added == Adjustment("r-1", 2, NOW, "ann", "a delivery")
    clock.now += 1
    assert other.restock("A", 9, "r-1", by="bob", reason="again") == added
    counted = other.correct("A", 1, "c-1", by="bob", reason="counted")
    assert counted == Adjustment("c-1", -4, NOW + 1, "bob", "counted")
    assert stock.correct("A", 7, "c-1", by="ann", reason="again") == counted
    assert stock.restock("A", -1, "r-2", by="ann", reason="broken").pieces == -1
    assert [one.id for one in other.adjustments("A")] == ["r-1", "c-1", "r-2"]
    assert stock.available()["A"] == 0


def test_what_cannot_be_adjusted_is_refused(bucket: Bucket, clock: Clock, stock: Stock) -> None:
    """A product is known by its key, or by the first contents."""
    with pytest.raises(InvalidAdjustment, match=r"^There are only 3 pieces of A\.$"):
        stock.restock("A", -4, "r-1", by="ann", reason="")
    for adjust in (stock.restock, stock.correct):
        with pytest.raises(InvalidAdjustment, match=r"^There is no product 'Z'\.$"):
            adjust("Z", 1, "r-1", by="ann", reason="")
    assert "level.Z" not in bucket.entries
    bucket.create("level.Z", Level(0).encode())
    assert stock.restock("Z", 1, "r-1", by="ann", reason="").pieces == 1
    newer = process(bucket, clock, {**INITIAL, "E": 4})
    newer.restock("E", 1, "r-1", by="ann", reason="")
    assert bucket.level("E").pieces == 5


@pytest.mark.parametrize(("is_heard", "tries"), [(True, 1), (False, 2)])
def test_a_change_that_was_heard_of_costs_no_second_try(
    bucket: Bucket, stock: Stock, other: Stock, is_heard: bool, tries: int
) -> None:
    """A watch tells of levels; one of a product that was never asked for is not kept."""
    stock.open("o-2", wanted(A=1))
    other.open("o-3", wanted(A=1))
    if is_heard:
        stock.heard(bucket.entries["level.A"])
        stock.heard(bucket.entries["level.B"])
    bucket.writes.clear()
    stock.open(ORDER, wanted(A=1))
    assert bucket.writes.count("level.A") == tries
    assert stock._shelves.keys() == {"A"}


def test_a_note_that_was_left_behind_is_dropped_after_half_a_minute(
    bucket: Bucket, clock: Clock, stock: Stock, other: Stock
) -> None:
    other.open(ORDER, wanted(A=1))
    clock.now += 29_999
    stock.restock("A", 1, "r-1", by="ann", reason="")
    assert bucket.level("A").notes.keys() == {ORDER}
    clock.now += 1
    stock.restock("A", 1, "r-2", by="ann", reason="")
    assert bucket.level("A").notes == {}


@pytest.mark.parametrize(("step", "times"), [(9.9995, 3), (10.0005, 2)])
def test_a_change_competes_for_ten_seconds(
    bucket: Bucket, stock: Stock, monkeypatch: pytest.MonkeyPatch, step: float, times: int
) -> None:
    seconds = SimpleNamespace(now=0.0)

    def sleep(_: float) -> None:
        seconds.now += step

    monkeypatch.setattr(tasks.levels, "time", SimpleNamespace(monotonic=lambda: seconds.now, sleep=sleep))
    bucket.contended = "level.A"
    with pytest.raises(StockBusy, match=f"^level.A was changed by others {times} times"):
        stock.open(ORDER, wanted(A=1))
    assert KEY not in bucket.entries


def test_a_store_is_taken_over_once(bucket: Bucket, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was cut is done again by what comes next."""
    taken: list[Any] = []

    def take_over(*given: Any) -> None:
        taken.append(given)
        if len(taken) == 1:
            raise RevisionConflict("cut")

    monkeypatch.setattr(tasks.stock, "take_over", take_over)
    with pytest.raises(RevisionConflict):
        stock.available()
    stock.level("A")
    stock.open(ORDER, wanted(A=1))
    stock.cancel(ORDER, 5, "")
    stock.available()
    assert taken == [(bucket, INITIAL)] * 2


# Giving back


def test_release_gives_back_what_a_declined_order_holds(bucket: Bucket, stock: Stock, other: Stock) -> None:
    """And records that, and then drops its notes; what comes late is told what is recorded."""
    stock.open(ORDER, wanted(B=1, A=2))
    moved(stock, "declined")
    bucket.writes.clear()
    released = stock.release(ORDER, 7)
    assert bucket.writes == ["level.A", "level.B", KEY]
    assert (released.record.state, released.record.at["released"], released.fresh) == ("released", 7, True)
    assert stock.available() == INITIAL
    assert {note.kind for note in bucket.level("A").notes.values()} == {GIVEN_BACK}
    stock.restock("A", 0, "r", by="ann", reason="")
    assert bucket.level("A").notes == {}
    assert other.release(ORDER, 8) == replace(released, fresh=False)
    assert stock.available() == INITIAL


@pytest.mark.parametrize("states", [("paid",), ("paid", "confirmed")])
def test_what_was_paid_is_not_released(bucket: Bucket, stock: Stock, states: tuple[str, ...]) -> None:
    stock.open(ORDER, wanted(A=2))
    found = moved(stock, *states)
    bucket.reads.clear()
    assert stock.release(ORDER, 7) == replace(found, fresh=False)
    assert bucket.looks == [False]
    assert stock.available()["A"] == 1


def test_a_record_that_says_nothing_of_a_decline_is_behind(bucket: Bucket, stock: Stock) -> None:
    """None, or one that is held, is read again; then the step waits."""
    with pytest.raises(RecordBehind, match=UNREADABLE):
        stock.release(ORDER, 7)
    stock.open(ORDER, wanted(A=2))
    held = bucket.record
    with pytest.raises(RecordBehind, match=UNREADABLE):
        stock.release(ORDER, 7)
    moved(stock, "declined")
    declined = bucket.record
    bucket.answers[KEY] = [held]
    assert stock.release(ORDER, 7).record.state == "released"
    bucket.answers[KEY] = [declined]
    assert stock.release(ORDER, 8).record.at["released"] == 7
    assert stock.available() == INITIAL


def test_a_record_that_is_being_cancelled_is_read_again(bucket: Bucket, stock: Stock) -> None:
    """It may be cancelled by now, and is not released."""
    stock.open(ORDER, wanted(A=2))
    moved(stock, "cancelling")
    cancelling = bucket.record
    bucket.reads.clear()
    assert stock.release(ORDER, 7).record.state == "cancelling"
    assert bucket.looks == [False, True]
    cancelled = stock.cancel(ORDER, 8, "")
    bucket.answers[KEY] = [cancelling]
    assert stock.release(ORDER, 9) == replace(cancelled, fresh=False)


def test_cancel_ends_an_order_that_was_never_opened(bucket: Bucket, stock: Stock, other: Stock) -> None:
    """What its claim says, a killed process may have taken; it is never opened then."""
    claim = Claim(1, "digest", "c-1", wanted(A=2, B=1).lines, 300, "EUR")
    stock.claims.claim(ORDER, claim)
    other._shelf("B").take(ORDER, 1)
    found = stock.cancel(ORDER, 7, "changed my mind")
    cancelled = Record("cancelled", {"cancelled": 7}, reason="changed my mind")
    assert found == Found(cancelled, bucket.record.revision, fresh=True)
    assert stock.available() == INITIAL
    assert other.open(ORDER, wanted(A=2, B=1)).record == cancelled
    assert stock.available() == INITIAL


def test_cancel_without_a_claim_ends_the_order_alone(bucket: Bucket, stock: Stock) -> None:
    assert stock.cancel(ORDER, 7, "").record.state == "cancelled"
    assert stock.cancel(ORDER, 8, "again").record.at == {"cancelled": 7}
    assert stock.available() == INITIAL


def test_cancel_gives_back_what_an_order_holds(bucket: Bucket, stock: Stock, other: Stock) -> None:
    """Once, after the record says so, although its notes are still there; cancelled again, it changes nothing."""
    stock.claims.claim(ORDER, Claim(1, "digest", "c-1", wanted(B=1, A=2).lines, 300, "EUR"))
    stock.open(ORDER, wanted(B=1, A=2))
    bucket.writes.clear()
    found = stock.cancel(ORDER, 7, "changed my mind")
    assert bucket.writes == [KEY, "level.A", "level.B", KEY]
    assert found.record == replace(
        wanted(B=1, A=2),
        state="cancelled",
        at={"held": NOW, "cancelling": 7, "cancelled": 7},
        reason="changed my mind",
    )
    assert stock.available() == INITIAL
    assert other.cancel(ORDER, 8, "again") == replace(found, fresh=False)
    assert stock.available() == INITIAL


def test_a_cancel_that_was_cut_is_carried_on(bucket: Bucket, stock: Stock, other: Stock) -> None:
    stock.open(ORDER, wanted(A=2, B=1))
    found = moved(stock, "cancelling")
    stock._shelf("A").give_back(ORDER, 2, found)
    assert other.cancel(ORDER, 9, "again").record.at == {"held": NOW, "cancelling": NOW + 1, "cancelled": 9}
    assert stock.available() == INITIAL


@pytest.mark.parametrize("state", ["paid", "declined"])
def test_a_cancel_that_comes_too_late_gives_nothing_back(
    bucket: Bucket, stock: Stock, other: Stock, state: str
) -> None:
    """Whether it finds the order moved on, or is overtaken."""
    stock.open(ORDER, wanted(A=2))
    bucket.before[KEY] = lambda: moved(other, state)
    assert stock.cancel(ORDER, 7, "").record.state == state
    assert stock.cancel(ORDER, 8, "").record.state == state
    assert stock.available()["A"] == 1


def test_a_rejected_order_that_is_cancelled_gives_back_what_was_left_behind(
    bucket: Bucket, stock: Stock, other: Stock
) -> None:
    stock.claims.claim(ORDER, Claim(1, "digest", "c-1", wanted(A=2).lines, 200, "EUR"))
    other._shelf("A").take(ORDER, 2)
    found = other._create(ORDER, wanted(A=2).rejected("OUT_OF_STOCK", "short"))
    assert stock.cancel(ORDER, 7, "") == replace(found, fresh=False)
    assert stock.available() == INITIAL


@pytest.mark.parametrize(("becomes", "left"), [("back", 3), (WRITTEN_OFF, 1)])
def test_what_is_returned_is_in_stock_again_unless_it_is_written_off(
    bucket: Bucket, stock: Stock, becomes: str, left: int
) -> None:
    stock.open(ORDER, wanted(A=2))
    confirmed = moved(stock, "paid", "confirmed")
    assert stock.bring_back(ORDER, confirmed, 7) == confirmed
    moved(stock, "shipped")
    found = moved(stock, "returning", stock=becomes)
    assert stock.available()["A"] == 1
    returned = stock.bring_back(ORDER, found, 7)
    assert (returned.record.state, returned.record.at["returned"]) == ("returned", 7)
    assert stock.bring_back(ORDER, returned, 8) == returned
    assert stock.available()["A"] == left


def test_of_two_that_give_back_one_does(bucket: Bucket, stock: Stock, other: Stock) -> None:
    """The other has an outdated record, and finds out when the notes are gone."""
    stock.open(ORDER, wanted(A=2))
    declined = moved(stock, "declined")
    first = stock.release(ORDER, 7)
    stock.restock("A", 0, "r", by="ann", reason="")
    assert bucket.level("A").notes == {}
    assert other._give_back(ORDER, declined, 8) == replace(first, fresh=False)
    assert stock.available() == INITIAL


def test_a_record_that_changes_and_stays_in_its_state_is_moved_on_all_the_same(
    bucket: Bucket, stock: Stock, other: Stock
) -> None:
    """As by a chargeback of an order that is being returned."""
    stock.open(ORDER, wanted(A=2))
    moved(stock, "paid", "confirmed", "shipped")
    found = moved(stock, "returning", stock="back")
    bucket.before[KEY] = lambda: other.forward(ORDER, found, replace(found.record, tracking="changed"))
    returned = stock.bring_back(ORDER, found, 7)
    assert (returned.record.state, returned.record.tracking) == ("returned", "changed")
    assert stock.available() == INITIAL
