"""Exports what is still waiting, within a bound.

The SDK bounds none of it: `force_flush` to an endpoint that is down takes the exporter's timeout for every batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger(__name__)


def flush(providers: Iterable[Any], timeout_seconds: float) -> bool:
    """Let each provider export what it holds; give up after `timeout_seconds`. True when all of it is out."""
    threads = [
        threading.Thread(target=_flush, args=(provider,), daemon=True)
        for provider in providers
        if hasattr(provider, "force_flush")
    ]
    deadline = time.monotonic() + timeout_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _flush(provider: Any) -> None:
    try:
        provider.force_flush()
    except Exception as error:  # noqa: BLE001 - telemetry must not be what breaks the end of a process
        logger.debug("Could not export the last of the telemetry: %s", error)
