"""Observes one run of a step: its log lines say what they are about, one line says how it ended, and it is counted.

    with observed("reserve", event) as run:
        run.outcome = saga.reserve(event)

The request that placed an order is named by a header of its events, which each step hands on with the event that it
publishes. The header comes from the publisher, so it is only taken in the form that a request's id has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from dramatiq_jetstream import Snooze
from dramatiq_jetstream.events import current_event

from . import logs, metrics
from .events import UnusableEvent, name_of, request_id_in
from .ledger import NewerRecord
from .model import MAX_ID_LENGTH
from .text import shown

logger = logging.getLogger(__name__)

#: For how many milliseconds a step waits for a worker of a newer version before it looks again.
NEWER_MS: Final = 5_000


@dataclass
class Run:
    """A run of a step. `outcome` is the state in which it left the order, or `error`, `refused` or `put off`."""

    outcome: str = "error"


@contextmanager
def left_to_newer() -> Iterator[None]:
    """Put a message off whose order has a record of a newer version, until a worker of that version takes it."""
    try:
        yield
    except NewerRecord as error:
        logger.warning("A worker of a newer version is waited for: %s", error)
        raise Snooze(NEWER_MS) from error


@contextmanager
def observed(step: str, event: Message) -> Iterator[Run]:
    """Observe a run of a step that was called by an event."""
    order_id = shown(event.order_id, MAX_ID_LENGTH)  # type: ignore[attr-defined]  # every event has one
    logs.bind(order_id=order_id)
    delivered = current_event()
    request_id = request_id_in({} if delivered is None else delivered.headers)
    if request_id is not None:
        logs.bind(request_id=request_id)
    run = Run()
    began = time.monotonic()
    try:
        with left_to_newer():
            yield run
    except Snooze:
        run.outcome = "put off"
        raise
    except UnusableEvent:
        run.outcome = "refused"
        raise
    finally:
        seconds = time.monotonic() - began
        metrics.steps.labels(step, run.outcome).observe(seconds)
        milliseconds = round(seconds * 1000)
        logger.info(
            "Order %s: %s ended as %s after %d ms.",
            *(order_id, step, run.outcome, milliseconds),
            extra={"event": name_of(event), "outcome": run.outcome, "milliseconds": milliseconds},
        )
