"""Changes products and their stock for people: each change is made once, as a whole or not at all.

A change names what it changes of a product, of its pieces, or of both. It is one compare-and-set on `product.{sku}`
and, where it changes pieces, on `level.{sku}`: both keys are stored together or none is. So a crash or an interrupt
between any two lines has made the whole change, or nothing of it.

A change has an id, which both keys remember among their newest `MAX_CHANGES`. Made again under its id, after an end
that was not seen, it changes nothing more; after that many other changes of the product it would. A change that found
everything as it is wanted is remembered too, beside those that had an effect. Who made it stands beside it.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final

from dramatiq_jetstream.errors import RevisionConflict

from . import money
from .audit import Act, Who
from .catalogue import CURRENCY
from .events import isoformat
from .levels import PREFIX as LEVEL
from .levels import Level, Short, StockBusy
from .model import Flaw
from .ports import BatchBucket
from .products import PREFIX, Catalogue, Change, Price, StoredProduct
from .stock import Stock
from .text import flaw_of, normalised

MAX_NAME: Final = 120
MAX_CATEGORY: Final = 40
MAX_REASON: Final = 200
#: In minor units.
MAX_PRICE: Final = 10**9
MAX_PIECES: Final = 10**9
#: How far ahead a price can be planned, in milliseconds, and how many can be.
MAX_AHEAD_MS: Final = 5 * 365 * 86_400_000
MAX_PLANNED: Final = 20
#: How many prices and names of the past and how many changes of a product are remembered.
MAX_PAST: Final = 20
MAX_CHANGES: Final = 50
#: For how many milliseconds every price that held is remembered, so that an order of another program that waited for a
#: worker costs what it did when it was stored; and how many prices that can be: the oldest of more are forgotten.
KEPT_MS: Final = 30 * 86_400_000
MAX_KEPT: Final = 1_000

#: How many products are looked at one by one.
FEW: Final = 50

#: By how many milliseconds the clocks of two machines may differ: a price that another one has set "now" is no plan.
SKEW_MS: Final = 2_000

#: How long a change is retried while other processes change its keys, in milliseconds.
TIMEOUT_MS: Final = 10_000

DEFAULT_CATEGORY: Final = "More"

_SKU: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)

#: Records an act before the block under it is entered, and how it ended after; see `tasks.audit`.
Recording = Callable[..., AbstractContextManager[Act]]


class InvalidProduct(ValueError):
    """The change cannot be made; `flaws` are all that is wrong with it."""

    def __init__(self, *flaws: Flaw) -> None:
        super().__init__(" ".join(f"{flaw.field} {flaw.problem}" for flaw in flaws))
        self.flaws = flaws


class NoSuchProduct(Exception):
    """There is no product with this sku."""


class ChangeIdUsed(Exception):
    """The id of the change was used before, for another change of the product."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A change of the pieces that can be sold: `added` to what there is (negative: taken away), or `counted`.

    What was counted is without what orders hold.
    """

    reason: str
    added: int | None = None
    counted: int | None = None

    def and_then(self, next_one: Pieces) -> Pieces:
        """Return the one change that has the effect of this and the next, with both reasons as far as they fit."""
        reason = self.reason
        if next_one.reason not in reason.split("; "):
            reason = normalised(f"{reason}; {next_one.reason}", MAX_REASON)
            reason = reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"
        if next_one.counted is not None:
            return Pieces(reason, counted=next_one.counted)
        added = next_one.added or 0
        if self.counted is not None:
            return Pieces(reason, counted=self.counted + added)
        return Pieces(reason, added=(self.added or 0) + added)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a change makes of a product; None leaves what there is.

    Attributes:
      price: What a piece costs, in minor units, from `since` on (milliseconds; None: from now on).
      withdrawn: The product is not sold any more from now on, nor are planned prices kept.
      dropped: The time of a planned price that is dropped.
    """

    name: str | None = None
    category: str | None = None
    price: int | None = None
    since: int | None = None
    withdrawn: bool = False
    dropped: int | None = None
    pieces: Pieces | None = None

    @property
    def act(self) -> str:
        """What the audit calls the change."""
        if self.withdrawn:
            return "product.withdraw"
        if self.pieces is None or self.changes_product:
            return "product.change"
        return "product.restock" if self.pieces.counted is None else "product.correct"

    @property
    def changes_product(self) -> bool:
        """Whether it is about more than pieces."""
        return self != Wanted(pieces=self.pieces)


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change has made: the product, the pieces that can be sold, and what was done in words, empty for nothing.

    `repeated`: the same change was made before, under its id.
    """

    product: StoredProduct
    stock: int
    what: str
    repeated: bool = False


class Assortment:
    """Changes products and stock.

    Parameters:
      bucket: Where both are kept.
      stock: The levels.
      catalogue: The products as this process knows them; it hears of its own changes at once.
      record: Records in the audit who does what, before it is done.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        bucket: BatchBucket,
        stock: Stock,
        catalogue: Catalogue,
        record: Recording,
        now: Callable[[], int],
    ) -> None:
        self._bucket = bucket
        self._stock = stock
        self._catalogue = catalogue
        self._record = record
        self._now = now

    def change(self, sku: str, change_id: str, wanted: Wanted, who: Who) -> Changed:
        """Make a change, or find that it was made.

        Parameters:
          change_id: Names the change; made again under the same one, it changes nothing more.
          who: Who makes it.

        Raises:
          InvalidProduct: For what cannot be.
          NoSuchProduct: When the change is not one that adds a product.
          ChangeIdUsed: When another change of the product has this id.
          StockBusy: When others kept changing the product.
        """
        check_sku(sku)
        with self._record(wanted.act, sku, who, change=change_id) as act:
            changed = self._change(sku, change_id, wanted, who.name or who.kind)
            act.detail["said"] = "was made before" if changed.repeated else changed.what or "is so already"
        return changed

    def _change(self, sku: str, change_id: str, wanted: Wanted, by: str) -> Changed:
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while True:
            try:
                return self._try(sku, change_id, wanted, by)
            except RevisionConflict as conflict:
                if time.monotonic() > deadline:
                    raise StockBusy(f"product {sku} was changed by others all the time.") from conflict
                time.sleep(random.uniform(0, 0.02))

    def look(self, sku: str) -> Goods:
        """Return a product and its stock as they are stored now; none under a sku that none can have."""
        if _SKU.fullmatch(sku) is None:
            return Goods(sku, None, Level(0), 0, 0)
        entry = self._bucket.get(f"{PREFIX}{sku}")
        product = None if entry is None else StoredProduct.decode(sku, entry.value)
        level, level_revision = self._stock.level(sku)
        return Goods(sku, product, level, 0 if entry is None else entry.revision, level_revision)

    def look_at(self, skus: Collection[str]) -> dict[str, Goods]:
        """Return several products with their stock, as `look`; many of them cost one reading of all that there are."""
        if len(skus) <= FEW:
            return {sku: self.look(sku) for sku in skus}
        entries = {entry.key.removeprefix(PREFIX): entry for entry in self._bucket.items(PREFIX)}
        levels = self._stock.levels()
        found = {}
        for sku in skus:
            entry = entries.get(sku)
            product = None if entry is None else StoredProduct.decode(sku, entry.value)
            level, revision = levels.get(sku) or self._stock.level(sku)
            found[sku] = Goods(sku, product, level, 0 if entry is None else entry.revision, revision)
        return found

    def now(self) -> int:
        """Return the time of a change that is made now, in milliseconds."""
        return self._now()

    def _try(self, sku: str, change_id: str, wanted: Wanted, by: str) -> Changed:
        goods = self.look(sku)
        had = goods.product
        changed = goods.apply(change_id, wanted, by, self._now())
        if changed.repeated:
            return changed
        updates: dict[str, tuple[bytes, int]] = {}
        if wanted.pieces is not None or not goods.level_revision:
            updates[f"{LEVEL}{sku}"] = (goods.level.encode(), goods.level_revision)
        if changed.product != had:
            updates[f"{PREFIX}{sku}"] = (changed.product.encode(), goods.revision)
        if updates:
            self._bucket.update_all(updates)
        if changed.product != had:
            self._catalogue.refresh()
        return changed


@dataclass(slots=True)
class Goods:
    """A product and its stock as they were read; revision 0 stands for what is not stored."""

    sku: str
    product: StoredProduct | None
    level: Level
    revision: int
    level_revision: int

    def apply(self, change_id: str, wanted: Wanted, by: str, at: int) -> Changed:
        """Make a change to what was read, unless it is remembered; returns what it is then.

        Raises:
          InvalidProduct, NoSuchProduct, ChangeIdUsed: As for `Assortment.change`.
        """
        name, change_id = change_id, f"{change_id}#{hashlib.sha256(repr(wanted).encode()).hexdigest()[:8]}"
        if self.product is not None:
            known = {one.id: one.what for one in self.product.changes}
            known |= {one.id: one.reason for one in self.level.adjustments if one.id not in known}
            if change_id in known:
                return Changed(self.product, self.level.pieces, known[change_id], repeated=True)
            if any(one.rpartition("#")[0] == name for one in known):
                raise ChangeIdUsed(f"{name} was the id of another change of {self.sku}.")
        changed, what = altered(self.product, self.sku, wanted, at)
        if what or wanted.pieces is None:
            changes = _remembered((*changed.changes, Change(change_id, at, by, what)))
            changed = replace(changed, changes=changes)
        if (pieces := wanted.pieces) is not None:
            outcome = self.level.adjust(change_id, _count(pieces), at, by, pieces.reason)
            if isinstance(outcome, Short):
                flaw = Flaw("add", f"takes more than there is: {outcome.available} pieces of {self.sku}.")
                raise InvalidProduct(flaw)
            what = "; ".join(filter(None, (what, _pieces_text(pieces))))
        self.product = changed
        return Changed(changed, self.level.pieces, what)


def _remembered(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """Return the newest changes that had an effect, and as many that had none, so that these displace no others."""
    counts: Counter[bool] = Counter()
    kept = []
    for change in reversed(changes):
        had_effect = bool(change.what)
        counts[had_effect] += 1
        if counts[had_effect] <= MAX_CHANGES:
            kept.append(change)
    return tuple(reversed(kept))


def check_sku(sku: str) -> None:
    """Check that a product can have this sku.

    Raises:
      InvalidProduct: When it cannot.
    """
    if _SKU.fullmatch(sku) is None:
        problem = "must be 1 to 64 letters, digits, '-' or '_', and begin with a letter or digit."
        raise InvalidProduct(Flaw("sku", problem))


def altered(product: StoredProduct | None, sku: str, wanted: Wanted, now: int) -> tuple[StoredProduct, str]:
    """Return what a change makes of a product, and in words what it did, empty for nothing.

    Raises:
      InvalidProduct, NoSuchProduct: As for `Assortment.change`.
    """
    is_new = product is None
    if product is None:
        if wanted.withdrawn or wanted.dropped is not None or not wanted.changes_product:
            raise NoSuchProduct(f"There is no product {sku[:64]!r}.")
        product = StoredProduct(sku, (), DEFAULT_CATEGORY, (), rank=now)
    if flaws := [*_flaws(wanted, now, is_new=is_new)]:
        raise InvalidProduct(*flaws)
    words = []
    names = product.names
    name = product.name if wanted.name is None else normalised(wanted.name.strip(), MAX_NAME)
    if name != product.name:
        since = max([now, *(since for since, _ in names)])
        names = (*(one for one in names if one[0] < since), (since, name))[-MAX_PAST:]
    category = (
        product.category if wanted.category is None else normalised(wanted.category.strip(), MAX_CATEGORY)
    )
    if name != product.name and not is_new:
        words.append(f"renamed to {name}")
    if category != product.category and not is_new:
        words.append(f"moved to category {category}")
    prices = list(product.prices)
    if wanted.dropped is not None:
        kept = [price for price in prices if price.since != wanted.dropped or price.since <= now]
        if len(kept) < len(prices):
            words.append(f"price from {isoformat(wanted.dropped)} dropped")
        prices = kept
    if wanted.withdrawn and (product.price_at(now) is not None or product.planned_at(now)):
        prices = [*(price for price in prices if price.since < _beginning(prices, now))]
        prices.append(Price(_beginning(product.prices, now), None))
        words.append("withdrawn")
    elif wanted.price is not None and not wanted.withdrawn:
        since = _beginning(prices, now) if wanted.since is None else wanted.since
        others = [price for price in prices if price.since != since]
        new = sorted([*others, Price(since, wanted.price)], key=lambda price: price.since)
        before = replace(product, prices=tuple(prices)).price_at(since)
        if before != wanted.price:
            prices = new
            held = money.to_text(wanted.price, CURRENCY)
            words.append(f"price {held}" if wanted.since is None else f"price {held} from {isoformat(since)}")
    past = [price for price in prices if price.since <= now]
    planned = [price for price in prices if price.since > now]
    if len(planned) > MAX_PLANNED:
        raise InvalidProduct(
            Flaw("from", f"would be one planned price more than {MAX_PLANNED}: drop one first.")
        )
    changed = replace(product, names=names, category=category, prices=(*_kept(past, now), *planned))
    if is_new:
        words = ["added", *words]
    return changed, ", ".join(words)


def _kept(past: list[Price], now: int) -> list[Price]:
    """Return the prices of the past that are remembered."""
    held = bisect_right(past, now - KEPT_MS, key=lambda price: price.since) - 1
    first = min(held, len(past) - MAX_PAST)
    return past[max(0, first, len(past) - MAX_KEPT) :]


def _beginning(prices: list[Price] | tuple[Price, ...], now: int) -> int:
    """Return the time that a change from now on holds from: not before what others have set with their clocks."""
    return max([now, *(price.since for price in prices if price.since <= now + SKEW_MS)])


def _flaws(wanted: Wanted, now: int, *, is_new: bool) -> Iterator[Flaw]:
    if wanted.name is None and is_new:
        yield Flaw("name", "is needed for a new product.")
    for field, text, most in (("name", wanted.name, MAX_NAME), ("category", wanted.category, MAX_CATEGORY)):
        if text is not None and (flaw := flaw_of(normalised(text.strip(), most), most)):
            yield Flaw(field, flaw)
    if wanted.price is None and is_new:
        yield Flaw("unit_price_minor", "is needed for a new product.")
    if wanted.price is not None and not 1 <= wanted.price <= MAX_PRICE:
        yield Flaw("unit_price_minor", f"must be a whole number of minor units from 1 to {MAX_PRICE}.")
    if wanted.since is not None:
        if wanted.price is None:
            yield Flaw("from", "needs a price that holds from then on.")
        if not now - SKEW_MS <= wanted.since <= now + MAX_AHEAD_MS:
            yield Flaw("from", "must be a time from now on, within five years.")
    if wanted.pieces is not None:
        yield from flaws_of_pieces(wanted.pieces)


def flaws_of_pieces(pieces: Pieces) -> Iterator[Flaw]:
    """Yield what is wrong with a change of pieces, whatever there is of its product."""
    if (pieces.added is None) == (pieces.counted is None):
        yield Flaw("add", "or count must be given, and not both.")
    for field, number, least in (("add", pieces.added, -MAX_PIECES), ("count", pieces.counted, 0)):
        if number is not None and not least <= number <= MAX_PIECES:
            yield Flaw(field, f"must be a whole number from {least} to {MAX_PIECES}.")
    if flaw := flaw_of(normalised(pieces.reason.strip(), MAX_REASON), MAX_REASON):
        yield Flaw("reason", flaw)


def _count(pieces: Pieces) -> Callable[[int], int]:
    if pieces.counted is not None:
        counted = pieces.counted
        return lambda _: counted
    added = pieces.added or 0
    return lambda there: there + added


def _pieces_text(pieces: Pieces) -> str:
    if pieces.counted is not None:
        return f"{pieces.counted} pieces counted ({pieces.reason})"
    return f"{pieces.added or 0:+} pieces ({pieces.reason})"
