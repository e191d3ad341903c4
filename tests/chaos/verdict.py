"""What the checks say: whether a promise was kept, and the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: How many culprits a verdict names.
_NAMED = 5


@dataclass(frozen=True)
class Verdict:
    """Whether a promise was kept, and the numbers."""

    promise: str
    kept: bool
    numbers: str
    culprits: tuple[str, ...] = ()

    def line(self) -> str:
        named = f" [{', '.join(self.culprits[:_NAMED])}]" if self.culprits else ""
        return f"{'ok    ' if self.kept else 'BROKEN'}  {self.promise}: {self.numbers}{named}"


def verdict(promise: str, culprits: Iterable[str], numbers: str) -> Verdict:
    """Return a verdict: the promise was kept when there are no culprits."""
    found = tuple(sorted(set(culprits)))
    return Verdict(promise, not found, numbers, found)
