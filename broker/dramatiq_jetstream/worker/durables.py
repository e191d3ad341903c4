"""The durables that this process reads, and which life of each its deliveries belong to.

The server resolves a settlement (ack, nak, in-progress signal) by the message's sequence in the stream and nothing
else. If the stream was deleted and created again, or its server came back with an emptied or older store, that sequence
is another message, which would count as done by a late ack. So every delivery belongs to one *life* of its durable, and
is only settled in that life.

While a durable is *certain*, settlements are sent at once and cost nothing extra. Whatever may hide a change puts it in
doubt: a lost connection, a deleted stream, a refused pull, missing heartbeats, a question without a reply. Then nothing
is settled or fetched until the server has said when it created the consumer, how far the stream goes, and what it
stored first after the newest message that we would settle. The life goes on if the consumer is the same one, the stream
still reaches our messages, and nothing newer is stored at or before their place, as in an older copy of the store that
was written to. Otherwise a new life begins, and settlements of the old one are dropped. A message of the old life that
is delivered again is recognised by its place and its time, and is settled in the new life.

The server announces a deleted stream, and tells a standing pull that its consumer is gone. What neither shows (a new
leader, a changed `ack_wait`) is seen by looking at a consumer every two seconds while messages of it run for longer.
A node that does not answer puts all consumers in doubt that it leads (see `heartbeats`).

If the process dies, all of this is lost, and nothing needs it: there is nothing to settle. Everything here belongs
to the loop thread, except `Durables.get`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import BrokerConnectionError, NotFound, PermissionDenied
from dramatiq_jetstream.jetstream.names import METADATA_ACK_WAIT
from dramatiq_jetstream.jetstream.reading import time_text
from dramatiq_jetstream.wire.connection import Connection, CoreSubscription, Msg
from dramatiq_jetstream.wire.replies import translate

from .heartbeats import Heartbeats

__all__ = ["Durable", "Durables"]

logger = logging.getLogger(__name__)

#: How long a reply about a durable is awaited, and the pause before the server is asked again.
REPLY_SECONDS = 2.0
PAUSE_SECONDS = 0.3

#: How often a durable is checked while its deliveries are held for longer than LOOK_AFTER_SECONDS.
LOOK_SECONDS = 2.0
LOOK_AFTER_SECONDS = 0.3

#: How long a durable is in doubt before the log says so, once.
SILENCE_SECONDS = 6.0

#: The server announces here that it deleted the stream named by the last token.
_DELETED = "$JS.EVENT.ADVISORY.STREAM.DELETED."

_NANOSECONDS_PER_MS = 1_000_000  # JetStream's durations are nanoseconds


class Durable:
    """One durable of the server, as this process knows it.

    Attributes:
      label: Names it to people.
      ack_wait: Milliseconds after which the server delivers again; the server's own value once it is known.
      life: Stands for the present life, and is another object in the next one; None when the durable is missing or was
        never asked about.
      subject: What it reads of a stream that keeps messages until they are removed; None where that is not for workers.
      has_acked: Whether any message had been acked when its life began.
      certain: True while settlements may be sent and messages fetched.
      missing: True once the server has said that there is no such durable.
    """

    __slots__ = (
        "_created",
        "_crowded",
        "_doubts",
        "_leader",
        "_looked",
        "_next",
        "_silent",
        "_since",
        "_task",
        "_wanted",
        "ack_wait",
        "certain",
        "has_acked",
        "label",
        "life",
        "missing",
        "name",
        "stream",
        "subject",
    )

    def __init__(self, stream: str, name: str, ack_wait: int, subject: str | None = None) -> None:
        self.stream = stream
        self.name = name
        self.subject = subject
        self.label = f"{name} of {stream}"
        self.ack_wait = ack_wait
        self._wanted = False
        self._doubts = 0
        self._task: asyncio.Task[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self.life: object | None = None
        self.certain = False
        self.missing = False
        self.has_acked = False
        self._created = ""
        self._leader: tuple[object, ...] = ()
        self._looked = 0.0
        self._next = 0.0
        self._since = 0.0
        self._silent = False
        self._crowded = False

    def __str__(self) -> str:
        return self.label

    @property
    def node(self) -> object:
        """The node that leads its consumer; None outside of a cluster, and while it is not known."""
        return self._leader[0] if self._leader else None


class Durables:
    """All durables of one connection.

    Parameters:
      newest: Returns the highest sequence and the latest time of storing among the unsettled messages of a durable's
        life; None when there are none.
    """

    def __init__(self, connection: Connection, newest: Callable[[Durable], tuple[int, int] | None]) -> None:
        self._connection = connection
        self._newest = newest
        self.heartbeats = Heartbeats()
        self._durables: dict[str, Durable] = {}
        self._on_certain: list[Callable[[Durable, bool], None]] = []
        self._on_missing: list[Callable[[Durable], None]] = []
        self._denied: set[str] = set()
        self._deletions: CoreSubscription | None = None
        connection.on_lost(self._lost)
        connection.on_reconnect(self._reconnected)
        connection.on_tick(self._tick)
        connection.on_node_lost(self._doubt_all)
        connection.on_fork(self._reset)

    def get(self, stream: str, name: str, ack_wait: int, subject: str | None = None) -> Durable:
        """The durable of that name; from any thread."""
        durable = Durable(stream, name, ack_wait, subject)
        return self._durables.setdefault(durable.label, durable)

    def listen(self) -> None:
        """Hear of deleted streams; from any thread but the loop's."""
        if self._deletions is None:
            self._deletions = self._connection.subscribe(f"{_DELETED}*", self._deleted)

    def _deleted(self, message: Msg) -> None:
        for durable in list(self._durables.values()):
            if durable._wanted and message.subject == f"{_DELETED}{durable.stream}":
                self.doubt(durable)

    def on_certain(self, callback: Callable[[Durable, bool], None]) -> None:
        """Call `callback(durable, same)` when a durable is certain again; `same` says that its life goes on."""
        self._on_certain.append(callback)

    def on_missing(self, callback: Callable[[Durable], None]) -> None:
        """Call `callback(durable)` when the server says that there is no such durable."""
        self._on_missing.append(callback)

    def remove_callback(self, callback: Callable[..., None]) -> None:
        """Undo `on_certain` or `on_missing` for a callback."""
        for callbacks in (self._on_certain, self._on_missing):
            if callback in callbacks:
                callbacks.remove(callback)

    # On the loop thread

    def begin(self, durable: Durable) -> None:
        """Keep a durable certain from now on; ask about it if it is not, also when it was missing."""
        if not durable._wanted or durable.missing:
            durable._wanted, durable.missing = True, False
            durable._since = time.monotonic()
        if not durable.certain:
            self._ask(durable)

    def doubt(self, durable: Durable) -> None:
        """Send and fetch nothing until the server has said that this is still the life we know."""
        self._unsettle(durable)
        self._ask(durable)

    def doubt_node(self, durable: Durable) -> None:
        """Doubt all durables whose leader is that of `durable`: it does not answer."""
        node = durable.node
        for each in list(self._durables.values()):
            if each is durable or (each._wanted and each.certain and each.node == node):
                self.doubt(each)

    def _doubt_all(self) -> None:
        """A node of the cluster was lost, and perhaps requests and deliveries that were on their way to it."""
        for each in list(self._durables.values()):
            if each._wanted and each.certain:
                self.doubt(each)

    def _unsettle(self, durable: Durable) -> None:
        if durable.certain or durable.missing or not self._connection.is_open:
            durable._since = 0.0
        durable.certain = durable.missing = False
        # The reply to a question that is under way must not be believed any more.
        durable._doubts += 1
        durable._task = None

    def look(self, durable: Durable) -> None:
        """Check that a durable whose messages run is still the same, unless that was done lately."""
        now = time.monotonic()
        if durable.certain and durable._task is None and now - durable._looked >= LOOK_SECONDS:
            durable._looked = now
            self._start(durable, self._look(durable))

    async def _look(self, durable: Durable) -> None:
        doubts, life = durable._doubts, durable.life
        try:
            info = await self.ask(f"CONSUMER.INFO.{durable.stream}.{durable.name}")
        except PermissionDenied as error:
            self._note_denied(error)
            return
        except BrokerError:
            info = {}
        if durable._doubts != doubts or durable.life is not life:
            return
        if info.get("created") == durable._created and _leader(info) == durable._leader:
            durable.ack_wait = _ack_wait(info)
        elif info:
            self.doubt(durable)
        else:
            self.doubt_node(durable)

    def _ask(self, durable: Durable) -> None:
        if durable._task is None and self._connection.is_open and time.monotonic() >= durable._next:
            durable._since = durable._since or time.monotonic()
            durable._next = time.monotonic() + PAUSE_SECONDS
            self._start(durable, self._settle(durable))

    def _start(self, durable: Durable, work: Any) -> None:
        durable._task = task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._ended(durable, task))

    def _ended(self, durable: Durable, task: asyncio.Task[None]) -> None:
        if durable._task is task:
            durable._task = None
        if not task.cancelled() and task.exception() is not None:
            logger.error("Asking about the consumer %s failed.", durable, exc_info=task.exception())

    async def _settle(self, durable: Durable) -> None:
        """End the doubt about a durable, if the server answers; the tick asks again if it does not."""
        doubts = durable._doubts
        same = False
        try:
            info = await self.ask(f"CONSUMER.INFO.{durable.stream}.{durable.name}")
            if durable.life is not None and info["created"] == durable._created:
                same = await self._is_intact(durable)
        except NotFound:
            if durable._doubts == doubts:
                self._note_missing(durable)
            return
        except PermissionDenied as error:
            self._note_denied(error)
            info = None
        except BrokerError:
            return
        if durable._doubts != doubts:
            return  # a reply from before the latest doubt says nothing about now
        if not same:
            durable.life = object()
        if info is not None:
            durable._created, durable._leader = info["created"], _leader(info)
            durable.ack_wait = _ack_wait(info)
            durable.has_acked = info["ack_floor"]["consumer_seq"] > 0
            self._note_crowd(durable, info)
        self._note_certain(durable, same)

    async def _is_intact(self, durable: Durable) -> bool:
        """Whether the stream holds the messages that we would settle, or nothing newer in their place."""
        newest = self._newest(durable)
        if newest is None:
            return True
        sequence, stored = newest
        state = (await self.ask(f"STREAM.INFO.{durable.stream}"))["state"]
        if state["last_seq"] < sequence:
            return False
        try:
            later = await self.ask(f"STREAM.MSG.GET.{durable.stream}", {"start_time": time_text(stored + 1)})
        except NotFound:
            return True
        return bool(later["message"]["seq"] > sequence)

    async def requests(self, durable: Durable) -> int:
        """How many requests wait at a durable, this process's included.

        Raises:
          BrokerError: When the server does not say.
        """
        info = await self.ask(f"CONSUMER.INFO.{durable.stream}.{durable.name}")
        return 0 if info.get("paused") else int(info["num_waiting"])

    async def ask(self, verb: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask the JetStream API; raises a BrokerError for what it refuses or does not answer in time."""
        answered: asyncio.Future[Msg | BaseException] = asyncio.get_running_loop().create_future()

        def note(answer: Msg | BaseException) -> None:
            if not answered.done():
                answered.set_result(answer)

        payload = b"" if body is None else json.dumps(body).encode()
        self._connection.query(self._connection.api_subject(verb), payload, note, REPLY_SECONDS)
        answer = await answered
        if isinstance(answer, BaseException):
            raise answer if isinstance(answer, BrokerError) else BrokerConnectionError(str(answer))
        reply: dict[str, Any] = json.loads(answer.data)
        if "error" in reply:
            raise translate(reply["error"])
        return reply

    def _note_certain(self, durable: Durable, same: bool) -> None:
        if durable._silent:
            logger.info("The consumer %s answers again.", durable)
        durable.certain, durable.missing, durable._silent = True, False, False
        durable._looked = time.monotonic()
        self._call(self._on_certain, durable, same)

    def _note_crowd(self, durable: Durable, info: Mapping[str, Any]) -> None:
        """Log why requests get no reply: the server refuses one with heartbeats silently."""
        crowded = info["num_waiting"] >= (info["config"].get("max_waiting") or math.inf)
        if crowded and not durable._crowded:
            logger.warning(
                "The consumer %s has as many waiting requests as its max_waiting allows, so that some workers get "
                "nothing: run fewer processes, or delete it while no worker runs and have `fleet setup` make it.",
                durable,
            )
        durable._crowded = crowded

    def _note_missing(self, durable: Durable) -> None:
        durable.life, durable.certain, durable.missing, durable._silent = None, False, True, False
        self._call(self._on_missing, durable)

    def _note_denied(self, error: PermissionDenied) -> None:
        if str(error) not in self._denied:
            self._denied.add(str(error))
            logger.warning(
                "%s Without it, acks that were held over an interruption are dropped, and their messages run again.",
                error,
            )

    def _call(self, callbacks: list[Any], *args: object) -> None:
        for callback in list(callbacks):
            try:
                callback(*args)
            except Exception:
                logger.exception("A callback about the consumer %s failed.", args[0])

    def _tick(self) -> None:
        if not self._connection.is_open:
            return
        now = time.monotonic()
        for durable in list(self._durables.values()):
            if not durable._wanted or durable.certain or durable.missing:
                continue
            self._ask(durable)
            if durable._since and now - durable._since > SILENCE_SECONDS and not durable._silent:
                durable._silent = True
                logger.warning(
                    "The consumer %s does not answer; its messages wait, those of other consumers do not.",
                    durable,
                )

    def _lost(self) -> None:
        """Before anything can be sent over another connection."""
        for durable in list(self._durables.values()):
            self._unsettle(durable)

    def _reconnected(self) -> None:
        for durable in list(self._durables.values()):
            self._unsettle(durable)
            durable._since, durable._next = 0.0, 0.0
            if durable._wanted:
                self._ask(durable)

    def _reset(self) -> None:
        """In the child of a fork: the parent's tasks and messages are not ours."""
        if self._deletions is not None:
            self._deletions.close()
            self._deletions = None
        self.heartbeats.reset()
        for durable in self._durables.values():
            durable._wanted, durable._task = False, None
            durable._reset()


def _leader(info: Mapping[str, Any]) -> tuple[object, ...]:
    cluster = info.get("cluster") or {}
    return cluster.get("leader"), cluster.get("leader_since")


def _ack_wait(info: Mapping[str, Any]) -> int:
    """The server's `ack_wait` in milliseconds, or the shorter one that is announced."""
    config = info["config"]
    present = int(config["ack_wait"]) // _NANOSECONDS_PER_MS
    return min(present, int((config.get("metadata") or {}).get(METADATA_ACK_WAIT, present)))
