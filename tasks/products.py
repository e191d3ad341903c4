"""The products that are sold: what each is called and costs at which time, as every process knows them.

`product.{sku}`, in the bucket of the stock, holds one product. Its prices are a list of times, each with the price that
holds from then on; no price means that the product is not sold from then on. So a withdrawal is a price too, and a
price may be planned. Its names are such a list as well. Nothing of a product is ever removed, because orders keep
referring to it.

`Catalogue` is the copy of it all in one process. It is read when it is first needed, and a watch keeps it up to date.
While the server is away, or when its store was emptied, it says what it last knew. A change that it has not heard of
yet must cost no one an order: what would be refused by the copy is looked at again after `refresh`.

An empty store begins with the products in `tasks.catalogue`. The mark `catalogue`, written after them, says that it
has them, so that what is there later stays as it is: `python -m tasks.sell` withdraws what is not wanted. Killed in
between, the next process that starts carries on. A store that was emptied under a running process gets back what this
process knew.
"""

from __future__ import annotations

import json
import logging
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from dramatiq_jetstream.errors import KeyExists

from .catalogue import CATALOGUE
from .ports import Bucket, Entry

PREFIX: Final = "product."

#: The key that says that a store has its first contents.
MARK: Final = "catalogue"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Price:
    """What a piece costs from a time (milliseconds) on, in minor units; None: the product is not sold from then on."""

    since: int
    amount: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a product by people: when (milliseconds), by whom, and what, in words, empty for nothing."""

    id: str
    at: int
    by: str
    what: str


@dataclass(frozen=True, slots=True)
class StoredProduct:
    """A product as it is stored.

    Attributes:
      names: What it was called from each time (milliseconds) on; the last one holds.
      prices: By the time from which each holds.
      rank: Where the product stands in the catalogue, lowest first.
      changes: The newest changes of it, oldest first.
    """

    sku: str
    names: tuple[tuple[int, str], ...]
    category: str
    prices: tuple[Price, ...]
    rank: int = 0
    changes: tuple[Change, ...] = ()

    @property
    def name(self) -> str:
        """What the product is called now."""
        return self.names[-1][1] if self.names else ""

    def name_at(self, moment: int) -> str:
        """Return what the product was called at a time."""
        place = bisect_right(self.names, moment, key=lambda name: name[0])
        return self.names[max(0, place - 1)][1]

    def price_at(self, moment: int) -> int | None:
        """Return what a piece costs at a time, None when the product is not sold then."""
        place = bisect_right(self.prices, moment, key=lambda price: price.since)
        return self.prices[place - 1].amount if place else None

    def planned_at(self, moment: int) -> tuple[Price, ...]:
        """Return the prices that begin to hold after a time."""
        return tuple(price for price in self.prices if price.since > moment)

    def encode(self) -> bytes:
        """Return the product as it is stored."""
        stored = {
            "names": [list(one) for one in self.names],
            "category": self.category,
            "prices": [[price.since, price.amount] for price in self.prices],
            "rank": self.rank,
            "changes": [[one.id, one.at, one.by, one.what] for one in self.changes],
        }
        return json.dumps(stored, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, sku: str, value: bytes) -> StoredProduct:
        """Return the product that `encode` stored."""
        stored: dict[str, Any] = json.loads(value)
        return cls(
            sku,
            tuple((since, str(name)) for since, name in stored["names"]),
            stored["category"],
            tuple(Price(*one) for one in stored["prices"]),
            stored["rank"],
            tuple(Change(*one) for one in stored["changes"]),
        )


@dataclass(frozen=True, slots=True)
class Offered:
    """A product that is sold, at the price of the moment."""

    sku: str
    name: str
    unit_price: int
    category: str = ""


class Offer(Mapping[str, Offered]):
    """What is sold at one moment, by sku."""

    def __init__(self, products: Mapping[str, StoredProduct], moment: int) -> None:
        self._products = products
        self._moment = moment

    def __getitem__(self, sku: str) -> Offered:
        product = self._products[sku]
        price = product.price_at(self._moment)
        if price is None:
            raise KeyError(sku)
        return Offered(sku, product.name_at(self._moment), price, product.category)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the skus in the order of the catalogue."""
        for product in in_order(self._products):
            if product.price_at(self._moment) is not None:
                yield product.sku

    def __len__(self) -> int:
        return sum(1 for _ in self)


def in_order(products: Mapping[str, StoredProduct]) -> list[StoredProduct]:
    """Return products in the order of the catalogue."""
    return sorted(products.values(), key=lambda product: (product.rank, product.sku))


def first_products() -> dict[str, StoredProduct]:
    """Return what an empty store begins with."""
    return {
        sku: StoredProduct(sku, ((0, one.name),), one.category, (Price(0, one.unit_price),), rank)
        for rank, (sku, one) in enumerate(CATALOGUE.items())
    }


class Catalogue:
    """The products as this process knows them; any thread may use it.

    Parameters:
      bucket: Where they are kept.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        # Replaced as a whole, so that readers need no lock.
        self._products: dict[str, StoredProduct] = {}
        # By sku, when the entry was stored that is known, and its revision.
        self._read: dict[str, tuple[int, int]] = {}
        self._newest = 0
        self._lock = threading.Lock()

    def load(self) -> Catalogue:
        """Read what is stored; an empty store gets its first contents, one that was emptied what is known here."""
        self._newest = 0
        self.refresh()
        missing = dict(self._products)
        for entry in self._bucket.items(PREFIX):
            missing.pop(entry.key.removeprefix(PREFIX), None)
        is_marked = self._bucket.get(MARK) is not None
        if not is_marked:
            missing = {**first_products(), **missing}
        for sku, product in missing.items():
            with suppress(KeyExists):
                self._bucket.create(f"{PREFIX}{sku}", product.encode())
        if not is_marked:
            with suppress(KeyExists):
                self._bucket.create(MARK, b"")
        if missing:
            self.refresh()
        return self

    def refresh(self) -> None:
        """Read what was changed since the last time that this process read."""
        newest, found = self._newest, []
        for entry in self._bucket.items(PREFIX, after=newest):
            newest = max(newest, entry.revision)
            found.append(entry)
        self._note(found)
        self._newest = newest

    def heard(self, entry: Entry) -> None:
        """Take note of a product as it is stored; for a watch. What cannot be read, or is gone, changes nothing."""
        self._note([entry])

    def _note(self, entries: Iterable[Entry]) -> None:
        """Take note of entries, unless what is known is newer: a watch and a read may cross.

        A store that was made again counts its revisions from the beginning. There a later time tells what is newer.
        """
        changed: dict[str, StoredProduct] = {}
        with self._lock:
            for entry in entries:
                sku = entry.key.removeprefix(PREFIX)
                created, revision = self._read.get(sku, (0, 0))
                if not entry.value or (entry.revision < revision and entry.created <= created):
                    continue
                try:
                    product = StoredProduct.decode(sku, entry.value)
                except (ValueError, TypeError, LookupError) as error:
                    logger.warning("Product %s cannot be read (%s); it stays as it was known.", sku, error)
                    continue
                self._read[sku] = entry.created, entry.revision
                if product != self._products.get(sku):
                    changed[sku] = product
            if changed:
                self._products = {**self._products, **changed}

    def at(self, moment: int) -> Offer:
        """Return what is sold at a time in milliseconds."""
        return Offer(self._products, moment)

    def product(self, sku: str) -> StoredProduct | None:
        """Return a product, whether it is sold or not."""
        return self._products.get(sku)

    def products(self) -> list[StoredProduct]:
        """Return all products in the order of the catalogue, those that are not sold too."""
        return in_order(self._products)
