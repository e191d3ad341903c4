"""In-memory stand-ins for bucket, gateway, stream and clock that can crash a step before or after any effect.

`World` runs real step code in greenlets: each stops at every effect, and the test says which goes on next, and
whether it crashes there. So a schedule is a list of numbers that hypothesis can draw, shrink and repeat.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from cryptography.fernet import Fernet
from google.protobuf.message import Message
from greenlet import getcurrent, greenlet

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from tasks.events import Happened, event_id, happened, name_of
from tasks.gateway import UnusableAnswer
from tasks.ledger import Chargeback
from tasks.ports import Charge, Decline
from tasks.tokens import Tokens

Pause = Callable[[str], None]

Headers = Mapping[str, str]
NO_HEADERS: Final[Headers] = MappingProxyType({})


def no_pause(where: str) -> None:
    """Stands for a scheduler where a test wants none."""


@dataclass(frozen=True)
class FakeEntry:
    key: str
    value: bytes
    revision: int
    created: int = 0


def up_to_date() -> int:
    """Stands for a cluster in which no server is behind."""
    return 0


class FakeBucket:
    """A bucket in memory that behaves as the real one: one revision counter, compare-and-set.

    Parameters:
      behind: Says for each read how many writes the server that answers it is behind.
    """

    def __init__(self, pause: Pause = no_pause, behind: Callable[[], int] = up_to_date) -> None:
        self.pause = pause
        self.behind = behind
        self.entries: dict[str, FakeEntry] = {}
        self._log: list[FakeEntry] = []
        self._revision = 0
        self._lock = threading.Lock()

    def get(self, key: str, *, linearizable: bool = False) -> FakeEntry | None:
        self.pause(f"get {key}")
        late = 0 if linearizable else self.behind()
        return self._as_of(self._revision - late).get(key) if late else self.entries.get(key)

    def get_many(self, keys: Sequence[str], *, since: tuple[str, int]) -> dict[str, FakeEntry]:
        self.pause(f"get {', '.join(keys)}")
        late = self.behind()
        entries = self._as_of(max(since[1], self._revision - late)) if late else self.entries
        return {key: entries[key] for key in keys if key in entries}

    def _as_of(self, revision: int) -> dict[str, FakeEntry]:
        return {entry.key: entry for entry in self._log if entry.revision <= revision}

    def create(self, key: str, value: bytes, *, ttl: int | None = None) -> int:
        try:
            return self.update(key, value, revision=0)
        except RevisionConflict:
            raise KeyExists(key) from None

    def update(self, key: str, value: bytes, *, revision: int, ttl: int | None = None) -> int:
        self.pause(f"before update of {key}")
        with self._lock:
            existing = self.entries.get(key)
            if (existing.revision if existing else 0) != revision:
                raise RevisionConflict(key)
            self._revision += 1
            self.entries[key] = FakeEntry(key, value, self._revision)
            self._log.append(self.entries[key])
        stored = self._revision
        self.pause(f"after update of {key}")
        return stored

    def update_all(self, updates: Mapping[str, tuple[bytes, int]]) -> dict[str, int]:
        self.pause(f"before update of {', '.join(updates)}")
        with self._lock:
            for key, (_, revision) in updates.items():
                existing = self.entries.get(key)
                if (existing.revision if existing else 0) != revision:
                    raise RevisionConflict(key)
            for key, (value, _) in updates.items():
                self._revision += 1
                self.entries[key] = FakeEntry(key, value, self._revision)
                self._log.append(self.entries[key])
            stored = {key: self.entries[key].revision for key in updates}
        self.pause(f"after update of {', '.join(updates)}")
        return stored

    def clear(self, prefix: str) -> None:
        for key in [key for key in self.entries if key.startswith(prefix)]:
            self.delete(key)

    def newest_revision(self) -> int:
        return self._revision

    def delete(self, key: str, *, revision: int | None = None) -> None:
        self.pause(f"before delete of {key}")
        if revision is not None and (key not in self.entries or self.entries[key].revision != revision):
            raise RevisionConflict(key)
        self.entries.pop(key, None)

    def items(self, prefix: str = "", *, after: int = 0) -> Iterator[FakeEntry]:
        entries = sorted(self.entries.values(), key=lambda entry: entry.revision)
        return iter([e for e in entries if e.key.startswith(prefix) and e.revision > after])


def fake_tokens() -> Tokens:
    """Payment tokens in memory; nothing stops between two of their effects."""
    return Tokens(FakeBucket(), [Fernet.generate_key().decode()], ttl=60_000)


class FakeGateway:
    """A gateway that charges once per order, declines by token, and can be told to be down.

    Refunds and chargebacks of a charge are together never more than the charge.
    """

    def __init__(self, pause: Pause = no_pause) -> None:
        self.pause = pause
        self.answers: dict[str, Charge | Decline] = {}
        self.captured: list[str] = []
        self.amounts: dict[str, int] = {}
        self.refunds: dict[str, tuple[str, int]] = {}
        self.chargebacks: dict[str, tuple[str, int]] = {}
        self.down = False

    def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline:
        self.pause(f"before charge of {order_id}")
        if self.down:
            raise ConnectionError("the gateway is down")
        if order_id not in self.answers:
            if token == "tok_declined":
                self.answers[order_id] = Decline("card_declined", "the card was declined")
            else:
                self.captured.append(order_id)
                self.amounts[order_id] = amount
                self.answers[order_id] = Charge(f"ch_{order_id}")
        self.pause(f"after charge of {order_id}")
        return self.answers[order_id]

    def find_charge(self, order_id: str) -> Charge | None:
        self.pause(f"before look-up of {order_id}")
        answer = self.answers.get(order_id)
        return answer if isinstance(answer, Charge) else None

    def refund(self, charge_id: str, amount: int, currency: str, key: str) -> str:
        self.pause(f"before refund {key}")
        if self.down:
            raise ConnectionError("the gateway is down")
        if key not in self.refunds and amount > self.left(charge_id):
            raise UnusableAnswer(f"the payment gateway answered 422 {self.left(charge_id)} are left")
        assert self.refunds.setdefault(key, (charge_id, amount)) == (charge_id, amount)
        self.pause(f"after refund {key}")
        return f"re_{key}"

    def find_refund(self, order_id: str, key: str) -> str | None:
        self.pause(f"before look-up of {key}")
        return f"re_{key}" if key in self.refunds else None

    def find_chargebacks(self, order_id: str) -> list[tuple[str, Chargeback]]:
        self.pause(f"before look-up of chargebacks of {order_id}")
        return [
            (charge_id, Chargeback(key, amount, 0))
            for key, (charge_id, amount) in self.chargebacks.items()
            if charge_id == f"ch_{order_id}"
        ]

    def charge_back(self, order_id: str, key: str, amount: int) -> Chargeback | None:
        """Have the bank take money back, as far as it is there; returns what the service is to be told of."""
        amount = min(amount, self.left(f"ch_{order_id}"))
        if amount > 0:
            self.chargebacks.setdefault(key, (f"ch_{order_id}", amount))
        return Chargeback(key, self.chargebacks[key][1], 0) if key in self.chargebacks else None

    def moved_back(self, charge_id: str) -> int:
        """Return what was refunded and charged back of a charge."""
        moved = [*self.refunds.values(), *self.chargebacks.values()]
        return sum(amount for charge, amount in moved if charge == charge_id)

    def left(self, charge_id: str) -> int:
        """Return what is left of a charge."""
        return self.amounts.get(charge_id.removeprefix("ch_"), 0) - self.moved_back(charge_id)


@dataclass(frozen=True)
class FakeStored:
    event: Message
    sequence: int
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def happened(self) -> Happened:
        return happened(self.event, self.sequence, 1_000 + self.sequence, self.headers)


class FakeStream:
    """The stream ORDERS; without `window` it forgets message ids at once, as JetStream does after 2 minutes."""

    def __init__(self, pause: Pause = no_pause, *, window: bool = True) -> None:
        self.pause = pause
        self.window = window
        self.stored: list[FakeStored] = []
        self._ids: set[str] = set()

    def __call__(
        self, event: Message, at: int, *, timeout: int | None = None, headers: Headers = NO_HEADERS
    ) -> int:
        self.pause(f"before publish of {name_of(event)}")
        place = self.append(event, headers)
        self.pause(f"after publish of {name_of(event)}")
        return place

    def append(self, event: Message, headers: Headers = NO_HEADERS) -> int:
        if self.window and event_id(event) in self._ids:
            return next(one.sequence for one in self.stored if event_id(one.event) == event_id(event))
        self._ids.add(event_id(event))
        self.stored.append(FakeStored(event, len(self.stored) + 1, headers))
        return len(self.stored)

    def happened_at(self, sequence: int) -> Happened | None:
        if not 0 < sequence <= len(self.stored):
            return None
        return self.stored[sequence - 1].happened


class Crash(BaseException):
    """The process that ran the step was killed."""


@dataclass
class Task:
    """One run of a step, stopped at an effect until the test lets it go on."""

    name: str
    run: Callable[[], None]
    where: str = "start"
    done: bool = False
    _greenlet: greenlet | None = None


class World:
    """Runs tasks one at a time, effect by effect."""

    def __init__(self) -> None:
        self._current: Task | None = None
        self._test = getcurrent()

    def pause(self, where: str) -> None:
        """Called by the fakes at every effect."""
        if self._current is not None:
            self._current.where = where
            self._test.switch()

    def start(self, name: str, run: Callable[[], None]) -> Task:
        """Return a task that stands before its first effect."""
        task = Task(name, run)

        def body() -> None:
            try:
                task.run()
            finally:
                task.done = True

        task._greenlet = greenlet(body, self._test)
        return task

    def step(self, task: Task, *, crash: bool = False) -> None:
        """Let a task go on to its next effect, or crash it where it stands."""
        assert task._greenlet is not None
        self._current = task
        try:
            if crash:
                task._greenlet.throw(Crash)
            else:
                task._greenlet.switch()
        except Crash:
            task.done = True
        finally:
            self._current = None
