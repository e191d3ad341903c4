"""Ids that are used once, without asking the system for each: a random beginning for each process, and a count.

NATS's own clients make theirs so (nuid). In the child of a fork the beginning is another one, or parent and child
would give the same id to different messages, of which JetStream keeps the first alone.
"""

from __future__ import annotations

import itertools
import os
import secrets

__all__ = ["new_id"]


def _begin() -> None:
    global _beginning, _count
    _beginning, _count = secrets.token_hex(12), itertools.count()


_beginning: str
_count: itertools.count[int]
_begin()
os.register_at_fork(after_in_child=_begin)


def new_id() -> str:
    """Return an id that no other call returns, in this process or in another: letters and digits, 25 or more."""
    return f"{_beginning}{next(_count):x}"
