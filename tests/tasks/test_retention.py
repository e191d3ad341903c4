"""Orders leave for the archive and come back, whatever is killed when: each event is in one place, and none is lost."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tasks.archive
import tasks.erasure
import tasks.retention
from dramatiq_jetstream.streams import Range, StoredMessage
from orders.v1.events_pb2 import OrderReserved
from tasks.archive import Archive, ArchiveBroken, ArchiveBusy, Segment
from tasks.audit import Who
from tasks.claims import Claim
from tasks.compensation import NotCancellable
from tasks.entries import KINDS
from tasks.erased import ErasedOrders
from tasks.erasure import Erasure
from tasks.erasure_jobs import Job, Jobs, NotErasable
from tasks.events import Happened, UnusableEvent, order_id_of, subject_of
from tasks.figures import Counting, Figures, Numbers
from tasks.ledger import Chargeback
from tasks.notes import GivenUp
from tasks.orders import Orders
from tasks.projection import Projection
from tasks.rebuild import Rebuild
from tasks.retention import MARK, Chronicle, Retention, find_mark
from tasks.stream import merged, read_stored
from tasks.webhooks.health import Health
from tasks.webhooks.subscriptions import Directory, Subscriptions
from tests.tasks.fakes import FakeBucket
from tests.tasks.test_saga_properties import Service, created

DAY = 86_400_000


class Events:
    """The stream of a `Service` as `tasks.stream` offers it; an event was stored at 1,000 + its sequence.

    Attributes:
      clock: Returns when the event with a sequence was stored.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.first = 1
        self.gone: set[int] = set()
        self.behind: tuple[int, str] | None = None
        self.facts: Callable[[], Iterator[Happened]] = lambda: iter(())
        self.clock: Callable[[int], int] = lambda sequence: 1_000 + sequence

    def range(self) -> Range:
        return Range(self.first, len(self._service.stream.stored))

    def stored(self, start: int = 1) -> Iterator[StoredMessage]:
        for one in self._service.stream.stored[max(start, self.first) - 1 :]:
            if one.sequence not in self.gone:
                data = one.event.SerializeToString(deterministic=True)
                headers = {"Request-Id": f"r-{one.sequence}"}
                yield StoredMessage(
                    "ORDERS", one.sequence, subject_of(one.event), data, headers, self.clock(one.sequence)
                )

    def read(self, start: int = 1) -> Iterator[Happened]:
        return (found for one in self.stored(start) if (found := read_stored(one)) is not None)

    present = read

    def erased(self) -> Iterator[Happened]:
        return self.facts()

    def newest_event(self) -> int:
        return len(self._service.stream.stored)

    def settled_to(self) -> tuple[int, str] | None:
        return self.behind

    def trim(self, before: int) -> None:
        self._service.world.pause("before the trim")
        self.first = max(self.first, before)
        self._service.world.pause("after the trim")

    def erase(self, sequence: int) -> bool:
        self._service.world.pause(f"before {sequence} is erased")
        there = sequence >= self.first and sequence not in self.gone
        self.gone.add(sequence)
        return there


class Shop:
    """A service with an archive; time passes when the test says so."""

    def __init__(self, directory: Path, orders: int, *, unfinished: int = 0) -> None:
        self.service = Service(window=False)
        self.events = Events(self.service)
        self.directory = directory
        self.forgotten: set[str] = set()
        self.counted = sys.maxsize
        self.erasures = FakeBucket(self.service.world.pause)
        for number in range(orders):
            token = ("tok_ok", "tok_declined")[number % 3 == 1]
            self.place(f"o-{number}", token)
        self.service.finish()
        for number in range(unfinished):
            event = created(f"u-{number}", [("TEE-01", 1)])
            self.service.stream.append(event)
            self.service.step("reserve", self.service.stream.stored[-1])
            for stored in self.service.stream.stored[-2:]:
                self.service.project(stored)
            self.service.seen = len(self.service.stream.stored)

    def place(self, order_id: str, token: str = "tok_ok") -> None:
        self.service.stream.append(created(order_id, [("MUG-01", 1)], token))
        self.service.deliver_new()

    def retention(self, *, until: int | None = None) -> Retention:
        """Return a process that archives what was stored before a place."""
        last = len(self.service.stream.stored) if until is None else until
        return Retention(
            Archive(self.directory),
            self.events,  # type: ignore[arg-type]
            self.service.stock_bucket,
            Orders(self.service.orders_bucket),
            self.service.orders_bucket,
            self.erased(),
            lambda orders: self.forgotten.update(order.order_id for order in orders),
            lambda: self.counted,
            keep=DAY,
            now=lambda: DAY + 1_001 + last,
        )

    def erased(self) -> ErasedOrders:
        return ErasedOrders(self.erasures, self.service.stock(), self.service.now)

    def rebuild(self) -> Any:
        self.events.facts = self.erased().facts
        chronicle = Chronicle(Archive(self.directory), self.events)  # type: ignore[arg-type]
        return Rebuild(
            self.service.orders_bucket,
            self.service.stock(),
            chronicle,
            self.service.catalogue,
            lambda done, of: None,
            self.service.now,
        ).run()

    def archived(self) -> list[int]:
        archive = Archive(self.directory)
        return [
            line["event"]["sequence"]
            for segment in archive.segments()
            for line in archive.lines(segment)
            if "event" in line
        ]

    def records(self) -> dict[str, Any]:
        return {key: json.loads(entry.value) for key, entry in self.service.orders_bucket.entries.items()}

    def ledger(self) -> dict[str, bytes]:
        entries = self.service.stock_bucket.entries.items()
        return {key: entry.value for key, entry in entries if key.partition(".")[0] in KINDS}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments, and no waiting for a disk."""
    monkeypatch.setattr(tasks.retention, "MAX_EVENTS", 7)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_nothing_is_lost_and_nothing_twice(seed: int) -> None:
    """Killed between any two effects, again and again, while events of strangers and late refunds come in."""
    chance = random.Random(seed)
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        shop = Shop(Path(directory), 6, unfinished=chance.randrange(2))
        world = shop.service.world
        replace = Path.replace

        def pausing(part: Path, path: Path) -> Path:
            world.pause("before the rename")
            replaced = replace(part, path)
            world.pause("after the rename")
            return replaced

        patch.setattr(Path, "replace", pausing)
        ledger, records = shop.ledger(), shop.records()
        changed: set[str] = set()
        for last in (False, False, False, False, False, True):
            until = len(shop.service.stream.stored) if last else chance.randrange(30)
            task = world.start("archive", lambda until=until: shop.retention(until=until).run())  # type: ignore[misc]
            while not task.done:
                if chance.random() < 0.02:
                    refund(shop, f"o-{chance.randrange(6)}", changed)
                crash = not last and chance.random() < 0.08
                world.step(task, crash=crash)
                if crash:
                    check(shop)
        shop.service.finish()
        check(shop)
        # Those that left are closed, and the others as they were.
        for key, entry in shop.service.stock_bucket.entries.items():
            kind, _, order_id = key.partition(".")
            if kind == "claim" and Claim.decode(entry.value).is_archived:
                assert order_id not in shop.service.orders_bucket.entries
                assert order_id in shop.forgotten
                assert [k for k in shop.ledger() if k.partition(".")[2] == order_id] == [key]
        # The read model is made again from archive, stream and ledger.
        kept = shop.records()
        shop.service.orders_bucket.entries.clear()
        shop.rebuild()
        assert shop.records() == kept
        # All that left comes back as it was.
        list(shop.retention().restore(None))
        now, there = shop.ledger(), shop.records()
        same = {key: value for key, value in ledger.items() if key.partition(".")[2] not in changed}
        assert {key: now[key] for key in same} == same
        assert {order_id: there[order_id] for order_id in records.keys() - changed} == {
            order_id: record for order_id, record in records.items() if order_id not in changed
        }
        assert there.keys() == records.keys()
        shop.rebuild()
        assert shop.records() == there


def refund(shop: Shop, order_id: str, changed: set[str]) -> None:
    """Refund a part of a confirmed order, as an operator does while it is archived."""
    record = shop.service.records().get(order_id)
    if record is None or record.state != "confirmed" or order_id in changed:
        return
    current, shop.service.world._current = shop.service.world._current, None
    try:
        shop.service.saga().request_refund(order_id, "part", 100, "late")
        changed.add(order_id)
        work(shop)
    finally:
        shop.service.world._current = current


def work(shop: Shop) -> None:
    """Do what was published, as workers do."""
    shop.service.deliver_new()
    while shop.service.pending:
        step, stored = shop.service.pending.pop(0)
        if step == "project":
            shop.service.project(stored)
        else:
            shop.service.step(step, stored)
        shop.service.deliver_new()


def check(shop: Shop) -> None:
    """Every event is in the archive or in the stream; what left the stream is in the archive, once."""
    archived = shop.archived()
    assert archived == sorted(set(archived))
    assert archived == list(range(1, len(archived) + 1))
    assert shop.events.first <= len(archived) + 1
    archive = Archive(shop.directory)
    for segment in archive.segments():
        for line in archive.lines(segment):
            if "event" in line:
                order_id = order_id_of(read_stored(tasks.archive.stored_in(line)).event)  # type: ignore[union-attr]
                assert not order_id.startswith("u-"), "it is not final"


def test_an_order_that_is_changed_while_it_leaves_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is killed with its segment written, the order refunded: the next run leaves it, a later one does not."""
    shop = Shop(tmp_path, 2)
    with monkeypatch.context() as patch:

        def killed(self: Retention, segment: Segment) -> None:
            raise KeyboardInterrupt

        patch.setattr(Retention, "_leave", killed)
        patch.setattr(tasks.retention, "MAX_EVENTS", 100)
        with pytest.raises(KeyboardInterrupt):
            shop.retention().run()
    refund(shop, "o-0", set())
    young = shop.retention(until=0)
    assert young.run().segments == 0
    assert shop.service.records().keys() == {"o-0"}
    assert shop.records().keys() == {"o-0"}
    assert shop.forgotten == {"o-1"}
    assert shop.retention().run().orders == 1
    assert shop.ledger().keys() == {"claim.o-0", "claim.o-1"}
    list(shop.retention().restore(["o-0"]))
    assert [one.amount for one in shop.service.records()["o-0"].refunds] == [100]


@pytest.mark.parametrize("what", ["refund", "cancel", "chargeback", "return"])
@pytest.mark.parametrize("restored", [False, True])
def test_what_was_just_accepted_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, restored: bool
) -> None:
    """An order that is to be refunded, cancelled or returned since the run looked at it stays until that is done."""
    shop = Shop(tmp_path, 1)
    service = shop.service
    if what == "return":
        service.saga().request_shipment("o-0")
        work(shop)
    later = shop.retention()
    if restored:
        shop.retention().run()
        list(shop.retention().restore(["o-0"]))
        shop.place("o-9")
        service.finish()
        later = shop.retention()
        now = later._now
        later._now = lambda: now() + 10 * DAY
    # The run has found that the order is over, and goes on from there.
    looker, name = (later._orders, "get") if restored else (later, "_next")
    look, accepted = getattr(looker, name), []

    def looked(*arguments: Any) -> Any:
        found = look(*arguments)
        if not accepted:
            accepted.append(accept(service, what))
        return found

    monkeypatch.setattr(looker, name, looked)
    later.run()
    assert accepted
    assert "order.o-0" in shop.ledger()
    assert "o-0" in shop.records()
    work(shop)
    assert (Orders(service.orders_bucket).get("o-0").status, service.gateway.refunds) == {  # type: ignore[union-attr]
        "refund": ("confirmed", {"o-0.part": ("ch_o-0", 100)}),
        "cancel": ("cancelled", {"o-0.cancel": ("ch_o-0", 1290)}),
        "chargeback": ("confirmed", {}),
        "return": ("returned", {"o-0.return": ("ch_o-0", 1290)}),
    }[what]


def accept(service: Service, what: str) -> int | None:
    match what:
        case "refund":
            return service.saga().request_refund("o-0", "part", 100, "late")
        case "cancel":
            return service.saga().request_cancel("o-0", "customer")
        case "chargeback":
            return service.saga().charge_back("o-0", "ch_o-0", Chargeback("cb-1", 100, service.now()))
        case _:
            return service.saga().request_return("o-0", "back")


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_a_cancel_is_accepted_or_its_order_leaves(seed: int) -> None:
    """Whichever effect of a run of the archive a cancel comes between: what was accepted is done, or it is refused."""
    chance = random.Random(seed)
    with TemporaryDirectory() as directory:
        shop = Shop(Path(directory), 1)
        world, answers = shop.service.world, list[str]()

        def cancel() -> None:
            try:
                shop.service.saga().request_cancel("o-0", "customer")
            except NotCancellable as refusal:
                answers.append(str(refusal))
            else:
                answers.append("accepted")

        tasks_ = [world.start("archive", lambda: shop.retention().run()), world.start("cancel", cancel)]
        steps = [0] * chance.randrange(60) + [1] * chance.randrange(12)
        for number in steps:
            if not tasks_[number].done:
                world.step(tasks_[number])
        while not all(task.done for task in tasks_):
            world.step(chance.choice([task for task in tasks_ if not task.done]))
        if answers == ["accepted"]:
            assert "order.o-0" in shop.ledger()
            work(shop)
            assert shop.service.records()["o-0"].state == "cancelled"
        else:
            assert "archive" in answers[0]
            assert "cancel.o-0" not in shop.ledger()
            assert shop.retention().run().held_by == ""


def test_a_cancel_that_was_accepted_holds_the_rest(tmp_path: Path) -> None:
    """The read model does not show it yet."""
    shop = Shop(tmp_path, 1)
    shop.service.saga().request_cancel("o-0", "customer")
    assert shop.retention().run().held_by == "order o-0 is to be cancelled"
    work(shop)
    assert shop.retention().run().held_by == ""
    assert shop.ledger().keys() == {"claim.o-0"}


def test_what_stays_is_said(tmp_path: Path) -> None:
    """An order that is not final, one whose money may have to go back, and a consumer that is behind hold the rest."""
    shop = Shop(tmp_path, 2, unfinished=1)
    place = next(one.sequence for one in shop.events.read() if order_id_of(one.event) == "u-0")
    said = shop.retention().run()
    assert said.held_by == "order u-0 is reserved"
    assert (shop.events.first, said.events, said.orders) == (place, place - 1, 2)

    other = Shop(tmp_path / "other", 2)
    (tmp_path / "other").mkdir()
    other.events.behind = (3, "dramatiq-project_event")
    said = other.retention().run()
    assert (said.events, said.held_by) == (3, "the consumer dramatiq-project_event has not settled event 4")
    other.events.behind = None
    other.service.stock().notes.unsettle("o-0", 1, 1)
    assert "money of order o-0" in other.retention().run().held_by


def test_events_stay_that_the_figures_have_not_counted(tmp_path: Path) -> None:
    """They could never be counted: the figures are of the stream."""
    shop = Shop(tmp_path, 3)
    figures = Counting(
        FakeBucket(),
        shop.events,  # type: ignore[arg-type]
        Orders(shop.service.orders_bucket),
        lambda happened: None,
        lambda: 10**12,
    )
    shop.counted = figures.reached()
    said = shop.retention().run()
    assert (said.events, said.held_by) == (0, "the figures have not counted event 1")
    assert figures.advance()
    shop.counted = figures.reached()
    assert (shop.retention().run().held_by, shop.records()) == ("", {})


def test_young_events_stay(tmp_path: Path) -> None:
    """By the time at which they were stored."""
    shop = Shop(tmp_path, 2)
    assert shop.retention(until=3).run().events == 3
    assert shop.retention(until=3).run().events == 0
    assert shop.events.first == 4
    assert find_mark(shop.service.stock_bucket).last == 3  # type: ignore[union-attr]


def test_a_run_comes_to_its_end_while_events_grow_old(tmp_path: Path) -> None:
    """One more is old enough whenever the time is asked for; those that were when it began are archived."""
    shop = Shop(tmp_path, 2)
    retention = shop.retention(until=3)
    retention._now = iter(range(DAY + 1_001 + 3, sys.maxsize)).__next__
    assert (retention.run().segments, shop.archived()) == (1, [1, 2, 3])


def test_an_order_whose_restore_was_killed_stays_until_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half back, it would leave with a closed claim, and its content would be lost."""
    shop = Shop(tmp_path, 1)
    ledger = shop.ledger()
    shop.retention().run()

    update = shop.service.stock_bucket.update

    def killed(key: str, *arguments: Any, **options: Any) -> int:
        if key == "claim.o-0":
            raise KeyboardInterrupt
        return update(key, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shop.service.stock_bucket, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            list(shop.retention().restore(["o-0"]))
    shop.place("o-9")
    shop.service.finish()
    retention = shop.retention()
    now = retention._now
    retention._now = lambda: now() + 10 * DAY
    assert retention.run().orders == 1
    assert list(shop.retention().restore(["o-0"])) == ["o-0"]
    back = {key: value for key, value in shop.ledger().items() if key.endswith(".o-0")}
    assert back.pop("restored.o-0")
    assert back == ledger


def test_an_archived_order_is_not_begun_again(tmp_path: Path) -> None:
    """Its events come again, its id is asked for again, it is to be cancelled: nothing happens to it."""
    shop = Shop(tmp_path, 3)
    stored = list(shop.service.stream.stored)
    pieces = shop.service.pieces()
    shop.retention().run()
    ledger = shop.ledger()
    assert ledger.keys() == {"claim.o-0", "claim.o-1", "claim.o-2"}
    for one in stored:
        shop.service.project(one)
        for step in ("reserve", "pay", "confirm", "release", "undo", "settle"):
            if step == "reserve" and subject_of(one.event) != "ORDER.created":
                continue
            with pytest.raises(Exception, match=r"."):  # UnusableEvent, or NotCancellable
                getattr(shop.service.saga(), step)(one.event)
    with pytest.raises(tasks.compensation.NotCancellable, match="is in the archive"):
        shop.service.saga().request_cancel("o-0", "operator")
    assert (shop.ledger(), shop.records(), shop.service.pieces()) == (ledger, {}, pieces)
    assert len(shop.service.stream.stored) == len(stored)


def test_a_restored_order_leaves_again(tmp_path: Path) -> None:
    """After its time, with what was done to it since."""
    shop = Shop(tmp_path, 2)
    shop.retention().run()
    assert list(shop.retention().restore(["o-0", "nobody"])) == ["o-0"]
    assert list(shop.retention().restore(["o-0"])) == []
    assert Orders(shop.service.orders_bucket).get("o-0").status == "confirmed"  # type: ignore[union-attr]
    shop.place("o-9")
    shop.service.finish()
    retention = shop.retention()
    assert retention.run().orders == 1  # not the restored one: it has just come back
    now = retention._now
    retention._now = lambda: now() + 10 * DAY
    shop.place("o-10")
    shop.service.finish()
    assert retention.run().orders == 2
    assert shop.ledger().keys() == {f"claim.o-{number}" for number in (0, 1, 9, 10)}


def test_no_order_comes_back_while_a_run_takes_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be half there: open, and without its record."""
    shop = Shop(tmp_path, 1)
    bucket = shop.service.stock_bucket
    delete, refused = bucket.delete, []

    def deleting(key: str, **options: Any) -> None:
        if key == "order.o-0":
            with pytest.raises(ArchiveBroken, match="Another process is changing the archive"):
                list(shop.retention().restore(["o-0"]))
            refused.append(key)
        delete(key, **options)

    monkeypatch.setattr(bucket, "delete", deleting)
    assert shop.retention().run().orders == 1
    assert refused
    assert shop.ledger().keys() == {"claim.o-0"}
    assert list(shop.retention().restore(["o-0"])) == ["o-0"]
    assert "order.o-0" in shop.ledger()


@pytest.mark.parametrize("killed", [False, True])
def test_what_is_noted_of_an_order_without_its_record_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Its claim stays closed: an open one without a record would have the order begin again."""
    shop = Shop(tmp_path, 1)
    bucket, notes = shop.service.stock_bucket, shop.service.stock().notes
    notes.give_up("o-0", "pay", GivenUp(1, "the gateway is down", "m-1"))
    delete = bucket.delete

    def deleting(key: str, **options: Any) -> None:
        delete(key, **options)
        if key == "order.o-0":
            notes.give_up("o-0", "refund", GivenUp(2, "the gateway is down", "m-2"))
            if killed:
                raise KeyboardInterrupt

    monkeypatch.setattr(bucket, "delete", deleting)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            shop.retention().run()
    shop.retention().run()
    assert shop.ledger().keys() == {"claim.o-0"}
    assert Claim.decode(shop.ledger()["claim.o-0"]).is_archived
    assert shop.records() == {}
    assert list(shop.retention().restore(["o-0"])) == ["o-0"]


def test_a_note_of_an_order_in_the_archive_is_dropped(tmp_path: Path) -> None:
    """A refund is refused whose order left between its note and its decision; nothing is looked at again for it."""
    shop = Shop(tmp_path, 1)
    shop.retention().run()
    notes = shop.service.stock().notes
    notes.unsettle("o-0", 1, 1)
    assert shop.service.saga().settle_order("o-0") == "archived"
    assert list(notes.unsettled()) == []
    with pytest.raises(UnusableEvent):
        shop.service.saga().settle_order("o-0")


@pytest.mark.parametrize("harm", ["cut", "changed", "line", "missing", "first", "last"])
def test_a_damaged_archive_is_noticed(tmp_path: Path, harm: str) -> None:
    """Nothing is restored from it, rebuilt from it or added to it; what is wrong is said."""
    shop = Shop(tmp_path, 6)
    shop.retention().run()
    segments = Archive(tmp_path).segments()
    assert len(segments) >= 3
    path = segments[1].path
    match harm:
        case "cut":
            path.write_bytes(path.read_bytes()[:-20])
        case "changed":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "line":
            lines = tasks.archive.gzip.decompress(path.read_bytes()).splitlines(keepends=True)
            path.write_bytes(tasks.archive.gzip.compress(b"".join([*lines[:1], *lines[2:]])))
        case "missing":
            path.unlink()
        case "first":
            segments[0].path.unlink()
        case "last":
            segments[-1].path.unlink()
    if harm not in ("first", "last"):
        with pytest.raises(ArchiveBroken, match=r"damaged|not whole"):
            list(shop.retention().restore(None))
        with pytest.raises(ArchiveBroken):
            shop.rebuild()
    if harm in ("missing", "first", "last"):
        with pytest.raises(ArchiveBroken, match="not whole"):
            shop.retention().run()


def test_one_archive_for_one_store(tmp_path: Path) -> None:
    """Another directory, another store's archive, and two processes at once are refused."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    shop = Shop(tmp_path / "mine", 2)
    with Archive(shop.directory).alone(), pytest.raises(ArchiveBroken, match="Another process"):
        shop.retention().run()
    shop.retention().run()
    stranger = Shop(shop.directory, 1)
    with pytest.raises(ArchiveBroken, match="another store's"):
        stranger.retention().run()
    shop.directory = tmp_path / "other"
    with pytest.raises(ArchiveBroken, match="another archive"):
        shop.retention().run()
    shop.directory = tmp_path / "nowhere"
    with pytest.raises(ArchiveBroken, match="ARCHIVE_DIR names a directory"):
        shop.retention().run()


def test_every_entry_of_an_order_is_known(tmp_path: Path) -> None:
    """A kind of entry that is new would be left behind by the archive: put it into `tasks.entries`."""
    shop = Shop(tmp_path, 6, unfinished=2)
    shop.service.saga().cancel("o-0", "a reason")
    shop.service.saga().fail("o-1", "pay", "the gateway is down", "m-1")
    kinds = {key.partition(".")[0] for key in shop.service.stock_bucket.entries}
    assert kinds - {"level", "levels", MARK.partition(".")[0]} <= set(KINDS)


class Lists:
    """Stands for the index: it is told what it has to forget."""

    def forget_customer(self, customer_id: str, keeps: Callable[[str], bool]) -> None:
        pass


def erase(shop: Shop, customer_id: str, at: int) -> Job:
    """Erase a customer, or carry the erasure on."""
    erasure = erasure_at(shop, at)
    return erasure.run(erasure.begin(customer_id, Who("ann", "operator", "command")).id)


def erasure_at(
    shop: Shop, at: int, deliveries: FakeBucket | None = None, webhooks: FakeBucket | None = None
) -> Erasure:
    service = shop.service
    buckets = {name: FakeBucket() for name in ("requests", "tokens", "access")}
    buckets["deliveries"] = deliveries or FakeBucket()
    buckets["webhooks"] = webhooks or FakeBucket()
    return Erasure(
        Jobs(
            shop.erasures,
            "erasures",
            lambda subject, **_: iter(()),
            lambda: len(service.stream.stored),
            lambda: at,
        ),
        shop.events,  # type: ignore[arg-type]
        service.stock(),
        service.stock_bucket,
        Orders(service.orders_bucket),
        service.orders_bucket,
        shop.erased(),
        Lists(),  # type: ignore[arg-type]
        buckets,
        {},
        NoStream(),  # type: ignore[arg-type]
        lambda subject, data, headers: None,
        Archive(shop.directory),
        lambda: shop.counted,
        lambda: at,
    )


class NoStream:
    """The records of a dashboard with which nothing was ever changed."""

    def read(self) -> Iterator[StoredMessage]:
        return iter(())


def test_an_erased_order_that_came_back_is_made_again(tmp_path: Path) -> None:
    """Its events are nowhere, and no note says where they stood: what the ledger confirms of it stays in a rebuild."""
    shop = Shop(tmp_path, 1)
    event = created("o-1", [("TEE-01", 1)])
    event.customer_id = "another"
    shop.service.stream.append(event)
    shop.service.deliver_new()
    shop.service.finish()
    assert erase(shop, "c-1", 10**9).is_done
    shop.retention().run()
    list(shop.retention().restore(["o-0"]))
    there = shop.records()
    shop.rebuild()
    assert (shop.records(), there.keys()) == (there, {"o-0"})


@pytest.mark.parametrize("archived", ["before", "meanwhile"])
def test_what_was_sent_about_an_archived_order_is_erased(tmp_path: Path, archived: str) -> None:
    """The order left before the erasure was asked for, or when it was killed with the order anonymous."""
    shop = Shop(tmp_path, 1)
    event = created("o-1", [("TEE-01", 1)])
    event.customer_id = "another"
    shop.service.stream.append(event)
    shop.service.deliver_new()
    shop.service.finish()
    deliveries = FakeBucket()
    for order_id in ("o-0", "o-1"):
        deliveries.create(f"wh.{order_id}", json.dumps({"order_id": order_id}).encode())
    if archived == "before":
        shop.retention().run()
    dying = erasure_at(shop, 10**9, deliveries)
    job = dying._jobs.begin("c-1", Who("ann", "operator", "command"))
    if archived == "meanwhile":
        dying._clear(job, dying._stages()[0])
        shop.retention().run()
    assert erasure_at(shop, 10**9, deliveries).run(job.id).is_done
    assert deliveries.entries.keys() == {"wh.o-1"}
    assert not [entry.key for entry in shop.erasures.items("order.")]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_an_erasure_leaves_the_books_as_they_are(seed: int) -> None:
    """Some orders archived, some restored, the erasure killed at any effect; then records are made from nothing."""
    chance = random.Random(seed)
    with TemporaryDirectory() as directory:
        shop = Shop(Path(directory), 6)
        world = shop.service.world
        for number in (6, 7):
            event = created(f"o-{number}", [("TEE-01", 1)])
            event.customer_id = "another"
            shop.service.stream.append(event)
            shop.service.deliver_new()
        shop.service.finish()
        total = len(shop.service.stream.stored)
        shop.retention(until=chance.randrange(total + 1)).run()
        if chance.random() < 0.5:
            list(shop.retention().restore([f"o-{chance.randrange(6)}"]))
        there, pieces = shop.records(), shop.service.pieces()
        at = 10**9
        for last in (False, False, False, False, True):
            task = world.start("erase", lambda: erase(shop, "c-1", at))
            while not task.done:
                world.step(task, crash=not last and chance.random() < 0.05)
        jobs = [Job(**json.loads(entry.value)) for entry in shop.erasures.items("job.")]
        assert all(job.is_done for job in jobs)
        theirs = {order_id for order_id, record in there.items() if record["customer_id"] == "c-1"}
        assert sum(job.counts.get("orders", 0) for job in jobs) == len(theirs)

        def of_them(record: dict[str, Any]) -> dict[str, Any]:
            facts = {key: (fact["sequence"], fact["at"]) for key, fact in record["events"].items()}
            return {"events": facts, "items": record["items"], "total": record["total"]}

        now = shop.records()
        assert {key: of_them(one) for key, one in now.items()} == {
            key: of_them(one) for key, one in there.items()
        }
        assert {key for key, one in now.items() if one["customer_id"] == "c-1"} == set()
        assert {key: now[key] for key in now.keys() - theirs} == {
            key: there[key] for key in there.keys() - theirs
        }
        assert shop.service.pieces() == pieces
        stored = [*shop.service.stock_bucket.entries.values(), *shop.service.orders_bucket.entries.values()]
        assert not [entry.key for entry in stored if b'"c-1"' in entry.value]
        assert not [one for one in shop.events.stored() if b"\x03c-1" in one.data]
        archive = Archive(shop.directory)
        for segment in archive.segments():
            for line in archive.lines(segment):
                assert "c-1" not in json.dumps(line.get("order", ""))
                if "event" in line:
                    assert b"\x03c-1" not in tasks.archive.stored_in(line).data
        shop.service.orders_bucket.entries.clear()
        shop.rebuild()
        assert shop.records() == now


@pytest.mark.parametrize("reserved", [False, True])
def test_an_erasure_leaves_an_order_alone_that_is_under_way(tmp_path: Path, reserved: bool) -> None:
    """It was claimed before the erasure was asked for, by a request that failed, and is placed by the repeated one."""
    shop = Shop(tmp_path, 1)
    service = shop.service
    erasure = erasure_at(shop, 10**9)
    job = erasure.begin("c-1", Who("ann", "operator", "command"))
    service.stream.append(created("n-0", [("MUG-01", 1)]))
    if reserved:
        service.step("reserve", service.stream.stored[-1])
    for stored in service.stream.stored[service.seen :]:
        service.project(stored)
    ledger, records = shop.ledger(), shop.records()
    with pytest.raises(NotErasable, match="under way: n-0"):
        erasure.run(job.id)
    assert (shop.ledger(), shop.records(), shop.events.gone) == (ledger, records, set())
    work(shop)
    assert service.records()["n-0"].state == "confirmed"
    assert erasure.run(job.id).counts["orders"] == 2
    assert not [one for one in shop.ledger().values() if b"c-1" in one]


@pytest.mark.parametrize("archived", [False, True])
def test_what_came_of_an_order_since_an_erasure_was_asked_for_is_erased(
    tmp_path: Path, archived: bool
) -> None:
    """It was claimed before, placed after, cancelled with a reason, and perhaps archived before the erasure goes on."""
    shop = Shop(tmp_path, 1)
    service, placed = shop.service, len(shop.service.stream.stored)
    event = created("n-0", [("MUG-01", 1)])
    service.claim(event)
    at = service.now()
    job = erasure_at(shop, at)._jobs.begin("c-1", Who("ann", "operator", "page"))
    shop.events.clock = lambda sequence: sequence if sequence <= placed else at + sequence
    service.stream.append(event)
    work(shop)
    service.saga().request_cancel("n-0", "operator", "she moved to Rome")
    work(shop)
    assert service.records()["n-0"].state == "cancelled"
    if archived:
        retention = shop.retention()
        retention._now = lambda: 10 * DAY
        assert retention.run().orders == 2
    assert erasure_at(shop, at).run(job.id).is_done
    assert not [one for one in shop.events.stored() if b"\x03c-1" in one.data or b"Rome" in one.data]
    archive = Archive(tmp_path)
    lines = [line for segment in archive.segments() for line in archive.lines(segment)]
    assert bool(lines) == archived
    for line in lines:
        data = tasks.archive.stored_in(line).data if "event" in line else json.dumps(line).encode()
        assert b"c-1" not in data
        assert b"Rome" not in data
    if not archived:
        there = shop.records()
        shop.rebuild()
        assert shop.records() == there


def test_an_erasure_does_not_depend_on_the_clocks(tmp_path: Path) -> None:
    """Where it is asked for the clock is behind all others; what was there is erased, what is placed since is not."""
    shop = Shop(tmp_path, 2)
    # Of no order of this service.
    shop.service.stream.append(OrderReserved(order_id="x-0", customer_id="c-1"))
    work(shop)
    erasure = erasure_at(shop, 500)
    job = erasure.begin("c-1", Who("ann", "operator", "command"))
    shop.place("n-0")
    shop.service.finish()
    assert erasure.run(job.id).counts["orders"] == 2
    left = {order_id_of(one.event) for one in shop.events.read()}
    assert left == {"n-0"}
    assert {key for key, one in shop.records().items() if one["customer_id"] == "c-1"} == {"n-0"}


def test_a_process_that_has_a_webhook_in_memory_learns_that_it_is_erased(tmp_path: Path) -> None:
    """It is on no list, and gets no deliveries, when the erasure is done."""
    shop, webhooks = Shop(tmp_path, 1), FakeBucket()
    subscriptions = Subscriptions(webhooks, [Fernet.generate_key().decode()], (), lambda: 1_000)
    made, _ = subscriptions.add("https://ann.example/hook", [], "Ann's shop", "c-1", "ann")
    others, _ = subscriptions.add("https://bob.example/hook", [], "", "c-2", "bob")
    Health(webhooks, lambda: 1_000).failed(made.id, "Ann is not here")
    directory = Directory(webhooks)
    assert len(directory.refresh()) == 2
    erasure = erasure_at(shop, 10**9, webhooks=webhooks)
    job = erasure.run(erasure.begin("c-1", Who("ann", "operator", "command")).id)
    assert job.counts["webhooks"] == 1
    assert directory.refresh() == [others]
    assert not [one.key for one in webhooks.items() if b"Ann" in one.value or b"c-1" in one.value]


def test_an_order_that_broke_a_rule_counts_after_its_erasure(tmp_path: Path) -> None:
    """The ledger has nothing of what it asked for; that it was placed, and rejected, stays."""
    shop = Shop(tmp_path, 1)
    broken = created("b-0", [("MUG-01", 1)])
    broken.items[0].sku = "ann's own"
    shop.service.stream.append(broken)
    shop.service.deliver_new()
    shop.service.finish()
    projection = Projection(
        shop.service.stock(),
        Orders(shop.service.orders_bucket),
        shop.service.catalogue,
        shop.service.now,
    )
    bucket = FakeBucket()

    def counting() -> Counting:
        orders = Orders(shop.service.orders_bucket)
        return Counting(bucket, shop.events, orders, projection.project, lambda: 10_000_000)  # type: ignore[arg-type]

    def counted() -> Numbers:
        (span,), _ = Figures(bucket, lambda: 10_000).days(1)
        return span.numbers

    counting().advance()
    before = counted()
    assert (before.placed, before.rejected) == (2, 1)
    assert erase(shop, "c-1", 10**9).is_done
    assert not [one.key for one in shop.service.stock_bucket.items("claim.") if b"ann" in one.value]
    shop.events.read = lambda start=1: merged(shop.events.present(start), shop.erased().facts())  # type: ignore[method-assign]
    counting().rebuild()
    assert counted() == before
    there = shop.records()
    # Another program says it once more.
    shop.service.stream.append(broken)
    work(shop)
    shop.rebuild()
    assert shop.records() == there


def test_no_event_is_erased_before_the_figures_have_counted_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The erasure waits for them, says so when they do not come, and goes on when it is asked again."""
    monkeypatch.setattr("tasks.erasure._PATIENCE_SECONDS", 0.0)
    shop = Shop(tmp_path, 1)
    shop.counted = len(shop.service.stream.stored) - 1
    with pytest.raises(NotErasable, match="index_orders has not counted event"):
        erase(shop, "c-1", 10**9)
    assert shop.events.gone == set()
    (job,) = list(shop.erasures.items("problem."))
    assert b"index_orders" in job.value
    shop.counted = sys.maxsize
    assert erase(shop, "c-1", 10**9).is_done
    assert {key.partition(".")[0] for key in shop.erasures.entries} == {"job", "order"}


def test_what_was_erased_is_said_in_the_order_of_its_places(tmp_path: Path) -> None:
    """Orders whose events stand between one another's, erased one after the other; each event once."""
    shop = Shop(tmp_path, 4)
    places = dict(enumerate(shop.events.read(), start=1))
    erase(shop, "c-1", 10**9)
    said = list(shop.erased().facts())
    assert [one.sequence for one in said] == [one.sequence for one in places.values()]
    assert [type(one.event) for one in said] == [type(one.event) for one in places.values()]


def test_a_process_that_may_wait_has_the_archive_when_another_is_done(tmp_path: Path) -> None:
    """An erasure is not refused because the archive runs every few minutes."""
    waiting, had = threading.Event(), []

    def wait() -> None:
        waiting.set()
        with Archive(tmp_path).alone(patience=60):
            had.append("waiting")

    with Archive(tmp_path).alone():
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(60)
        time.sleep(0.3)
        had.append("first")
    thread.join(60)
    assert had == ["first", "waiting"]


def test_an_erasure_and_a_run_of_the_archive_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that had read the events would write them into a file that the erasure does not see."""
    shop = Shop(tmp_path, 1)
    retention = shop.retention()
    following, erase_event, refused = retention._next, shop.events.erase, []

    def reading(first: int, oldest: int) -> Any:
        stretch = following(first, oldest)
        with pytest.raises(ArchiveBusy):
            erase(shop, "c-1", 10**9)
        refused.append("erasure")
        return stretch

    def erasing(sequence: int) -> bool:
        for meanwhile in (shop.retention().run, lambda: list(shop.retention().restore(None))):
            with pytest.raises(ArchiveBusy):
                meanwhile()
        refused.append("run")
        return erase_event(sequence)

    monkeypatch.setattr(tasks.erasure, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(retention, "_next", reading)
    monkeypatch.setattr(shop.events, "erase", erasing)
    retention._now = lambda: DAY + 1_003
    assert retention.run().events == 2
    assert erase(shop, "c-1", 10**9).is_done
    assert set(refused) == {"erasure", "run"}
    archive = Archive(tmp_path)
    for segment in archive.segments():
        for line in archive.lines(segment):
            assert "event" not in line or b"\x03c-1" not in tasks.archive.stored_in(line).data
