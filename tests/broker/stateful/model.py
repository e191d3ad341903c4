"""What the machine knows of every message, by its label: what its sender was told, and what follows from that."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dramatiq import Message
from dramatiq.errors import BrokerError
from dramatiq.middleware import Interrupt

from dramatiq_jetstream.errors import (
    MessageNotUnique,
    MessageTooLarge,
    NotAllStored,
    NotSent,
    StoreFull,
    TopologyMissing,
)

from .app import ACK_WAIT, ENQUEUE_TIMEOUT

NOT_STORED = (NotSent, StoreFull, MessageTooLarge, TopologyMissing, MessageNotUnique)


class Model:
    """What was promised.

    Attributes:
      stored: Labels that were acknowledged, and that have to run.
      refused: Labels that were told not to be stored, or were cancelled.
      may: Labels that may or may not run: it is not known, or a fault or a purge may have dropped them.
      haunted: A purge whose outcome is not known may still drop what is stored.
      sent: When each label was sent, by `time.monotonic`.
      delayed: The messages that are due long after the test, by label.
      values, lurking: What each key of the bucket has, and what it may have because of calls that are not known.
      holders: The labels that were enqueued with a unique key since it was free.
      unsure: The unique keys that may be taken although no message has them.
      results: The messages that have a result, by label.
      groups: The label of each group's callback, with those of its members.
      batches: The labels of each atomic batch.
    """

    def __init__(self) -> None:
        self.stored: set[str] = set()
        self.refused: set[str] = set()
        self.may: set[str] = set()
        self.haunted = False
        self.sent: dict[str, float] = {}
        self.delayed: dict[str, Message[Any]] = {}
        self.values: dict[str, set[bytes | None]] = {}
        self.lurking: dict[str, set[bytes | None]] = {}
        self.holders: dict[str, set[str]] = {}
        self.unsure: set[str] = set()
        self.results: dict[str, Message[Any]] = {}
        self.groups: dict[str, list[str]] = {}
        self.batches: list[list[str]] = []

    def tell(self, messages: list[Message[Any]], call: Callable[[], object]) -> BaseException | None:
        """Make a call and note what it was told of each message; returns what it raised."""
        labels = {str(message.args[0]) for message in messages}
        began = time.monotonic()
        self.sent |= dict.fromkeys(labels, began)
        failure: BaseException | None = None
        try:
            call()
        except (BrokerError, Interrupt) as error:
            failure, cause = error, error.__cause__
            if isinstance(cause, NotAllStored):
                self._note_stored({str(message.args[0]) for message in cause.stored})
                self.refused |= {str(message.args[0]) for message, _ in cause.not_stored}
                self.may |= {str(message.args[0]) for message, _ in cause.unknown}
            elif isinstance(error, NOT_STORED):
                self.refused |= labels
            else:
                self.may |= labels
        else:
            self._note_stored(labels)
        # When the time is up, that a stream was gone may be all that is known.
        in_time = time.monotonic() - began < ENQUEUE_TIMEOUT / 1000
        assert not (in_time and isinstance(failure, TopologyMissing)), f"it was not made again: {failure}"
        return failure

    def _note_stored(self, labels: set[str]) -> None:
        if self.haunted:
            self.may |= labels
        else:
            self.stored |= labels

    def may_be_gone(self, labels: set[str]) -> None:
        labels = set(labels)
        self.stored -= labels
        self.may |= labels
        for label in labels & self.delayed.keys():
            del self.delayed[label]

    @property
    def due(self) -> set[str]:
        """What has to have run, callbacks of groups included."""
        whole = {callback for callback, members in self.groups.items() if self.stored.issuperset(members)}
        return (self.stored - self.delayed.keys()) | whole

    def check(self, ran: list[str], begun: Mapping[str, list[float]], *, calm: bool) -> None:
        """Check what ran, and when that began; `calm` says that there was no fault."""
        counts = Counter(ran)
        ghosts = self.refused & counts.keys()
        assert not ghosts, f"{sorted(ghosts)} were told not to be stored, and ran"
        for labels in self.batches:
            found = {label for label in labels if counts[label]}
            if not set(labels) & self.may:
                assert found in (set(), set(labels)), f"of {labels} only {sorted(found)} ran"
        for key, holders in self.holders.items():
            found = {label for label in holders if counts[label]}
            assert len(found) <= 1, f"{sorted(found)} ran with the one key {key!r}"
        for label, sent in self.sent.items() if calm else ():
            # A slow machine may keep a message for longer than its `ack_wait`, after which it comes again.
            early = [began for began in begun.get(label, []) if began - sent < ACK_WAIT / 1000]
            assert len(early) <= 1 or not label.startswith("plain"), f"{label} ran twice without a fault"
