"""One call that enqueues many messages; each is stored or refused by itself.

An error while one message is prepared, takes its unique key or is stored is that message's outcome, and the others go
on. An interrupt ends the whole call at once; what was sent by then may be stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dramatiq.message import Message

from dramatiq_jetstream.errors import BrokerConnectionError, NotAllStored, NotSent, StoreFull
from dramatiq_jetstream.wire.connection import Connection, Publication

from . import batches
from .unique import Claim

__all__ = ["Many", "Ready"]

#: A message as announced, its queue, its publication, and its unique key if it has one.
Ready = tuple[Message[Any], str, Publication, Claim | None]


class Many:
    """Messages on their way, and what became of each.

    Parameters:
      timeout: Seconds after the last progress at which nothing more is tried.
    """

    def __init__(self, messages: list[Message[Any]], timeout: float) -> None:
        self._messages = messages
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._ready: list[tuple[int, Ready]] = []
        self._failures: dict[int, Exception] = {}

    def make_ready(self, prepare: Callable[[Message[Any]], Ready]) -> None:
        """Prepare each message for publishing."""
        for position, message in enumerate(self._messages):
            try:
                if time.monotonic() >= self._deadline:
                    raise NotSent("The time of the whole call was up before this message was sent.")
                self._ready.append((position, prepare(message)))
                self._deadline = time.monotonic() + self._timeout
            except Exception as error:  # noqa: BLE001 - it is reported in the end
                self._failures[position] = error

    def store(self, connection: Connection, make_again: Callable[[str], bool]) -> list[Message[Any]]:
        """Publish what is ready; return what was stored."""
        outcomes = batches.store(
            connection,
            [(queue, publication) for _, (_, queue, publication, _) in self._ready],
            deadline=self._deadline,
            timeout=self._timeout,
            make_again=make_again,
        )
        stored = []
        for (position, (announced, _, _, claim)), outcome in zip(self._ready, outcomes, strict=True):
            try:
                if isinstance(outcome, Exception):
                    if claim is not None:
                        claim.failed(outcome)
                    raise outcome
                if claim is not None:
                    claim.stored(outcome)
                stored.append(announced)
            except Exception as error:  # noqa: BLE001 - it is reported in the end
                self._failures[position] = error
        return stored

    def raise_failure(self) -> None:
        """Raise the error of the first message that failed, with a cause that lists every failure."""
        if not self._failures:
            return
        first = self._failures[min(self._failures)]
        if len(self._messages) == 1:
            raise first
        unknown = {position: error for position, error in self._failures.items() if _is_unknown(error)}
        raise first from NotAllStored(
            stored=[m for position, m in enumerate(self._messages) if position not in self._failures],
            not_stored=[
                (self._messages[position], error)
                for position, error in sorted(self._failures.items())
                if position not in unknown
            ],
            unknown=[(self._messages[position], error) for position, error in sorted(unknown.items())],
        )


def _is_unknown(error: Exception) -> bool:
    return isinstance(error, BrokerConnectionError) and not isinstance(error, (NotSent, StoreFull))
