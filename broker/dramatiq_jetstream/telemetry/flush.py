"""Exports what is still waiting, within a bound.

The SDK bounds none of it: flushing to an endpoint that is down takes the exporter's timeout for every batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)


def force_flush(providers: Iterable[Any], timeout: int) -> bool:
    """Let each provider export what it holds; gives up after `timeout` milliseconds. True when all is out."""
    return _bounded(
        [flush for provider in providers if (flush := getattr(provider, "force_flush", None))], timeout
    )


def shut_down(providers: Iterable[Any], timeout: int) -> bool:
    """Export what is left and end the providers; gives up after `timeout` milliseconds."""
    return _bounded([end for provider in providers if (end := getattr(provider, "shutdown", None))], timeout)


def _bounded(actions: list[Callable[[], object]], timeout: int) -> bool:
    threads = [threading.Thread(target=_call, args=(action,), daemon=True) for action in actions]
    deadline = time.monotonic() + timeout / 1000
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _call(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - telemetry must never be what breaks the end of a process
        logger.debug("Could not export the last of the telemetry: %s", error)
