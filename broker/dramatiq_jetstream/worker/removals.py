"""Removes what is done from the streams of queues.

A queue's stream keeps a message that was acked until it is removed. nats-server syncs a removal to the disk each time,
and a purge of thousands once (decision 17). So while it acks, a process asks each consumer for its *floor*: everything
up to there is acked, by whomever. What the consumer's subject has up to there is purged by one process or another, each
as often as its share of the acks, so a fleet of any size purges about once a second. When the floor comes to a rest,
each process purges once more.

A purge makes the server forget which messages are queued to be delivered again: they come when their `ack_wait` is
over (nats-server 2.15.1, `consumer.purge`). So a purge is sent when the server has just shown that there are hardly
any: nothing is in flight, or requests stand at the consumer, or a message was delivered for the first time, because the
others come before those. What is requeued between that sign and the purge still has to wait.

A message that runs for long, or was requeued with a delay, *holds* the floor. When the floor has not moved for a while,
each process removes what it has acked above it, one by one. A process that has too much of that fetches nothing more.

What was removed does not come back to a consumer that is lost and made again, so the stream is also the note of what is
done. What was not removed yet runs again then.

If the process dies, what it acked is purged by another process or the next one; above a held floor it stays until the
floor moves. A removal that is sent twice removes nothing more. A place in the stream belongs to one life of its durable
(see `durables`), so nothing is removed while that is in doubt, and what was done before a doubt is left to the next
purge. Everything here belongs to the loop thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import ApiError, NotFound, PermissionDenied
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.error_numbers import NO_MESSAGE_TO_DELETE, SEQUENCE_NOT_FOUND

from .durables import Durable, Durables

__all__ = ["Removals"]

logger = logging.getLogger(__name__)

#: How often a consumer is asked for its floor at most.
LOOK_SECONDS = 0.5

#: How long the floor stands before what is done above it is removed one by one, and how many requests wait for that.
HELD_SECONDS = 2.0
AT_ONCE = 256

#: The pause after the server has refused to say or to remove something.
REFUSED_PAUSE_SECONDS = 10.0

#: With more done messages in one stream than this that this process has not seen removed, it fetches nothing more.
MOST_DONE = 100_000


@dataclass(slots=True)
class _Done:
    """What is done in one durable's stream and may still be there.

    Attributes:
      sequences: What this process has acked above the floor.
      acked: How many messages this process has acked since it looked last.
      floor, position: Up to where all is done, as a place in the stream, and as a number of deliveries.
      below: Whether something may be left up to the floor.
      due: Whether this process is to purge it.
      moved: When the floor had moved.
      looked: When the consumer was asked last.
      kept: Whether the stream keeps what is done; None until the server has said so.
      work: What is under way.
    """

    sequences: set[int] = field(default_factory=set)
    acked: int = 0
    floor: int = 0
    position: int = 0
    below: bool = False
    due: bool = False
    moved: float = 0.0
    looked: float = 0.0
    kept: bool | None = None
    work: asyncio.Task[None] | None = None


class Removals:
    """What this process removes, from all streams.

    Attributes:
      awaiting: The durables of which a first delivery is awaited.
    """

    def __init__(self, connection: Connection, durables: Durables) -> None:
        self._durables = durables
        self._done: dict[Durable, _Done] = {}
        self._refused: set[str] = set()
        self.awaiting: set[Durable] = set()
        durables.on_certain(self._certain)
        connection.on_tick(self._tick)
        connection.on_fork(self._reset)

    def note(self, durable: Durable, sequences: Iterable[int]) -> None:
        """Note messages that are acked, and known to be."""
        if durable.subject is not None:
            done = self._of(durable)
            if done.kept is False:
                return
            above = [sequence for sequence in sequences if sequence > done.floor]
            done.acked += len(above)
            done.sequences.update(above)

    def note_first(self, durable: Durable) -> None:
        """Note that a message was delivered for the first time."""
        done = self._done.get(durable)
        if done is not None and done.work is None and durable.certain:
            self.awaiting.discard(durable)
            done.work = asyncio.ensure_future(self._work(durable, done, self._purge))

    def has_many(self, durable: Durable) -> bool:
        """Whether there is so much to remove that no more should be done."""
        done = self._done.get(durable)
        return done is not None and len(done.sequences) > MOST_DONE

    def _of(self, durable: Durable) -> _Done:
        done = self._done.get(durable)
        if done is None:
            done = self._done[durable] = _Done(moved=time.monotonic())
        return done

    def _certain(self, durable: Durable, same: bool) -> None:
        if durable.subject is not None:
            self._forget(durable)  # the store may be an older copy, with other messages in these places
            self._of(durable).below = durable.has_acked

    def _forget(self, durable: Durable) -> None:
        self.awaiting.discard(durable)
        done = self._done.pop(durable, None)
        if done is not None and done.work is not None:
            done.work.cancel()

    def _reset(self) -> None:
        """In the child of a fork, where the parent's tasks do not run."""
        self._done.clear()
        self.awaiting.clear()

    def _tick(self) -> None:
        now = time.monotonic()
        for durable, done in self._done.items():
            if (
                (done.sequences or done.below)
                and done.work is None
                and durable.certain
                and now - done.looked >= LOOK_SECONDS
            ):
                done.looked = now
                done.work = asyncio.ensure_future(self._work(durable, done, self._look))

    async def _work(
        self, durable: Durable, done: _Done, step: Callable[[Durable, _Done], Awaitable[None]]
    ) -> None:
        try:
            await step(durable, done)
        except NotFound:
            return
        except (ApiError, PermissionDenied) as error:
            self._note_refused(durable, done, error)
        except BrokerError:
            return  # the next look does it
        except Exception:
            logger.exception("Removing what is done from stream %s failed.", durable.stream)
        finally:
            done.work = None

    async def _look(self, durable: Durable, done: _Done) -> None:
        self.awaiting.discard(durable)
        if done.kept is None:
            config = (await self._durables.ask(f"STREAM.INFO.{durable.stream}"))["config"]
            done.kept = config["retention"] == "limits"
        if not done.kept:
            done.sequences.clear()
            done.below = False
            return
        info = await self._durables.ask(f"CONSUMER.INFO.{durable.stream}.{durable.name}")
        self._note_floor(done, info["ack_floor"])
        if done.below and done.due:
            if _has_none_queued(info):
                await self._purge(durable, done)
            else:
                self.awaiting.add(durable)
        is_held = time.monotonic() - done.moved >= HELD_SECONDS
        if is_held or len(done.sequences) > MOST_DONE // 2:
            await self._remove_singly(durable, done)

    @staticmethod
    def _note_floor(done: _Done, found: Mapping[str, Any]) -> None:
        floor, position = int(found["stream_seq"]), int(found["consumer_seq"])
        if floor > done.floor:
            share = done.acked / max(1, position - done.position)
            done.due = done.due or random.random() < share
            done.sequences = {sequence for sequence in done.sequences if sequence > floor}
            done.floor, done.position, done.acked = floor, position, 0
            done.below, done.moved = True, time.monotonic()
        elif done.below:
            done.due = True

    async def _purge(self, durable: Durable, done: _Done) -> None:
        if durable.certain:
            floor, body = done.floor, {"filter": durable.subject, "seq": done.floor + 1}
            await self._durables.ask(f"STREAM.PURGE.{durable.stream}", body)
            done.due, done.below = False, done.floor > floor

    async def _remove_singly(self, durable: Durable, done: _Done) -> None:
        """Remove what this process acked above the floor, until it is time to look at the floor again."""
        until = time.monotonic() + LOOK_SECONDS
        while done.sequences and durable.certain and time.monotonic() < until:
            some = list(itertools.islice(done.sequences, AT_ONCE))
            for each in await asyncio.gather(
                *(self._remove_one(durable, done, sequence) for sequence in some),
                return_exceptions=True,
            ):
                if each is not None:
                    raise each

    async def _remove_one(self, durable: Durable, done: _Done, sequence: int) -> None:
        if not durable.certain:
            return
        try:
            await self._durables.ask(
                f"STREAM.MSG.DELETE.{durable.stream}", {"seq": sequence, "no_erase": True}
            )
        except ApiError as error:
            gone = error.err_code == NO_MESSAGE_TO_DELETE and "not permitted" not in error.description
            if error.err_code != SEQUENCE_NOT_FOUND and not gone:
                raise
        done.sequences.discard(sequence)

    def _note_refused(self, durable: Durable, done: _Done, error: ApiError | PermissionDenied) -> None:
        """Leave to the next purge what was not removed, so that the worker can go on fetching."""
        done.sequences.clear()
        done.looked = time.monotonic() + REFUSED_PAUSE_SECONDS
        if str(error) not in self._refused:
            self._refused.add(str(error))
            logger.error(
                "Messages that are done stay in stream %s and fill the disk: %s", durable.stream, error
            )


def _has_none_queued(info: Mapping[str, Any]) -> bool:
    """Whether nothing can be queued to be delivered again: nothing is in flight, or requests wait in vain."""
    return not info["num_ack_pending"] or bool(info["num_waiting"] and not info.get("paused"))
