"""Takes one piece of the library away that is there for speed alone, so that what it is worth can be measured.

A process that finds a piece's name in BENCH_WITHOUT replaces it, before it makes its broker, with what would be there
instead: what Dramatiq has itself, what nats-py has, or nothing. The library knows nothing of this.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from typing import Any

VARIABLE = "BENCH_WITHOUT"


def _replace(owner: Any, name: str, value: Any) -> None:
    """Put `value` in the place of what must be there already."""
    getattr(owner, name)
    setattr(owner, name, value)


def without_hooks() -> None:
    """Every middleware is called at every hook, as in Dramatiq, also those that inherit an empty method."""
    from dramatiq_jetstream.worker import hooks

    _replace(hooks, "_listens", hasattr)
    _replace(hooks, "_method", getattr)


def without_work_queue() -> None:
    """The worker keeps Dramatiq's queue between its consumer threads and its worker threads."""
    from dramatiq_jetstream.worker import attachment

    _replace(attachment, "WorkQueue", queue.PriorityQueue)


def without_thread_queue() -> None:
    """The standard library's queue is between the connection's thread and a consumer thread."""
    from dramatiq_jetstream.worker import consumer

    _replace(consumer, "ThreadQueue", queue.Queue)


def without_time_limits() -> None:
    """Dramatiq itself keeps time for its time limits."""
    from dramatiq_jetstream import broker

    _replace(broker, "keep_time_of", lambda _: None)


def without_late_settlements() -> None:
    """Each settlement wakes the connection's thread, which sleeps; none waits for others."""
    from dramatiq_jetstream.wire.loop import LoopThread

    _replace(LoopThread, "post_lazily", LoopThread.post)


def without_lookahead() -> None:
    """A consumer never fetches more than its prefetch."""
    from dramatiq_jetstream.worker import room

    _replace(room, "MAX_LOOKAHEAD", 0)


def without_short_way() -> None:
    """A thread that stores one message goes by the connection's thread."""
    from dramatiq_jetstream.wire.link import Link

    _replace(Link, "ask", lambda *_: False)


def without_parser() -> None:
    """nats-py parses what the server sends."""
    from nats.protocol.parser import Parser

    from dramatiq_jetstream.wire import client, lanes, protocol
    from dramatiq_jetstream.wire.headers import Msg

    class NatsPyProtocol:
        def __init__(self) -> None:
            self._parser = Parser(self)
            self._events: list[protocol.Event] = []
            self._pongs = b""

        def receive(self, data: bytes) -> list[protocol.Event]:
            try:
                self._parser.parse(data).send(None)  # it awaits nothing but what is below
            except StopIteration:
                pass
            events, self._events = self._events, []
            return events

        def pongs(self) -> bytes:
            pongs, self._pongs = self._pongs, b""
            return pongs

        async def _process_msg(
            self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
        ) -> None:
            self._events.append(Msg(subject.decode(), reply.decode(), data, headers, sid))

        async def _process_ping(self) -> None:
            self._pongs += b"PONG\r\n"

        async def _process_pong(self) -> None:
            self._events.append(protocol.Pong())

        async def _process_info(self, info: dict[str, Any]) -> None:
            self._events.append(protocol.ServerInfo(info))

        async def _process_err(self, text: str) -> None:
            self._events.append(protocol.ServerError(text.strip("'")))

    _replace(client, "Protocol", NatsPyProtocol)
    _replace(lanes, "Protocol", NatsPyProtocol)


def without_decoder() -> None:
    """Dramatiq decodes messages."""
    from dramatiq.message import Message

    from dramatiq_jetstream.worker import sources

    _replace(sources, "decode", Message.decode)


def without_copied_fields() -> None:
    """A message's fields are read through Dramatiq's proxy each time, not copied to it."""
    from dramatiq.broker import MessageProxy

    from dramatiq_jetstream.worker.message import JetStreamMessage

    def initialise(self: Any, message: Any, delivery: Any, arguments: Any = None) -> None:
        MessageProxy.__init__(self, message)
        self._delivery = delivery
        if arguments is not None:
            self.args = arguments

    _replace(JetStreamMessage, "__init__", initialise)


PIECES: dict[str, Callable[[], None]] = {
    "hooks": without_hooks,
    "work queue": without_work_queue,
    "thread queue": without_thread_queue,
    "time limits": without_time_limits,
    "late settlements": without_late_settlements,
    "lookahead": without_lookahead,
    "short way": without_short_way,
    "parser": without_parser,
    "decoder": without_decoder,
    "copied fields": without_copied_fields,
}


def apply() -> None:
    """Take away the piece that this process is to do without, if any."""
    piece = os.environ.get(VARIABLE)
    if piece:
        PIECES[piece]()
