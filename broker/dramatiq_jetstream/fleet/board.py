"""The memory that a worker process shares with its supervisor: that it lives, what it has done, what it holds.

The worker writes, the supervisor reads. A worker that dies of anything leaves its board as it was, so the supervisor
knows which messages to hand on. Each write is one store of an aligned word or of one byte, and a slot's state is
written after its contents: a reader never sees half of one.

A delivery costs the worker two such writes and a copy of its ack subject. What finds no slot, because more than
`SLOTS` are held or because its ack subject is too long, is not noted, and waits for `ack_wait` if the worker dies.

A delivery that was settled stays on the board as *answered* until its answer has left the process: if the worker dies
before, it is handed on too. The server ignores what is handed on after it was acked.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dramatiq_jetstream.wire.intake import INTAKE_BYTES

__all__ = ["BOUNDS_SECONDS", "SERIES", "SLOTS", "Board", "Counts", "Held"]

#: Deliveries that one worker can note at a time.
SLOTS: Final = 8_192

#: Actors whose attempts are counted each by itself; those beyond are counted together, in the last series.
SERIES: Final = 256

#: The upper bounds of the buckets in which attempts are counted by how long they took; one more has no bound.
BOUNDS_SECONDS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_BUCKETS: Final = len(BOUNDS_SECONDS) + 1
_SERIES_WORDS: Final = 16
_SUM, _FAILED, _RETRIED = range(_BUCKETS, _SERIES_WORDS)

# Words of the header; the series follow it, and the slots those.
_BEAT, _THREADS_LOST, _CONNECTED, _USED = range(4)
_HEADER_WORDS: Final = 512
_SERIES_START: Final = _HEADER_WORDS
_SLOTS_START: Final = _SERIES_START + SERIES * _SERIES_WORDS

# A slot: a byte for its state and two for the length of its subject; the time limit, the thread and the beginning of
# what it runs, a word each; the subject.
_SLOT_WORDS: Final = 64
_SUBJECT: Final = 32
_MAX_SUBJECT: Final = _SLOT_WORDS * 8 - _SUBJECT
_FREE, _HELD, _BEGUN, _ANSWERED = range(4)

# At the end, what the connection has received (see `wire.intake`).
_INTAKE_START: Final = _SLOTS_START + SLOTS * _SLOT_WORDS
_SIZE: Final = _INTAKE_START * 8 + INTAKE_BYTES


@dataclass(frozen=True, slots=True)
class Held:
    """A delivery that a worker held.

    Attributes:
      begun: Its actor had been called.
      answered: It was settled, and the answer may not have left the process.
      begun_ms, kill_at_ms: When its actor was called, and when the process is to be killed for it, in milliseconds of
        the monotonic clock; 0 for never.
      thread: The identifier of the thread that runs it, if it has a hard time limit.
    """

    ack_subject: str
    begun: bool = False
    answered: bool = False
    begun_ms: int = 0
    kill_at_ms: int = 0
    thread: int = 0

    def is_overdue(self, monotonic_ms: int) -> bool:
        """Whether the worker is to be killed for it by now."""
        return 0 < self.kill_at_ms <= monotonic_ms


@dataclass(slots=True)
class Counts:
    """Attempts that ended: how many took how long (see `BOUNDS_SECONDS`), failed, and are retried."""

    buckets: list[int]
    microseconds: int
    failed: int
    retried: int

    @classmethod
    def none(cls) -> Counts:
        return cls([0] * _BUCKETS, 0, 0, 0)

    def __iadd__(self, other: Counts) -> Counts:
        self.buckets = [mine + theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True)]
        self.microseconds += other.microseconds
        self.failed += other.failed
        self.retried += other.retried
        return self

    @property
    def attempts(self) -> int:
        return sum(self.buckets)


class Board:
    """One worker's board; both processes map the same file descriptor.

    Attributes:
      intake: The memory in which what the worker's connection receives stays until it is on the board.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._words = memoryview(self._memory)[: _INTAKE_START * 8].cast("Q")
        self.intake = memoryview(self._memory)[_INTAKE_START * 8 :]
        self._free = list(range(SLOTS - 1, -1, -1))

    @classmethod
    def create(cls) -> Board:
        """Make an empty board, for the supervisor; pages that are never written cost nothing."""
        descriptor = os.memfd_create("dramatiq-jetstream-board", 0)
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def close(self) -> None:
        """Give the descriptor back. The memory goes with this object, which another thread may be reading."""
        os.close(self.descriptor)

    # The worker writes

    def beat(self, monotonic_ms: int) -> None:
        """Note that the event loop and the consumer threads have come by."""
        self._words[_BEAT] = monotonic_ms

    def count(self, series: int, seconds: float, *, failed: bool) -> None:
        """Count an attempt that ended; only one thread may count at a time."""
        words, start = self._words, _SERIES_START + series * _SERIES_WORDS
        words[start + _SUM] += int(seconds * 1_000_000)
        words[start + _FAILED] += failed
        words[start + bisect_left(BOUNDS_SECONDS, seconds)] += 1

    def count_retry(self, series: int) -> None:
        """Count a retry that was stored; only one thread may count at a time."""
        self._words[_SERIES_START + series * _SERIES_WORDS + _RETRIED] += 1

    def note_threads_lost(self, count: int) -> None:
        """Note how many of the worker's threads have died."""
        self._words[_THREADS_LOST] = count

    def note_connected(self, connected: bool) -> None:
        """Note whether the server is there now."""
        self._words[_CONNECTED] = connected

    def hold(self, ack_subject: str) -> int | None:
        """Note a delivery; returns its slot, None when there is none. On the loop thread."""
        subject = ack_subject.encode()
        if not self._free or len(subject) > _MAX_SUBJECT:
            return None
        slot = (
            self._free.pop()
        )  # the one released last, or the lowest: the supervisor reads no further than it must
        if slot >= self._words[_USED]:
            self._words[_USED] = slot + 1
        self._write(slot, subject)
        self._memory[(_SLOTS_START + slot * _SLOT_WORDS) * 8] = _HELD
        return slot

    def move(self, slot: int, ack_subject: str) -> None:
        """Note the ack subject under which a delivery came again; on the loop thread."""
        subject = ack_subject.encode()
        if len(subject) <= _MAX_SUBJECT:
            self._write(slot, subject)

    def _write(self, slot: int, subject: bytes) -> None:
        start = (_SLOTS_START + slot * _SLOT_WORDS) * 8
        self._memory[start + _SUBJECT : start + _SUBJECT + len(subject)] = subject
        self._memory[start + 2 : start + 4] = len(subject).to_bytes(2, "little")

    def begin(self, slot: int, begun_ms: int, kill_at_ms: int = 0, thread: int = 0) -> None:
        """Note that the actor of a delivery is called, and until when it may run; any thread."""
        start = _SLOTS_START + slot * _SLOT_WORDS
        self._words[start + 3] = begun_ms
        self._words[start + 2] = thread
        self._words[start + 1] = kill_at_ms
        self._memory[start * 8] = _BEGUN

    def end(self, slot: int) -> None:
        """Note that the actor of a delivery has returned; any thread."""
        self._words[_SLOTS_START + slot * _SLOT_WORDS + 1] = 0

    def answer(self, slot: int) -> None:
        """Note that a delivery was settled; on the loop thread."""
        self._memory[(_SLOTS_START + slot * _SLOT_WORDS) * 8] = _ANSWERED

    def release(self, slot: int) -> None:
        """Forget a delivery; on the loop thread."""
        self._memory[(_SLOTS_START + slot * _SLOT_WORDS) * 8] = _FREE
        self._words[_SLOTS_START + slot * _SLOT_WORDS + 1] = 0
        self._free.append(slot)

    # The supervisor reads

    @property
    def last_beat(self) -> int:
        """When the worker last said that it lives, in milliseconds of the monotonic clock; 0 before it did."""
        return self._words[_BEAT]

    @property
    def threads_lost(self) -> int:
        return self._words[_THREADS_LOST]

    @property
    def connected(self) -> bool:
        return bool(self._words[_CONNECTED])

    def counts(self, series: int) -> Counts:
        """The attempts of one series so far."""
        start = _SERIES_START + series * _SERIES_WORDS
        words = self._words[start : start + _SERIES_WORDS].tolist()
        return Counts(words[:_BUCKETS], *words[_BUCKETS:])

    def held(self) -> Iterator[Held]:
        """What the worker holds."""
        for slot in range(self._words[_USED]):
            if (held := self._read(slot)) is not None:
                yield held

    def in_flight(self) -> int:
        """How many deliveries the worker holds and has not settled."""
        return sum(not held.answered for held in self.held())

    def overdue(self, monotonic_ms: int) -> Held | None:
        """A delivery for which the worker is to be killed by now, if there is one."""
        end = _SLOTS_START + self._words[_USED] * _SLOT_WORDS
        for slot, kill_at in enumerate(self._words[_SLOTS_START + 1 : end : _SLOT_WORDS].tolist()):
            if kill_at and kill_at <= monotonic_ms:
                held = self._read(slot)
                if held is not None and held.is_overdue(monotonic_ms):
                    return held
        return None

    def _read(self, slot: int) -> Held | None:
        start = _SLOTS_START + slot * _SLOT_WORDS
        at = start * 8
        state = self._memory[at]
        if state == _FREE:
            return None
        length = int.from_bytes(self._memory[at + 2 : at + 4], "little")
        subject = self._memory[at + _SUBJECT : at + _SUBJECT + length].decode()
        if state != _BEGUN:
            return Held(subject, answered=state == _ANSWERED)
        kill_at_ms, thread, begun_ms = self._words[start + 1 : start + 4].tolist()
        return Held(subject, begun=True, begun_ms=begun_ms, kill_at_ms=kill_at_ms, thread=thread)
