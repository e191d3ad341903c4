"""Sorted lists of orders in a bucket: found newest first, in a number of reads that does not depend on their length.

A list is one document while it is short. A long one has a head, which says where each of its parts begins, and parts of
at most `PART` orders; a head of a million orders is some 30 kB. All documents are read by their key, which costs the
server the same however many there are.

One program writes at a time, and stores each of its batches all or none (`tasks.index`). Any number read meanwhile: a
part says where the next one begins, so a reader notices that one was split after it read the head, and looks again.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from .folds import Position, read_position
from .ports import Bucket

#: The fold whose results the lists are.
LISTS: Final = "lists"
USED: Final = f"{LISTS}.position"

#: How many orders a list has in one document.
SHORT: Final = 64

#: How many orders a part of a longer list has at most.
PART: Final = 256


class Posting(NamedTuple):
    """An order in a list: where the event stands that placed it, and the status that it had when that was noted."""

    place: int
    order_id: str
    status: str


class Replaced(Exception):
    """The lists of this generation were removed while they were read."""


def newest(bucket: Bucket, generation: int, name: str, before: int) -> Iterator[Posting]:
    """Yield the orders of a list that were placed before a place of the stream, newest first.

    Raises:
      Replaced: When the list went away meanwhile; the next generation has it.
    """
    while True:
        entry = bucket.get(_head_key(generation, name))
        if entry is None:
            position = read_position(bucket, USED)
            if position is None or position.generation != generation:
                raise Replaced
            return  # a list without orders
        head = json.loads(entry.value)
        if "orders" in head:
            yield from _before(head["orders"], before)
            return
        starts: list[int] = head["starts"]
        number = bisect_left(starts, before) - 1
        following = starts[number + 1] if number + 1 < len(starts) else None
        while number >= 0:
            entry = bucket.get(_part_key(generation, name, starts[number]))
            if entry is None:
                raise Replaced
            part = json.loads(entry.value)
            if part["next"] != following:
                break  # it was split: the head has changed as well
            yield from _before(part["orders"], before)
            before = following = starts[number]
            number -= 1
        else:
            return


def drop_empty(bucket: Bucket, generation: int, name: str) -> None:
    """Remove the documents of a list that has no orders; its name stands in their keys.

    Raises:
      RevisionConflict: When it was changed meanwhile; parts may be gone that had none.
    """
    head = bucket.get(_head_key(generation, name))
    if head is None:
        return
    parts = [
        bucket.get(_part_key(generation, name, start)) for start in json.loads(head.value).get("starts", ())
    ]
    documents = [one for one in (head, *parts) if one is not None]
    if not any(json.loads(one.value).get("orders") for one in documents):
        for one in documents:
            bucket.delete(one.key, revision=one.revision)


def _before(orders: list[list[Any]], before: int) -> Iterator[Posting]:
    for order in reversed(orders[: bisect_left(orders, before, key=lambda one: one[0])]):
        yield Posting(*order)


def _head_key(generation: int, name: str) -> str:
    return f"{LISTS}.{generation}.head.{name}"


def _part_key(generation: int, name: str, start: int) -> str:
    return f"{LISTS}.{generation}.part.{start}.{name}"


@dataclass(slots=True)
class _Document:
    """Orders by their places, sorted, and the revision that they were read in; 0 when they were not there."""

    revision: int
    places: list[int]
    orders: list[Posting]
    changed: bool = False

    @classmethod
    def of(cls, revision: int, stored: Iterable[list[Any]]) -> _Document:
        orders = [Posting(*order) for order in stored]
        return cls(revision, [order.place for order in orders], orders)

    def find(self, place: int) -> Posting | None:
        at = bisect_left(self.places, place)
        return self.orders[at] if at < len(self.places) and self.places[at] == place else None

    def put(self, posting: Posting) -> None:
        at = bisect_left(self.places, posting.place)
        if at < len(self.places) and self.places[at] == posting.place:
            if self.orders[at] == posting:
                return
            self.orders[at] = posting
        else:
            self.places.insert(at, posting.place)
            self.orders.insert(at, posting)
        self.changed = True

    def discard(self, place: int) -> None:
        at = bisect_left(self.places, place)
        if at < len(self.places) and self.places[at] == place:
            del self.places[at], self.orders[at]
            self.changed = True

    def cut(self, at: int) -> _Document:
        """Take away the orders from a position on, and return them."""
        rest = _Document(0, self.places[at:], self.orders[at:], changed=True)
        del self.places[at:], self.orders[at:]
        self.changed = True
        return rest


@dataclass(slots=True)
class _List:
    """A list as far as it was read: the head, with all orders of a short list, and parts by their starts."""

    revision: int
    short: _Document | None
    starts: list[int] = field(default_factory=list)
    parts: dict[int, _Document] = field(default_factory=dict)
    changed: bool = False

    def start_of(self, place: int) -> int:
        """Return the start of the part in which a place is."""
        return self.starts[bisect_right(self.starts, place) - 1]

    def document(self, place: int) -> _Document:
        return self.short if self.short is not None else self.parts[self.start_of(place)]

    def make_room(self, place: int) -> None:
        """Split what has become too long by an order at a place."""
        if self.short is not None:
            if len(self.short.orders) > SHORT:
                self.short.revision = 0
                self.short.changed = self.changed = True
                # The first part has what is older than any other, too.
                self.starts, self.parts = [0], {0: self.short}
                self.short = None
            return
        start = self.start_of(place)
        part = self.parts[start]
        if len(part.orders) <= PART:
            return
        # Orders come last as a rule: then parts stay full.
        newest_of_all = start == self.starts[-1] and part.places[-1] == place
        rest = part.cut(-1 if newest_of_all else PART // 2)
        self.starts.insert(self.starts.index(start) + 1, rest.places[0])
        self.parts[rest.places[0]] = rest
        self.changed = True


class Lists:
    """The lists of one generation that a batch of changes touches, read at once and changed in memory.

    Parameters:
      position: What is read is not older.
    """

    def __init__(self, bucket: Bucket, position: Position) -> None:
        self._bucket = bucket
        self._generation = position.generation
        self._since = position.key, position.revision
        self._lists: dict[str, _List] = {}

    def read(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Read the lists with these names, as far as the places beside them are concerned."""
        wanted = set(wanted)
        names = sorted({name for name, _ in wanted} - self._lists.keys())
        found = self._get(_head_key(self._generation, name) for name in names)
        for name in names:
            entry = found.get(_head_key(self._generation, name))
            head = {"orders": []} if entry is None else json.loads(entry[0])
            revision = 0 if entry is None else entry[1]
            short = _Document.of(revision, head["orders"]) if "orders" in head else None
            self._lists[name] = _List(revision, short, head.get("starts", []))
        parts = sorted(
            {
                (name, found_list.start_of(place))
                for name, place in wanted
                if (found_list := self._lists[name]).short is None
                and found_list.start_of(place) not in found_list.parts
            }
        )
        found = self._get(_part_key(self._generation, name, start) for name, start in parts)
        for name, start in parts:
            value, revision = found.get(_part_key(self._generation, name, start), (b'{"orders":[]}', 0))
            self._lists[name].parts[start] = _Document.of(revision, json.loads(value)["orders"])

    def find(self, name: str, place: int) -> Posting | None:
        """Return what a list that was read has at a place."""
        return self._lists[name].document(place).find(place)

    def put(self, name: str, posting: Posting) -> None:
        """Have a list that was read contain an order, with this status."""
        changed = self._lists[name]
        changed.document(posting.place).put(posting)
        changed.make_room(posting.place)

    def discard(self, name: str, place: int) -> None:
        """Have a list that was read not contain the order at a place."""
        self._lists[name].document(place).discard(place)

    def updates(self) -> dict[str, tuple[bytes, int]]:
        """Return what has to be stored, with the revision that each key must have."""
        found: dict[str, tuple[bytes, int]] = {}
        for name, one in self._lists.items():
            if one.short is not None:
                if one.short.changed:
                    head = _encoded({"orders": one.short.orders})
                    found[_head_key(self._generation, name)] = head, one.revision
                continue
            if one.changed:
                found[_head_key(self._generation, name)] = _encoded({"starts": one.starts}), one.revision
            for start, part in one.parts.items():
                if part.changed:
                    number = one.starts.index(start) + 1
                    following = one.starts[number] if number < len(one.starts) else None
                    key = _part_key(self._generation, name, start)
                    found[key] = _encoded({"next": following, "orders": part.orders}), part.revision
        return found

    def _get(self, keys: Iterable[str]) -> dict[str, tuple[bytes, int]]:
        wanted = list(keys)
        if not wanted:
            return {}
        found = self._bucket.get_many(wanted, since=self._since)
        return {key: (entry.value, entry.revision) for key, entry in found.items()}


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
