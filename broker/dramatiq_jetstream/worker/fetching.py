"""The pull requests of one source, and the server's replies to them.

A request stands for a while, so that an arriving message is delivered at once; `heartbeats` says for how long, and
which of them the server confirms. The server serves the standing requests of a consumer in turn, and a delivery does
not say which request it is for. So each request has a subscription of its own while it stands, one of a few *slots*,
and the number of messages still to come is known exactly. In a cluster a message is delivered when its consumer's
replicas know of it, and the word that a request has ended may come first. It says how many messages never come for it,
and the request is kept for the others.

Requests are bounded in messages and in bytes, so that large messages over a narrow link do not pile up before
everything else that the server has to say. A consumer, its server or its account may allow less than we ask for: a
refused request is repeated within their limits. An error that no request can avoid is logged once, with what to change,
and the request is repeated after a pause. Any sign that the consumer may have been replaced raises a doubt (see
`durables`).

If the process dies, the server drops its requests. Everything here belongs to the loop thread, except the constructor,
`stop` and `close`.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dramatiq_jetstream.wire.ack_subjects import is_ack_subject
from dramatiq_jetstream.wire.connection import Connection, CoreSubscription, Msg

from .delivery import Source
from .durables import Durables

__all__ = ["Fetcher", "Pull"]

logger = logging.getLogger(__name__)

#: How often the server confirms a request with heartbeats.
HEARTBEAT_SECONDS = 2.0

#: After this long without a heartbeat, or after its end, the server no longer knows the request.
SILENCE_SECONDS = 5.0

#: Requests of one source at a time; a message that fills a small one must not wait for the next.
MAX_PULLS = 4

#: A request is for at least this many bytes, and for as many as one message can have.
MAX_BYTES = 2 * 1024 * 1024
OVERHEAD_BYTES = 8 * 1024

#: The pause before a request is repeated that the server cannot grant now, and one that it cannot grant at all.
BUSY_PAUSE_SECONDS = 2.0
REFUSED_PAUSE_SECONDS = 10.0

_LIMIT = re.compile(r"Exceeded (MaxRequestBatch|MaxRequestExpires|MaxRequestMaxBytes) of (\S+)")
_DURATION = re.compile(r"([\d.]+)(h|ms|m|s)")
_UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@dataclass(eq=False)
class Pull:
    """A request; a `probe` does not wait for messages.

    Attributes:
      expires: When it ends at the latest, by `time.monotonic`.
      node: The node at which it stands.
      beats: Whether the server confirms it with heartbeats.
      ended: Whether the server has said that it ended, and what is left is on its way.
    """

    number: int
    batch: int
    left: int
    probe: bool
    expires: float
    node: object
    beats: bool
    ended: bool = False


@dataclass(eq=False)
class _Slot:
    pull: Pull | None = None
    heard: float = 0.0
    subscription: CoreSubscription | None = None


class Fetcher:
    """The requests of one source.

    Parameters:
      receive: Called with each delivered message.
      changed: Called when a request has ended, so that there may be something to ask for.

    Attributes:
      drained: True when a request was answered with "no messages", until the next one.
      pulls: The requests whose messages have not all come. It is looked at several times for each message, so it is
        kept, not collected.
    """

    def __init__(
        self,
        connection: Connection,
        durables: Durables,
        source: Source,
        *,
        receive: Callable[[Fetcher, Msg], None],
        changed: Callable[[], None],
    ) -> None:
        self.source = source
        self.drained = False
        self.pulls: list[Pull] = []
        self._connection = connection
        self._durables = durables
        self._receive = receive
        self._changed = changed
        self._numbers = itertools.count(1)
        self._rests_until = 0.0
        self._said: set[str] = set()
        self._inbox = connection.new_inbox()
        self._slots = [_Slot() for _ in range(MAX_PULLS)]
        self._heartbeats = durables.heartbeats
        self._take_no_limit()
        for number, slot in enumerate(self._slots):
            slot.subscription = connection.subscribe(
                f"{self._inbox}.{number}.*", self._receiver(slot), wait=number == MAX_PULLS - 1
            )

    def stop(self) -> None:
        """Have the server deliver no more; messages on their way still arrive. From any thread."""
        for slot in self._slots:
            if slot.subscription is not None:
                slot.subscription.withdraw()

    def close(self) -> None:
        for slot in self._slots:
            if slot.subscription is not None:
                slot.subscription.close()
        self._connection.post(self._leave)

    def include(self) -> None:
        """Count as one of the process's sources; on the loop thread."""
        self._heartbeats.include(self)

    def _leave(self) -> None:
        for slot in self._slots:
            self._end(slot)
        self._heartbeats.leave(self)

    @property
    def outstanding(self) -> int:
        """How many messages were asked for and have not come."""
        return sum(pull.left for pull in self.pulls)

    @property
    def is_readable(self) -> bool:
        """Whether it makes sense to ask for something now."""
        return self.source.durable.certain and time.monotonic() >= self._rests_until

    @property
    def is_empty(self) -> bool:
        """Whether the source has nothing: it was drained, and the request that stands since is unfilled."""
        return any(not pull.probe and not pull.ended for pull in self.pulls)

    def ask(self, batch: int, *, probe: bool) -> int:
        """Ask for up to `batch` messages; returns how many were asked for."""
        number, slot = next(
            ((number, slot) for number, slot in enumerate(self._slots) if slot.pull is None), (0, None)
        )
        batch = min(batch, self._max_batch)
        if slot is None or batch <= 0:
            return 0
        self.drained = False
        durable = self.source.durable
        now = slot.heard = time.monotonic()
        expires = min(self._heartbeats.expires, self._max_expires)
        beats = not probe and not self._heartbeats.covers(durable.node)
        pull = Pull(next(self._numbers), batch, batch, probe, now + expires, durable.node, beats)
        slot.pull = pull
        self.pulls.append(pull)
        if beats:
            self._heartbeats.begin(pull.node, pull)
        self._connection.write(
            self._connection.api_subject(f"CONSUMER.MSG.NEXT.{durable.stream}.{durable.name}"),
            json.dumps(self._request(pull, expires)).encode(),
            f"{self._inbox}.{number}.{pull.number}",
        )
        return batch

    def _end(self, slot: _Slot) -> None:
        """Note that a request has ended."""
        pull, slot.pull = slot.pull, None
        if pull is not None:
            self.pulls.remove(pull)
            self._stop_beats(pull)

    def _stop_beats(self, pull: Pull) -> None:
        if pull.beats:
            pull.beats = False
            self._heartbeats.end(pull.node, pull)

    def _request(self, pull: Pull, expires: float) -> Mapping[str, object]:
        request: dict[str, object] = {"batch": pull.batch, "max_bytes": self._max_bytes}
        if pull.probe:
            return {**request, "no_wait": True}
        request["expires"] = int(expires * 1_000_000_000)
        if pull.beats:
            request["idle_heartbeat"] = int(min(HEARTBEAT_SECONDS, expires / 3) * 1_000_000_000)
        return request

    def clear(self) -> None:
        """Begin again: the server knows of no request, and may have other limits."""
        for slot in self._slots:
            self._end(slot)
        self.drained = False
        self._take_no_limit()

    def _take_no_limit(self) -> None:
        self._max_batch = 1_000_000
        self._max_expires = float("inf")
        self._max_bytes = max(MAX_BYTES, self._connection.max_payload + OVERHEAD_BYTES)
        self._bytes_limited = False

    def tick(self) -> None:
        """Notice that the server no longer knows a request: a new leader, a restart, a lost request."""
        durable, now = self.source.durable, time.monotonic()
        stands = silent = lost = False
        for slot in self._slots:
            pull = slot.pull
            if pull is None:
                continue
            stands = True
            if now - slot.heard > SILENCE_SECONDS and (pull.beats or pull.probe):
                silent = True
            lost = lost or now > pull.expires + SILENCE_SECONDS
        if silent or lost:
            for slot in self._slots:
                self._end(slot)
        if silent:
            self._durables.doubt_node(durable)
        elif lost:
            self._durables.doubt(durable)
        elif stands and self._heartbeats.look_due(durable.node):
            self._durables.look(durable)

    def _receiver(self, slot: _Slot) -> Callable[[Msg], None]:
        def receive(message: Msg) -> None:
            slot.heard = time.monotonic()
            pull = slot.pull
            if is_ack_subject(message.reply):
                if pull is not None:
                    pull.left -= 1
                    if pull.left <= 0:
                        self._end(slot)
                self._receive(self, message)
            elif (
                pull is not None
                and message.subject.endswith(f".{pull.number}")
                and "Status" in message.headers
            ):
                self._answered(slot, pull, message.headers)

        return receive

    def _answered(self, slot: _Slot, pull: Pull, headers: Mapping[str, str]) -> None:
        status, description = headers["Status"], headers.get("Description", "")
        if status == "100":  # a heartbeat
            return
        if (coming := pull.left - _never_coming(headers, pull)) > 0:
            # It is given up like a lost request if they do not come.
            pull.left, pull.ended, pull.expires = coming, True, time.monotonic()
            self._stop_beats(pull)
        else:
            self._end(slot)
        if status in ("404", "408"):  # a probe that got everything, or a request that expired
            self.drained = True
        elif description == "Batch Completed":
            pass
        elif description.startswith("Message Size Exceeds MaxBytes"):
            if coming == 0 and pull.left == pull.batch:
                self._allow_more_bytes()
        elif (limit := _LIMIT.match(description)) is not None:
            self._keep_to(limit[1], limit[2])
        elif "MaxWaiting" in description:
            self._rests_until = time.monotonic() + BUSY_PAUSE_SECONDS
            self._durables.doubt(self.source.durable)  # which logs it
            return
        elif "push based" in description:
            self._rest(
                REFUSED_PAUSE_SECONDS,
                logging.ERROR,
                f"The consumer {self.source} is push based, so that no worker can fetch from it: delete it, and run "
                "`fleet setup` or let a worker declare it.",
            )
        elif status in ("409", "503"):
            self._durables.doubt(
                self.source.durable
            )  # deleted, no leader now, a new leader, a server that stops
            return
        else:
            self._rest(
                REFUSED_PAUSE_SECONDS,
                logging.ERROR,
                f"The consumer {self.source} refuses to be read: {description or status}.",
            )
        self._changed()

    def _keep_to(self, limit: str, text: str) -> None:
        """Ask for no more than the server allows."""
        if limit == "MaxRequestBatch":
            self._max_batch = max(1, int(text))
        elif limit == "MaxRequestMaxBytes":
            self._max_bytes, self._bytes_limited = int(text), True
        else:
            self._max_expires = sum(float(n) * _UNIT_SECONDS[unit] for n, unit in _DURATION.findall(text))
        self._say(
            logging.INFO,
            f"The consumer {self.source} limits requests ({limit} of {text}); asking for no more than that.",
        )

    def _allow_more_bytes(self) -> None:
        if not self._bytes_limited:
            self._max_bytes *= 2
            return
        self._rest(
            REFUSED_PAUSE_SECONDS,
            logging.ERROR,
            f"The consumer {self.source} has a message that is larger than the {self._max_bytes} bytes for which its "
            "max_bytes lets a worker ask: raise or remove that limit.",
        )
        self._take_no_limit()  # it may have been raised by the next time

    def _rest(self, seconds: float, level: int, why: str) -> None:
        self._rests_until = time.monotonic() + seconds
        self._say(level, why)

    def _say(self, level: int, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.log(level, "%s", what)


def _never_coming(headers: Mapping[str, str], pull: Pull) -> int:
    """Return how many of a request's messages the server has not sent and will not send."""
    pending = headers.get("Nats-Pending-Messages", "")
    return int(pending) if pending.isdecimal() else pull.left
