"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(
    condition: Callable[[], T],
    timeout: float = 60.0,
    *,
    interval: float = 0.02,
    message: str | None = None,
) -> T:
    """Call `condition` until what it returns is true, and return that.

    An AssertionError inside `condition` counts as "not yet", so that it may be written with plain asserts.
    Any other exception ends the wait at once. After `timeout` seconds the last failure is raised.
    """
    deadline = time.monotonic() + timeout
    while True:
        failure: AssertionError | None = None
        result: T | None = None
        try:
            result = condition()
        except AssertionError as error:
            failure = error
        if failure is None and result:
            return result
        if time.monotonic() >= deadline:
            what = message or f"{getattr(condition, '__qualname__', condition)} was not fulfilled"
            detail = f"{failure}" if failure is not None else f"last result: {result!r}"
            raise AssertionError(f"{what} within {timeout:g} s ({detail})") from failure
        time.sleep(interval)


def holds(condition: Callable[[], object], duration: float, *, interval: float = 0.02) -> None:
    """Check that `condition` stays true for `duration` seconds: for what must *not* happen."""
    deadline = time.monotonic() + duration
    while time.monotonic() < deadline:
        result = condition()
        assert result, f"{getattr(condition, '__qualname__', condition)} stopped holding: {result!r}"
        time.sleep(interval)
