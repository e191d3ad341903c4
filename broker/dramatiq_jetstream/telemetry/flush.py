"""Exports what is still waiting, within a bound.

The SDK bounds none of it: flushing to an endpoint that is down takes the exporter's timeout for every batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

logger = logging.getLogger(__name__)


#: Providers whose last flush took too long. Waiting for them once is enough.
_slow: WeakSet[Any] = WeakSet()


def force_flush(providers: Iterable[Any], timeout: int) -> bool:
    """Let each provider export what it holds; gives up after `timeout` milliseconds. True when all is out."""
    return _all([p for p in providers if hasattr(p, "force_flush")], "force_flush", timeout)


def shut_down(providers: Iterable[Any], timeout: int) -> bool:
    """Export what is left and end the providers; gives up after `timeout` milliseconds."""
    return _all([p for p in providers if hasattr(p, "shutdown")], "shutdown", timeout)


def _all(providers: list[Any], method: str, timeout: int) -> bool:
    threads = [
        threading.Thread(target=_call, args=(getattr(provider, method),), daemon=True)
        for provider in providers
    ]
    deadline = time.monotonic() + timeout / 1000
    for thread in threads:
        thread.start()
    for provider, thread in zip(providers, threads, strict=True):
        thread.join(0.1 if provider in _slow else max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _slow.add(provider)
        else:
            _slow.discard(provider)
    return not any(provider in _slow for provider in providers)


def _call(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - telemetry must never be what breaks the end of a process
        logger.debug("Could not export the last of the telemetry: %s", error)
