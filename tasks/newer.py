"""Reads what a newer version may have written beside this one: members that are not known here are kept as they are.

It is for values on which a version may act that does not know all of them. What must not be acted on then raises
`tasks.ledger.NewerRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: The member of a dataclass that has what is not known.
OTHERS = "others"


def members_of(kind: type[DataclassInstance], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of a dataclass in a stored value, with all others in its member `others`."""
    names = {one.name for one in fields(kind)} - {OTHERS}
    known = {name: value for name, value in stored.items() if name in names}
    return {**known, OTHERS: {name: value for name, value in stored.items() if name not in names}}


def stored_of(value: DataclassInstance) -> dict[str, Any]:
    """Return what is stored of a value: its members, and what it was read with beside them."""
    members = asdict(value)
    return {**members.pop(OTHERS), **members}
