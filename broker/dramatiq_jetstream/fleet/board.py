"""The memory that a worker process shares with its supervisor: that it lives, what it has done, what it holds.

The worker writes, the supervisor reads. A worker that dies of anything leaves its board as it was, so the supervisor
knows which messages to hand on. Each write is one store of an aligned word or of one byte, and a slot's state is
written after its contents: a reader never sees half of one.

A delivery costs the worker two such writes and a copy of its ack subject. What finds no slot, because more than
`SLOTS` are held or because its ack subject is too long, is not noted, and waits for `ack_wait` if the worker dies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["SLOTS", "Board", "Held"]

#: Deliveries that one worker can note at a time.
SLOTS = 8_192

_SLOT_BYTES = 512
_HEADER_BYTES = 4_096
_FREE, _HELD, _BEGUN = 0, 1, 2

# Words of the header.
_BEAT, _FINISHED, _FAILED, _THREADS_LOST, _CONNECTED = range(5)


@dataclass(frozen=True, slots=True)
class Held:
    """A delivery that a worker held; `begun` when its actor had been called."""

    ack_subject: str
    begun: bool


class Board:
    """One worker's board; both processes map the same file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _HEADER_BYTES + SLOTS * _SLOT_BYTES)
        self._words = memoryview(self._memory)[:_HEADER_BYTES].cast("Q")
        self._free = list(range(SLOTS - 1, -1, -1))

    @classmethod
    def create(cls) -> Board:
        """Make an empty board, for the supervisor; pages that are never written cost nothing."""
        descriptor = os.memfd_create("dramatiq-jetstream-board", 0)
        os.ftruncate(descriptor, _HEADER_BYTES + SLOTS * _SLOT_BYTES)
        return cls(descriptor)

    def close(self) -> None:
        self._words.release()
        self._memory.close()
        os.close(self.descriptor)

    # The worker writes

    def beat(self, monotonic_ms: int) -> None:
        """Note that the event loop and the consumer threads have come by."""
        self._words[_BEAT] = monotonic_ms

    def note_finished(self, *, failed: bool) -> None:
        """Count an attempt that ended; only one thread may call it at a time."""
        self._words[_FINISHED] += 1
        self._words[_FAILED] += failed

    def note_threads_lost(self, count: int) -> None:
        """Note how many of the worker's threads have died."""
        self._words[_THREADS_LOST] = count

    def note_connected(self, connected: bool) -> None:
        """Note whether the server is there now."""
        self._words[_CONNECTED] = connected

    def hold(self, ack_subject: str) -> int | None:
        """Note a delivery; returns its slot, None when there is none. On the loop thread."""
        subject = ack_subject.encode()
        if not self._free or len(subject) > _SLOT_BYTES - 8:
            return None
        slot = self._free.pop()
        self._write(slot, subject)
        self._memory[_HEADER_BYTES + slot * _SLOT_BYTES] = _HELD
        return slot

    def move(self, slot: int, ack_subject: str) -> None:
        """Note the ack subject under which a delivery came again; on the loop thread."""
        subject = ack_subject.encode()
        if len(subject) <= _SLOT_BYTES - 8:
            self._write(slot, subject)

    def _write(self, slot: int, subject: bytes) -> None:
        start = _HEADER_BYTES + slot * _SLOT_BYTES
        self._memory[start + 8 : start + 8 + len(subject)] = subject
        self._memory[start + 2 : start + 4] = len(subject).to_bytes(2, "little")

    def begin(self, slot: int) -> None:
        """Note that the actor of a delivery is called; any thread."""
        self._memory[_HEADER_BYTES + slot * _SLOT_BYTES] = _BEGUN

    def release(self, slot: int) -> None:
        """Forget a delivery that was settled; on the loop thread."""
        self._memory[_HEADER_BYTES + slot * _SLOT_BYTES] = _FREE
        self._free.append(slot)

    # The supervisor reads

    @property
    def last_beat(self) -> int:
        """When the worker last said that it lives, in milliseconds of the monotonic clock; 0 before it did."""
        return self._words[_BEAT]

    @property
    def finished(self) -> int:
        return self._words[_FINISHED]

    @property
    def failed(self) -> int:
        return self._words[_FAILED]

    @property
    def threads_lost(self) -> int:
        return self._words[_THREADS_LOST]

    @property
    def connected(self) -> bool:
        return bool(self._words[_CONNECTED])

    def held(self) -> Iterator[Held]:
        """What the worker holds."""
        for slot in range(SLOTS):
            start = _HEADER_BYTES + slot * _SLOT_BYTES
            state = self._memory[start]
            if state != _FREE:
                length = int.from_bytes(self._memory[start + 2 : start + 4], "little")
                subject = self._memory[start + 8 : start + 8 + length].decode()
                yield Held(subject, state == _BEGUN)
