"""How the stand-in misbehaves."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

#: What the knobs can be about: what is asked of the gateway.
ASKED: Final = ("charges", "refunds", "lookups")


@dataclass(frozen=True)
class Knobs:
    """How the gateway misbehaves; rates are from 0 to 1.

    Attributes:
      about: What the others are about, of charges, refunds and lookups (of an order's charges, refunds, chargebacks).
      latency_ms: How long it thinks before it does anything.
      latency_jitter_ms: How much longer, at random, at most.
      fail_next: How often it answers 500 next before it does anything; it counts down by itself.
      failure_rate: How often it answers 500 before it does anything.
      failure_after_charge_rate: How often it answers 500 although it has done what was asked.
      hang_after_charge_rate: How often it does what was asked, and then says nothing for `hang_ms`.
      decline_rate: How often it declines a token that is good.
      refuse: Hang up without doing anything.
    """

    about: tuple[str, ...] = ("charges", "refunds")

    latency_ms: int = 0
    latency_jitter_ms: int = 0
    fail_next: int = 0
    failure_rate: float = 0.0
    failure_after_charge_rate: float = 0.0
    hang_after_charge_rate: float = 0.0
    hang_ms: int = 10_000
    decline_rate: float = 0.0
    refuse: bool = False

    def changed(self, changes: dict[str, Any]) -> Knobs:
        """Return the knobs with some changed; raises ValueError that names the one that is wrong."""
        known = {name: type(value) for name, value in asdict(self).items()}
        values: dict[str, Any] = {}
        for name, value in changes.items():
            kind = known.get(name)
            if kind is None:
                raise ValueError(f"there is no knob {name!r}; there are {', '.join(known)}")
            if kind is bool:
                good = isinstance(value, bool)
            elif kind is tuple:
                good = isinstance(value, list) and all(one in ASKED for one in value)
            else:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                good = number and (0 <= value <= 1 if kind is float else value >= 0)
            if not good:
                raise ValueError(f"{name} cannot be {value!r}")
            values[name] = kind(value)
        return replace(self, **values)

    @classmethod
    def from_environment(cls) -> Knobs:
        """Return the knobs that PAYMENTS_* variables set."""
        changes = {}
        for field in fields(cls):
            name = f"PAYMENTS_{field.name.upper()}"
            if value := os.environ.get(name):
                try:
                    changes[field.name] = json.loads(value)
                except ValueError:
                    raise SystemExit(f"{name} cannot be {value!r}.") from None
        try:
            return cls().changed(changes)
        except ValueError as error:
            raise SystemExit(f"PAYMENTS_*: {error}.") from None
