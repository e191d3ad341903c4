"""A worker class for gunicorn that no slow client can hold up: waitress reads requests and writes answers.

gunicorn's own thread worker gives a connection to a thread as soon as its first byte is there, and the thread then
waits for the rest; so as many slow clients as there are threads take the service down. Here one loop holds all
connections. A thread gets a request when it is there as a whole, and is free again when its answer is in a buffer. So a
connection that says nothing, or little, costs a socket and some memory, and it ends:

- a request has `REQUEST_SECONDS` from its first byte to its last;
- a connection between requests has `IDLE_SECONDS`;
- an answer has `ANSWER_SECONDS` to be taken, and a long one has them for each `ANSWER_BYTES`.

gunicorn stays in charge of processes, sockets and signals; waitress does the HTTP, in its maintained form. A process
that is killed loses its connections and nothing else.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any, Final

from gunicorn.workers.base import Worker
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer, UnixWSGIServer
from waitress.task import ThreadedTaskDispatcher

REQUEST_SECONDS: Final = 15.0
IDLE_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 60.0
ANSWER_BYTES: Final = 1_000_000

#: With this many connections, a process accepts no further ones until some have ended.
MAX_CONNECTIONS: Final = 8_000
#: Bytes of a request before its body, and of one line of them.
MAX_HEAD_BYTES: Final = 32_768
MAX_LINE_BYTES: Final = 8_190
#: What is read of a body, so that its refusal arrives: a connection closed with unread data is reset.
MAX_BODY_BYTES: Final = 16_000_000

# How often the loop looks at the deadlines.
_BEAT_SECONDS = 1

# How often an idle loop tells gunicorn that it lives, and looks whether it was asked to stop.
_LOOK_SECONDS = 0.25


class Parser(HTTPRequestParser):  # type: ignore[misc]  # waitress has no types
    """Reads requests more strictly: a header stands on one line, of bounded length."""

    def parse_header(self, header_plus: bytes) -> None:
        """Read the first line and the headers."""
        lines = header_plus.split(b"\n")
        if any(line.startswith((b" ", b"\t")) for line in lines):
            raise ParsingError("A header goes on in the next line")
        if max(map(len, lines)) > MAX_LINE_BYTES:
            raise ParsingError("A header is too long")
        super().parse_header(header_plus)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection that knows since when it waits for its client."""

    parser_class = Parser

    #: When the first byte of the unfinished request came, and when the unsent answer was first seen.
    request_since: float = 0.0
    answer_since: float | None = None
    #: How much of the answer was sent since then.
    answer_sent: int = 0

    def received(self, data: bytes) -> bool:
        """Take received bytes; the time of a request that begins with them starts now."""
        unfinished = self.request
        taken = super().received(data)
        if self.request is not unfinished:
            self.request_since = time.time()
        return bool(taken)

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Send what the client takes; its time for an answer begins again with each `ANSWER_BYTES`."""
        sent = int(super().send(data, do_close))
        self.answer_sent += sent
        if self.answer_sent >= ANSWER_BYTES:
            self.answer_sent, self.answer_since = 0, None
        return sent

    def is_overdue(self, now: float) -> bool:
        """Whether the client's time is up: for its request, for taking an answer, or for saying anything."""
        if self.total_outbufs_len:
            self.answer_since = self.answer_since or now
            return now - self.answer_since > ANSWER_SECONDS
        self.answer_since = None
        if self.request is not None:
            return now - self.request_since > REQUEST_SECONDS
        return not self.requests and now - self.last_activity > IDLE_SECONDS


class _Deadlines:
    """The part of a waitress server that ends connections."""

    channel_class = Channel
    active_channels: dict[int, Channel]

    def maintenance(self, now: float) -> None:
        """End the connections that are overdue."""
        for channel in list(self.active_channels.values()):
            if channel.is_overdue(now):
                channel.will_close = True


class TcpServer(_Deadlines, TcpWSGIServer):  # type: ignore[misc]
    """Listens on an address."""


class UnixServer(_Deadlines, UnixWSGIServer):  # type: ignore[misc]
    """Listens on a path."""


class BufferedWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """A process of gunicorn that serves the application through waitress."""

    def run(self) -> None:
        """Serve until gunicorn or a signal says stop, then let begun requests end."""
        # Requests may queue for a thread; the depth of that queue need not be logged.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        connections: dict[int, Any] = {}
        dispatcher = ThreadedTaskDispatcher()
        dispatcher.set_thread_count(self.cfg.threads)
        servers = [self._listen(listener.sock, connections, dispatcher) for listener in self.sockets]
        while self.alive:
            self._turn(connections)
        for server in servers:
            server.accepting = False
            server.del_channel(connections)
        deadline = time.monotonic() + self.cfg.graceful_timeout
        while time.monotonic() < deadline and any(_is_busy(server) for server in servers):
            self._turn(connections)
        dispatcher.shutdown(timeout=1)

    def _turn(self, connections: dict[int, Any]) -> None:
        """Read and write whatever is ready, once."""
        self.notify()
        if self.ppid != os.getppid():
            self.log.info("The master process has ended; so does this one.")
            self.alive = False
        wasyncore.loop(timeout=_LOOK_SECONDS, map=connections, use_poll=True, count=1)

    def _listen(self, sock: Any, connections: dict[int, Any], dispatcher: ThreadedTaskDispatcher) -> Any:
        adjustments = Adjustments(
            sockets=[sock],
            threads=self.cfg.threads,
            backlog=self.cfg.backlog,
            connection_limit=MAX_CONNECTIONS,
            cleanup_interval=_BEAT_SECONDS,
            max_request_header_size=MAX_HEAD_BYTES,
            max_request_body_size=MAX_BODY_BYTES,
            asyncore_use_poll=True,
            # The application knows how many proxies there are (PROXIES), and drops what others say.
            clear_untrusted_proxy_headers=False,
            ident=None,
        )
        kind = UnixServer if sock.family.name == "AF_UNIX" else TcpServer
        sockinfo = (sock.family, sock.type, sock.proto, sock.getsockname())
        return kind(
            self.wsgi,
            connections,
            True,
            sock,
            dispatcher=dispatcher,
            adj=adjustments,
            sockinfo=sockinfo,
            bind_socket=False,
        )


def _is_busy(server: Any) -> bool:
    """Whether a request of one of the connections is under way, or its answer is."""
    return any(channel.requests or channel.total_outbufs_len for channel in server.active_channels.values())
