"""Injects several faults at once, each on a thread of its own and a moment after the others."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping

__all__ = ["at_once"]


def at_once(
    injections: Mapping[str, Callable[[random.Random], None]], choice: random.Random, seconds: float
) -> None:
    """Call every injection within three seconds and wait for all of them; raise the first failure.

    Parameters:
      injections: By the names of their faults.
      seconds: How long each may take.
    """
    failures: list[BaseException] = []

    def one(inject: Callable[[random.Random], None], after: float, seed: int) -> None:
        time.sleep(after)
        try:
            inject(random.Random(seed))
        except Exception as error:  # noqa: BLE001 - raised by the thread that waits
            failures.append(error)

    threads = [
        threading.Thread(target=one, args=(inject, choice.uniform(0, 3), choice.randrange(2**32)), name=name)
        for name, inject in injections.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    if failures:
        raise failures[0]
