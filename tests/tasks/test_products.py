"""Products and prices as data: what holds when, what a change makes of it, and how processes hear of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks.accept import Acceptance
from tasks.assortment import (
    MAX_CHANGES,
    MAX_KEPT,
    Assortment,
    ChangeIdUsed,
    InvalidProduct,
    NoSuchProduct,
    Pieces,
    Wanted,
    altered,
)
from tasks.audit import Act, Who
from tasks.catalogue import CATALOGUE
from tasks.claims import Claims
from tasks.idempotency import Requests
from tasks.model import InvalidOrder, OrderRequest
from tasks.orders import Orders
from tasks.parsing import parse_order_protobuf
from tasks.pricing import claimed, first_record
from tasks.product_files import InvalidFile, ProductFile, RowDone
from tasks.products import MARK, PREFIX, Catalogue, Price, StoredProduct
from tasks.stock import Stock
from tests.support.polling import eventually
from tests.tasks.fakes import FakeBucket, FakeEntry, fake_tokens

NOW = 1_700_000_000_000
DAY_MS = 86_400_000
INITIAL = {sku: one.initial_stock for sku, one in CATALOGUE.items()}


ANN = Who("ann", "operator", "command")


@contextlib.contextmanager
def unrecorded(act: str, target: str, who: Who, **detail: str) -> Iterator[Act]:
    """Stands for an audit that nothing is read from."""
    yield Act("a", act, target, who.name, who.kind, who.via, who.address, NOW, detail=dict(detail))


class Store:
    """The products of one store, as one process has them."""

    def __init__(self, bucket: FakeBucket | None = None) -> None:
        self.bucket = bucket or FakeBucket()
        self.at = NOW
        self.catalogue = Catalogue(self.bucket).load()
        self.stock = Stock(self.bucket, INITIAL, self.now)
        self.assortment = Assortment(self.bucket, self.stock, self.catalogue, unrecorded, self.now)
        self.ids = itertools.count()

    def now(self) -> int:
        return self.at

    def change(self, sku: str, change_id: str | None = None, **wanted: object) -> str:
        change = Wanted(**wanted)  # type: ignore[arg-type]
        return self.assortment.change(sku, change_id or f"c-{next(self.ids)}", change, ANN).what

    def price(self, sku: str, at: int | None = None) -> int | None:
        offered = self.catalogue.at(self.at if at is None else at).get(sku)
        return None if offered is None else offered.unit_price


@pytest.fixture
def store() -> Store:
    return Store()


def test_an_empty_store_begins_with_the_constants(store: Store) -> None:
    """In their order, with their prices; another process and another start change nothing of it."""
    assert list(store.catalogue.at(0)) == list(CATALOGUE)
    assert store.price("MUG-01", 0) == CATALOGUE["MUG-01"].unit_price
    store.change("MUG-01", name="Mug")
    before = dict(store.bucket.entries)
    again = Store(store.bucket)
    assert again.bucket.entries == before
    assert again.catalogue.products()[0].name == "Mug"


def test_a_seeding_that_was_cut_is_carried_on() -> None:
    """Killed after any write: the next process that starts has all of it."""
    whole = Store().bucket.entries
    for cut in range(len(CATALOGUE) + 1):
        bucket = FakeBucket()
        for key in list(whole)[:cut]:
            if key != MARK:
                bucket.create(key, whole[key].value)
        assert list(Store(bucket).catalogue.at(0)) == list(CATALOGUE)


def test_a_store_that_was_emptied_gets_back_what_is_known(store: Store) -> None:
    """Products that were added, and prices that were changed, too."""
    store.change("CUP-01", name="Cup", price=500, pieces=Pieces("first", added=3))
    store.change("MUG-01", price=2_000)
    store.bucket.entries.clear()
    assert store.price("CUP-01") == 500
    store.catalogue.load()
    again = Store(store.bucket)
    again.at = NOW
    assert (again.price("CUP-01"), again.price("MUG-01")) == (500, 2_000)


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"name": 1}', b"null"])
def test_what_cannot_be_read_changes_nothing(store: Store, value: bytes) -> None:
    """Something else wrote it, or removed it."""
    store.bucket.update(f"{PREFIX}MUG-01", value, revision=store.bucket.entries[f"{PREFIX}MUG-01"].revision)
    store.catalogue.refresh()
    assert store.price("MUG-01") == CATALOGUE["MUG-01"].unit_price


def test_prices_hold_from_their_time(store: Store) -> None:
    """What holds now, what is planned, and what is dropped again."""
    store.change("MUG-01", price=1_500)
    store.change("MUG-01", price=900, since=NOW + 1_000_000)
    store.change("MUG-01", price=1_600, since=NOW + 2_000_000)
    times = (NOW - 1, NOW, NOW + 999_999, NOW + 1_000_000, NOW + 2_000_000)
    assert [store.price("MUG-01", at) for at in times] == [1_290, 1_500, 1_500, 900, 1_600]
    assert "dropped" in store.change("MUG-01", dropped=NOW + 1_000_000)
    assert store.price("MUG-01", NOW + 1_000_000) == 1_500
    assert store.change("MUG-01", dropped=NOW) == ""
    assert store.price("MUG-01") == 1_500


def test_a_change_by_a_clock_that_is_behind_holds(store: Store) -> None:
    """Another machine, a second ahead, has set a price before."""
    store.at = NOW + 1_000
    store.change("MUG-01", price=1_500)
    store.at = NOW
    store.change("MUG-01", price=1_600)
    assert store.price("MUG-01", NOW + 1_000) == 1_600


def test_withdrawn_and_sold_again(store: Store) -> None:
    """A withdrawal takes planned prices with it; the name stays, a new price sells the product again."""
    store.change("MUG-01", price=900, since=NOW + 1_000_000)
    assert store.change("MUG-01", withdrawn=True) == "withdrawn"
    assert store.price("MUG-01") is store.price("MUG-01", NOW + 1_000_000) is None
    assert "MUG-01" not in store.catalogue.at(NOW)
    product = store.catalogue.product("MUG-01")
    assert product is not None
    assert product.name == "Enamel mug"
    assert store.change("MUG-01", withdrawn=True) == ""
    store.at += 10_000
    store.change("MUG-01", price=1_000)
    assert (store.price("MUG-01", NOW + 5_000), store.price("MUG-01")) == (None, 1_000)


def test_a_change_is_made_once(store: Store) -> None:
    """Under its id, whatever was changed since; its product and its pieces together."""
    wanted = {"name": "Cup", "price": 500, "pieces": Pieces("first", added=3)}
    store.change("CUP-01", "k", **wanted)
    store.change("CUP-01", price=600)
    before = dict(store.bucket.entries)
    assert store.assortment.change("CUP-01", "k", Wanted(**wanted), ANN).repeated  # type: ignore[arg-type]
    assert store.bucket.entries == before
    assert (store.price("CUP-01"), store.stock.available()["CUP-01"]) == (600, 3)
    with pytest.raises(ChangeIdUsed):
        store.change("CUP-01", "k", price=700)


def test_a_change_without_an_effect_is_remembered(store: Store) -> None:
    """Its id is that of this change alone, and what had an effect is not forgotten for it."""
    store.change("MUG-01", "first", price=1_500)
    assert store.change("MUG-01", "same", price=1_500) == ""
    with pytest.raises(ChangeIdUsed):
        store.change("MUG-01", "same", price=1_600)
    assert store.price("MUG-01") == 1_500
    store.change("MUG-01", price=1_600)
    assert store.change("MUG-01", "same", price=1_500) == "", "it was made before"
    assert store.price("MUG-01") == 1_600
    for _ in range(2 * MAX_CHANGES):
        store.change("MUG-01", price=1_600)
    with pytest.raises(ChangeIdUsed):
        store.change("MUG-01", "first", price=1_700)
    assert len(store.bucket.entries[f"{PREFIX}MUG-01"].value) < 20_000


def test_what_is_remembered_is_bounded(store: Store) -> None:
    """The record of a product does not grow with the number of its changes, nor does a price that holds get lost."""
    for number in range(120):
        store.at += 4 * DAY_MS
        store.change("MUG-01", price=1_000 + number)
    product = StoredProduct.decode("MUG-01", store.bucket.entries[f"{PREFIX}MUG-01"].value)
    assert len(product.changes) == MAX_CHANGES
    assert len(product.prices) < 30
    assert store.price("MUG-01") == 1_119
    prices = tuple(Price(store.at - number, number) for number in reversed(range(2 * MAX_KEPT)))
    busy, _ = altered(replace(product, prices=prices), "MUG-01", Wanted(price=1), store.at + 1)
    assert len(busy.prices) == MAX_KEPT


def test_every_price_of_a_month_is_remembered(store: Store) -> None:
    """An order of another program may wait as long for a worker; it costs what it did when it was stored."""
    for number in range(60):
        store.at += DAY_MS
        store.change("MUG-01", price=1_000 + number)
    first = store.at
    for number in range(100):
        store.at += 1_000
        store.change("MUG-01", price=2_000 + number)
    times = (first - 29 * DAY_MS, first - 1, first, first + 1_000, store.at)
    assert [store.price("MUG-01", at) for at in times] == [1_030, 1_058, 1_059, 2_000, 2_099]


@pytest.mark.parametrize(
    ("sku", "wanted", "fields"),
    [
        ("a b", Wanted(name="X", price=1), ["sku"]),
        ("x" * 65, Wanted(name="X", price=1), ["sku"]),
        ("-x", Wanted(name="X", price=1), ["sku"]),
        ("NEW", Wanted(category="X"), ["name", "unit_price_minor"]),
        ("NEW", Wanted(name=" ", category="\n", price=0), ["name", "category", "unit_price_minor"]),
        ("NEW", Wanted(name="a\u202eb", price=10**9 + 1), ["name", "unit_price_minor"]),
        ("MUG-01", Wanted(since=NOW + 5), ["from"]),
        ("MUG-01", Wanted(price=5, since=NOW - 10_000), ["from"]),
        ("MUG-01", Wanted(price=5, since=NOW + 10**13), ["from"]),
        ("MUG-01", Wanted(pieces=Pieces("why")), ["add"]),
        ("MUG-01", Wanted(pieces=Pieces("why", added=1, counted=1)), ["add"]),
        ("MUG-01", Wanted(pieces=Pieces("", counted=-1)), ["count", "reason"]),
        ("MUG-01", Wanted(pieces=Pieces("why", added=-100_001)), ["add"]),
        ("MUG-01", Wanted(name="Mug", pieces=Pieces("why", added=-100_001)), ["add"]),
    ],
)
def test_what_cannot_be_changed_is_named(store: Store, sku: str, wanted: Wanted, fields: list[str]) -> None:
    """All of it at once, and nothing is stored, not a part of it either."""
    before = dict(store.bucket.entries)
    with pytest.raises(InvalidProduct) as refusal:
        store.assortment.change(sku, "k", wanted, ANN)
    assert [flaw.field for flaw in refusal.value.flaws] == fields
    assert {k: v for k, v in store.bucket.entries.items() if k.startswith(PREFIX)} == {
        k: v for k, v in before.items() if k.startswith(PREFIX)
    }


@pytest.mark.parametrize("wanted", [Wanted(withdrawn=True), Wanted(dropped=1), Wanted(pieces=Pieces("x", 1))])
def test_a_product_that_never_was(store: Store, wanted: Wanted) -> None:
    with pytest.raises(NoSuchProduct, match="There is no product 'NONE'"):
        store.assortment.change("NONE", "k", wanted, ANN)


# What an order costs


def event(*items: tuple[str, int], total: float, order_id: str = "o-1") -> OrderCreated:
    return OrderCreated(
        order_id=order_id,
        customer_id="c-1",
        items=[OrderItem(sku=sku, quantity=quantity) for sku, quantity in items],
        total_amount=total,
    )


def test_the_price_of_the_time_counts_at_which_an_event_was_stored(store: Store) -> None:
    """A worker that comes late prices an order of another program as one that came at once would have."""
    claims, placed = Claims(store.bucket), event(("MUG-01", 2), total=25.8)
    store.at += 5_000
    store.change("MUG-01", price=2_000)
    store.change("TEE-01", withdrawn=True)
    claim = claimed(claims, "o-1", placed, store.catalogue, NOW, store.now)
    assert first_record(claim, placed, 1).total == 2_580
    shirt = event(("TEE-01", 1), total=24.5, order_id="o-2")
    assert claimed(claims, "o-2", shirt, store.catalogue, NOW, store.now).lines
    late = event(("TEE-01", 1), total=24.5, order_id="o-3")
    claim = claimed(claims, "o-3", late, store.catalogue, store.at, store.now)
    record = first_record(claim, late, 1)
    assert (record.state, record.code) == ("rejected", "UNKNOWN_SKU")


def test_nothing_of_the_catalogue_reaches_an_order_that_was_claimed(store: Store) -> None:
    """Not a price, a name or a withdrawal, neither an order that was held nor one that was rejected."""
    claims = Claims(store.bucket)
    good, bad = event(("MUG-01", 2), total=25.8), event(("MUG-01", 2), total=40.0, order_id="o-2")
    for one in (good, bad):
        claimed(claims, one.order_id, one, store.catalogue, NOW, store.now)
    store.change("MUG-01", name="Cup", price=2_000)
    again = claimed(claims, "o-1", good, store.catalogue, store.at, store.now)
    record = first_record(again, good, 1)
    assert (record.state, record.total, again.names) == ("held", 2_580, {"MUG-01": "Enamel mug"})
    again = claimed(claims, "o-2", bad, store.catalogue, store.at, store.now)
    record = first_record(again, bad, 1)
    assert (record.state, record.code) == ("rejected", "TOTAL_MISMATCH")
    assert "25.80 EUR" in record.reason


def test_a_change_that_was_not_heard_of_costs_no_order(store: Store) -> None:
    """Another process added a product and changed a price a moment ago."""
    worker = Store(store.bucket)
    store.change("CUP-01", name="Cup", price=500)
    store.change("MUG-01", price=2_000)
    claims, placed = Claims(store.bucket), event(("CUP-01", 1), ("MUG-01", 1), total=25.0)
    claim = claimed(claims, "o-1", placed, worker.catalogue, NOW, worker.now)
    assert claim.total == 2_500


def test_an_older_state_takes_nothing_back(store: Store) -> None:
    """A watch tells of a change after a read has shown the next one; of a store that was made again all is newer."""
    old = store.bucket.entries[f"{PREFIX}MUG-01"]
    store.change("MUG-01", price=2_000)
    store.catalogue.heard(old)
    assert store.price("MUG-01") == 2_000
    store.catalogue.heard(FakeEntry(old.key, old.value, 1, created=1))
    assert store.price("MUG-01") == CATALOGUE["MUG-01"].unit_price


def test_an_order_tells_nothing_of_the_one_whose_id_it_names(store: Store) -> None:
    """It is read with what is sold now; the same customer's own is read with what it was placed with."""
    claims, placed = Claims(store.bucket), event(("TEE-01", 1), total=24.5)
    claimed(claims, "o-1", placed, store.catalogue, NOW, store.now)
    store.at += 1
    store.change("TEE-01", withdrawn=True)
    requests = Requests(FakeBucket(), lease=1_000, now=store.now)
    acceptance = Acceptance(
        *(requests, claims, store.catalogue, Orders(FakeBucket()), fake_tokens()),
        *(lambda *_, **__: 0, lambda *_: None),
        timeout=1_000,
        now=store.now,
    )

    def read(customer_id: str) -> OrderRequest:
        return acceptance.offered(
            lambda offer: parse_order_protobuf(placed.SerializeToString(), customer_id, offer=offer),
            None,
            lambda: "o-1",
        )

    assert read("c-1").items[0].sku == "TEE-01"
    placed.customer_id = "c-2"
    with pytest.raises(InvalidOrder, match="TEE-01"):
        read("c-2")


# Files


def imported(store: Store, text: str, import_id: str | None = None) -> list[str]:
    rows = ProductFile(text.encode(), import_id).run(store.assortment, ANN)
    return [("again" if row.repeated else row.what) if isinstance(row, RowDone) else str(row) for row in rows]


FILE = """sku,name,category,price,from,add,count,reason,withdraw
CUP-01,"Cup, blue",Kitchen,5.00,,10,,,
CUP-01,,,4.50,2026-12-01,,,,
MUG-01,,,,,,90,two are broken,
TEE-01,,,,,,,,yes
"""


def test_a_file_is_imported_once(store: Store) -> None:
    """A dry run changes nothing; the same file again changes nothing more, and carries on one that was cut."""
    before = dict(store.bucket.entries)
    plan = ProductFile(FILE.encode()).plan(store.assortment)
    assert plan[0].what == "added, price 5.00 EUR; +10 pieces (restock)"
    assert {k: v for k, v in store.bucket.entries.items() if k in before} == before
    assert f"{PREFIX}CUP-01" not in store.bucket.entries
    rows = ProductFile(FILE.encode()).run(store.assortment, ANN)
    next(rows)  # killed here
    assert imported(store, FILE)[0] == "again"
    assert imported(store, FILE) == ["again"] * 4
    assert store.stock.available()["CUP-01"] == 10
    assert store.stock.available()["MUG-01"] == 90
    assert (store.price("CUP-01"), store.price("CUP-01", 1_900_000_000_000)) == (500, 450)
    assert store.price("TEE-01") is None
    imported(store, FILE, "another delivery")
    assert store.stock.available()["CUP-01"] == 20


def test_many_rows_of_one_product_count_once(store: Store) -> None:
    """More of them than a product remembers changes, wherever an import is cut off, and in their order."""
    before = store.stock.available()["MUG-01"]
    text = "sku,add,count,reason\n" + "MUG-01,1,,\n" * 120
    rows = ProductFile(text.encode()).run(store.assortment, ANN)
    for _ in range(55):
        next(rows)  # and killed here
    assert set(imported(store, text)) == set(imported(store, text)) == {"again"}
    assert store.stock.available()["MUG-01"] == before + 120
    counted = "sku,add,count,reason\nMUG-01,5,,in\nMUG-01,,70,counted\nMUG-01,-1,,broken\n"
    assert imported(store, counted) == [
        "69 pieces counted (in; counted; broken)",
        "its pieces count with line 2",
        "its pieces count with line 2",
    ]
    assert imported(store, counted) == ["again"] * 3
    assert store.stock.available()["MUG-01"] == 69


def test_a_file_changes_no_product_more_often_than_it_remembers(store: Store) -> None:
    """So that what was imported is known when the file comes again."""
    text = "sku,price\n" + "".join(f"MUG-01,{number + 1}\n" for number in range(MAX_CHANGES))
    imported(store, text)
    assert set(imported(store, text)) == {"again"}
    with pytest.raises(InvalidFile, match=f"line {MAX_CHANGES + 2}, sku: is changed by more than 50 rows"):
        imported(store, f"{text}MUG-01,99\n")


def test_rows_whose_pieces_count_together_are_left_out_together(store: Store) -> None:
    """With the line that says why."""
    with pytest.raises(InvalidFile) as refusal:
        imported(store, "sku,add\nMUG-01,-100000\nMUG-01,-100000\n")
    assert [(error.line, error.column) for error in refusal.value.errors] == [(2, "add"), (3, "row")]


def test_all_errors_of_a_file_are_named_with_their_lines(store: Store) -> None:
    """In the file, and in what the products make of it; nothing is imported."""
    text = """sku,name,price,from,add,count,reason
OK-01,Fine,1.00,,,,

NEW-01,,1.00,,,,
MUG-01,,1.234,soon,,,
MUG-01,,,,five,,
MUG-01,,,,-200000,,
MUG-01,,,,,5,
a b,"two
lines",1.00,,,,
MUG-01,,,,1,2,x,y,z
MUG-01,,,,,,
"""
    before = {k: v for k, v in store.bucket.entries.items() if k.startswith(PREFIX)}
    with pytest.raises(InvalidFile) as refusal:
        imported(store, text)
    assert [(error.line, error.column) for error in refusal.value.errors] == [
        (4, "name"),
        (5, "price"),
        (5, "from"),
        (6, "add"),
        (7, "add"),
        (8, "reason"),
        (9, "sku"),
        (11, "row"),
        (12, "row"),
    ]
    assert {k: v for k, v in store.bucket.entries.items() if k.startswith(PREFIX)} == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "names no column sku"),
        (b"name,price\nX,1\n", "names no column sku"),
        (b"sku,colour\nX,1\n", "'colour'"),
        (b"sku,sku\nX,1\n", "sku twice"),
        (b"sku;name\nX;Y\n", "names no column sku"),
        (b"sku,name\n", "has no rows"),
        (b"sku,name\nX,\xff\n", "line 2, file: is not UTF-8"),
        (b'sku,name\nX,"open\n', "is not CSV"),
        (b"x" * 1_000_001, "is larger"),
    ],
)
def test_what_is_no_file_of_products(store: Store, content: bytes, said: str) -> None:
    """One sentence says what is wrong with it."""
    with pytest.raises(InvalidFile, match=said):
        ProductFile(content).plan(store.assortment)


def test_a_file_of_a_spreadsheet_is_read(store: Store) -> None:
    """With a byte order mark, CR and LF, and spaces around."""
    assert imported(store, "\ufeffSKU , Price\r\n MUG-01 , 15.50 \r\n") == ["price 15.50 EUR"]
    assert store.price("MUG-01") == 1_550


# A real bucket


def test_a_process_hears_of_changes(own_nats_server: NatsServer) -> None:
    """By its watch, also after the server was away; a store that was emptied leaves it what it knew."""
    ours, others = JetStreamBroker(own_nats_server.url), JetStreamBroker(own_nats_server.url)
    catalogue = Catalogue(ours.bucket("stock")).load()
    watch = ours.bucket("stock").watch(PREFIX, catalogue.heard)

    def price() -> int | None:
        offered = catalogue.at(NOW).get("MUG-01")
        return None if offered is None else offered.unit_price

    def change(price: int) -> None:
        bucket = others.bucket("stock")
        stock = Stock(bucket, INITIAL, lambda: NOW)
        other = Catalogue(bucket).load()
        Assortment(bucket, stock, other, unrecorded, lambda: NOW).change(
            "MUG-01", f"p-{price}", Wanted(price=price), ANN
        )

    try:
        change(1_500)
        eventually(lambda: price() == 1_500, timeout=30)
        own_nats_server.kill()
        assert price() == 1_500
        own_nats_server.start()
        eventually(lambda: ours.connection.is_connected and others.connection.is_connected, timeout=60)
        change(1_600)
        eventually(lambda: price() == 1_600, timeout=30)
        others.connection.request(others.connection.api_subject("STREAM.DELETE.KV_dramatiq-stock"), b"")
        assert price() == 1_600
        catalogue.load()
        change(1_700)
        eventually(lambda: price() == 1_700, timeout=60)
    finally:
        watch.close()
        ours.close()
        others.close()


def test_two_processes_change_a_product_at_once(broker: JetStreamBroker) -> None:
    """Each of five changes is made by both of them: it counts once."""

    def work(process: int) -> int:
        bucket = broker.bucket("stock")
        stock = Stock(bucket, INITIAL, lambda: NOW)
        shop = Assortment(bucket, stock, Catalogue(bucket).load(), unrecorded, lambda: NOW)
        wanted = Wanted(name="Cup", price=500, pieces=Pieces("in", added=10))
        done = [shop.change("CUP-01", f"c-{number}", wanted, ANN) for number in range(5)]
        return sum(not one.repeated for one in done)

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(work, range(2))) == 5
    level = Stock(broker.bucket("stock"), INITIAL, lambda: NOW).level("CUP-01")[0]
    assert (level.pieces, len(level.adjustments)) == (50, 5)
