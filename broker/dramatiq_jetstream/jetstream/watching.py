"""Following a bucket as it changes: an ordered, ephemeral consumer that is replaced whenever it breaks off.

The server holds the consumer, this process holds the sequence of the last entry it has seen. A gap, a
reconnect or silence (the server sends heartbeats) ends the consumer and starts another one behind that
sequence, so no entry is missed and none comes twice. The server forgets a consumer whose reader died.

Sequences belong to one life of the stream. After each consumer was made, the server is asked when its stream was
made, how far it goes, and what it stored first after the last entry that was seen: a stream that was deleted and made
again, or came back with less, is read from its start, also when it has grown beyond that entry since.

Everything here runs on the connection's loop thread, except `KeyWatcher`'s constructor and `close`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable
from typing import Any

from dramatiq_jetstream.wire.ack_subjects import ack_tokens, is_ack_subject
from dramatiq_jetstream.wire.connection import Connection, Msg

from .reading import StoredMessage, time_text

__all__ = ["KeyWatcher"]

logger = logging.getLogger(__name__)

_NANOSECONDS_PER_SECOND = 1_000_000_000  # JetStream's durations are nanoseconds

#: Seconds between heartbeats of the server, after how many seconds of silence the consumer is replaced, and
#: after how many the server forgets one without a reader.
HEARTBEAT_SECONDS = 2
SILENCE_SECONDS = 5.0
FORGET_AFTER_SECONDS = 60

#: Seconds before a consumer that could not be made is tried again.
RETRY_SECONDS = 0.5


class KeyWatcher:
    """Calls `callback` on the loop thread for each message under `subject`, until `close`.

    First come the newest messages that exist, one per subject, then each one that is stored. The callback
    must not block; what it raises is logged.
    """

    def __init__(
        self, connection: Connection, stream: str, subject: str, callback: Callable[[StoredMessage], None]
    ) -> None:
        self.subject = subject
        self._connection = connection
        self._stream = stream
        self._callback = callback
        self._sequence = 0
        self._stored = 0  # when the last seen entry was stored, in nanoseconds since 1970
        self._behind = 0  # what had been seen when the consumer was asked for
        self._behind_stored = 0
        self._created = ""
        self._complaint = ""  # why the last consumer could not be made, as logged
        self._name = ""
        self._generation = 0
        self._delivered = 0
        self._alive: asyncio.TimerHandle | None = None
        self._closed = False
        self._inbox = connection.new_inbox()
        # The server only notices a reader whose subscription is literally the consumer's deliver subject.
        self._subscriptions = (
            connection.subscribe(self._inbox, self._receive, confirmed=True),
            connection.subscribe(f"{self._inbox}.made.*", self._receive_made),
            connection.subscribe(f"{self._inbox}.life.*", self._receive_life),
            connection.subscribe(f"{self._inbox}.later.*", self._receive_later),
        )
        connection.on_reconnect(self._restart)
        connection.post(self._restart)

    def close(self) -> None:
        """Stop; one last callback may still be running."""
        if self._closed:
            return
        self._closed = True
        self._connection.remove_callback(self._restart)
        for subscription in self._subscriptions:
            subscription.close()
        self._connection.post(self._stop)

    def _stop(self) -> None:
        if self._alive is not None:
            self._alive.cancel()
            self._alive = None
        if self._name:
            self._connection.write(
                self._connection.api_subject(f"CONSUMER.DELETE.{self._stream}.{self._name}")
            )
            self._name = ""

    def _restart(self) -> None:
        """Replace the consumer by one that starts behind what was seen."""
        if self._closed:
            return
        self._stop()
        self._generation += 1
        self._delivered = 0
        self._behind, self._behind_stored = self._sequence, self._stored
        self._name = f"watch-{secrets.token_hex(8)}"
        config: dict[str, Any] = {
            "name": self._name,
            "deliver_subject": self._inbox,
            "deliver_policy": "last_per_subject",
            "filter_subject": self.subject,
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": HEARTBEAT_SECONDS * _NANOSECONDS_PER_SECOND,
            "inactive_threshold": FORGET_AFTER_SECONDS * _NANOSECONDS_PER_SECOND,
            "mem_storage": True,
            "num_replicas": 1,
        }
        if self._sequence:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": self._sequence + 1}
        self._connection.write(
            self._connection.api_subject(f"CONSUMER.CREATE.{self._stream}.{self._name}.{self.subject}"),
            json.dumps({"stream_name": self._stream, "config": config, "action": "create"}).encode(),
            f"{self._inbox}.made.{self._generation}",
        )
        self._restart_in(SILENCE_SECONDS)

    def _restart_in(self, seconds: float) -> None:
        if self._alive is not None:
            self._alive.cancel()
        self._alive = asyncio.get_running_loop().call_later(seconds, self._restart)

    def _receive(self, message: Msg) -> None:
        if self._closed:
            return
        if is_ack_subject(message.reply):  # an entry: it comes with the subject it is stored under
            self._handle_entry(message)
            return
        self._handle_status(message)

    def _handle_entry(self, message: Msg) -> None:
        tokens = ack_tokens(message.reply)
        if tokens[1] != self._name:
            return
        self._restart_in(SILENCE_SECONDS)
        sequence, delivered, timestamp = (int(token) for token in tokens[3:6])
        if delivered != self._delivered + 1:
            self._restart()
            return
        self._delivered = delivered
        self._sequence, self._stored = sequence, max(self._stored, timestamp)
        try:
            self._callback(
                StoredMessage(
                    stream=self._stream,
                    sequence=sequence,
                    subject=message.subject,
                    data=message.data,
                    headers=dict(message.headers or {}),
                    time=timestamp // 1_000_000,
                )
            )
        except Exception:
            logger.exception("The callback of a watch on %s failed; the watch goes on.", self.subject)

    def _receive_made(self, message: Msg) -> None:
        if self._closed or message.subject != f"{self._inbox}.made.{self._generation}":
            return
        headers = message.headers or {}
        error = {"description": "no stream or no JetStream"} if headers.get("Status") == "503" else None
        if error is None:
            error = json.loads(message.data).get("error")
        if error is not None:
            reason = str(error.get("description"))
            if reason != self._complaint:
                self._complaint = reason
                logger.warning("A watch on %s could not be set up (%s); trying again.", self.subject, reason)
            self._restart_in(RETRY_SECONDS)
            return
        self._complaint = ""
        self._connection.write(
            self._connection.api_subject(f"STREAM.INFO.{self._stream}"),
            b"",
            f"{self._inbox}.life.{self._generation}",
        )

    def _receive_life(self, message: Msg) -> None:
        """Start over when this is not the stream that the seen entries came from."""
        if self._closed or message.subject != f"{self._inbox}.life.{self._generation}":
            return
        info = json.loads(message.data or b"{}")
        if "created" not in info:
            return  # no answer now; the consumer's end will tell
        another = self._created not in ("", info["created"])
        self._created = info["created"]
        if another or info["state"]["last_seq"] < self._behind:
            self._start_over()
        elif self._behind:
            self._connection.write(
                self._connection.api_subject(f"STREAM.MSG.GET.{self._stream}"),
                json.dumps({"start_time": time_text(self._behind_stored + 1)}).encode(),
                f"{self._inbox}.later.{self._generation}",
            )

    def _receive_later(self, message: Msg) -> None:
        """Start over when something that is newer than the seen entries has the place of one of them."""
        if self._closed or message.subject != f"{self._inbox}.later.{self._generation}":
            return
        later = json.loads(message.data or b"{}").get("message")
        if later is not None and later["seq"] <= self._behind:
            self._start_over()

    def _start_over(self) -> None:
        self._sequence = self._stored = 0
        self._restart()

    def _handle_status(self, message: Msg) -> None:
        headers = dict(message.headers or {})
        self._restart_in(SILENCE_SECONDS)
        if message.reply:  # flow control: the server waits for our reply
            self._connection.write(message.reply)
            return
        stalled = headers.get("Nats-Consumer-Stalled")
        if stalled:
            self._connection.write(stalled)
        if int(headers.get("Nats-Last-Consumer", self._delivered)) > self._delivered:
            self._restart()
