"""What a change would do before it is made, the dry run that an operator sees; and the fields it was asked with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from dramatiq_jetstream.audit import Change

__all__ = ["SHOWN", "Fields", "Plan", "first"]

#: How many of what a plan would change it shows.
SHOWN: Final = 10

Fields = Mapping[str, list[str]]


@dataclass(frozen=True)
class Plan:
    """What a change would do.

    Attributes:
      title, detail: What is asked and what it means.
      button: What the button says.
      target: What the audit calls that which is changed.
      count: How much of it there is; with 0 there is nothing to do.
      make: Makes the change, and counts in `done`.
      shown: Some of what would be changed.
      is_final: Whether it cannot be taken back.
      back: The page that people come from, and its filters.
      fixed: Further fields, which keep the change to what this plan found.
    """

    title: str
    detail: str
    button: str
    target: str
    count: int
    make: Callable[[Change], None]
    back: tuple[str, Mapping[str, str]]
    shown: list[str] = field(default_factory=list)
    is_final: bool = False
    fixed: Mapping[str, list[str]] = field(default_factory=dict)


def first(fields: Fields, name: str) -> str:
    """Return the first value of a field, "" when it is not given."""
    values = fields.get(name) or [""]
    return values[0].strip()
