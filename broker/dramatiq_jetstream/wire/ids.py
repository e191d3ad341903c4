"""Unique ids without a system call for each: a random prefix for each process, and a counter, as NATS's own nuid.

The child of a fork gets a prefix of its own. With its parent's, both would give the same id to different messages, and
JetStream would store only the first.
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
