"""Limits of an actor whose messages wait: `rate`, `concurrency`, `key`; and `Snooze`, which an actor raises to wait.

    @dramatiq.actor(rate="5/s", concurrency=3, key="customer")
    def charge(customer, amount): ...

- `rate`: how many may start in any period of that length: "5/s", "100/m", "1/h", "20/d", "3/10s". Retries are starts.
- `concurrency`: how many may run at once, in the whole fleet.
- `key`: the name of an argument; the limits hold for each of its values by itself, so that no value waits for another.

What is over the limit waits on the server, in the order in which it came, and uses no retry. How this survives killed
workers, and what it costs, is told in `worker.limits`.

Snoozed messages wait on the server as a delayed message does; no worker holds them. The message is stored with its
delay first and acked afterwards. If the process dies between the two, it runs again at once and snoozes again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dramatiq.errors import DramatiqError

from .errors import InvalidOption
from .sending.delays import check_delay

__all__ = ["Snooze"]

#: The options of an actor.
OPTIONS = frozenset({"rate", "concurrency", "key"})

#: The most that a limit may allow: more is none.
MOST = 1_000_000

_RATE = re.compile(r"(?P<count>[0-9]{1,7})/(?P<periods>[0-9]{0,4})(?P<unit>[smhd])")
_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True)
class Rate:
    """At most `count` starts in any `period` milliseconds."""

    count: int
    period: int

    @property
    def interval(self) -> float:
        """Milliseconds from one start to the next, if they are even."""
        return self.period / self.count


@dataclass(frozen=True)
class Limit:
    """The limits of one actor, and the argument whose values have them each by itself."""

    rate: Rate | None
    concurrency: int | None
    key: str | None
    signature: inspect.Signature

    def value_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The value of the key in a message's arguments; empty without a key, or if the actor does not take them."""
        if self.key is None:
            return ""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:  # the actor will say so
            return ""
        bound.apply_defaults()
        return str(bound.arguments[self.key])


def limit_of(actor: Any) -> Limit | None:
    """The limits that an actor declares, if any.

    Raises:
      InvalidOption: For one that can never work.
    """
    rate, concurrency, key = (actor.options.get(name) for name in ("rate", "concurrency", "key"))
    of = f"of actor {actor.actor_name!r} cannot be used"
    if concurrency is not None and (
        isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 0 < concurrency <= MOST
    ):
        raise InvalidOption(f"concurrency={concurrency!r} {of}: give how many may run at once, from 1 up.")
    if rate is None and concurrency is None:
        if key is not None:
            raise InvalidOption(
                f"key={key!r} {of} alone: give a rate or a concurrency that holds for each value."
            )
        return None
    signature = inspect.signature(actor.fn)
    named = [
        name
        for name, one in signature.parameters.items()
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if key is not None and key not in named:
        raise InvalidOption(
            f"key={key!r} {of}: give the name of one of its arguments ({', '.join(named) or 'none'})."
        )
    return Limit(None if rate is None else _parsed(rate, of), concurrency, key, signature)


def _parsed(rate: object, of: str) -> Rate:
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    count, periods = (int(found["count"]), int(found["periods"] or 1)) if found is not None else (0, 0)
    if found is None or not 0 < count <= MOST or not periods:
        raise InvalidOption(
            f'rate={rate!r} {of}: give how many per time, such as "5/s", "100/m", "1/h" or "3/10s".'
        )
    return Rate(count, periods * _UNITS_MS[found["unit"]])


class Snooze(DramatiqError):
    """Raised in an actor, runs its message again later. It counts as no attempt and uses no retry.

    Nothing follows such a run: no result, no callback, no next step, no record in the history. Middleware is told as of
    a message that was skipped. A message may be snoozed any number of times.

    Parameters:
      delay: Milliseconds until it runs again, up to ten years.

    Raises:
      InvalidOption: For a delay that cannot be used; in an actor that is a failure like any other.

    Examples:
      >>> from dramatiq_jetstream import Snooze
      >>> from dramatiq_jetstream.testing import stub
      >>> with stub() as shop:
      ...     @dramatiq.actor
      ...     def deposit(amount):
      ...         if bank.is_closed:
      ...             raise Snooze(delay=60_000)
      ...     sent = deposit.send(20)
      ...     ran = shop.run()
      ...     found = shop.assert_enqueued(deposit, delay=60_000)
    """

    def __init__(self, delay: int) -> None:
        self.delay = check_delay(delay)
        super().__init__(f"snoozed for {self.delay} ms")  # type: ignore[no-untyped-call]
