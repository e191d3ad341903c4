"""The short way for a single request: a socket that the calling thread itself writes to and reads from.

Through the connection's loop a request and its answer each change threads, which takes longer than the server
needs to store a message. A thread that waits for one answer therefore borrows a *lane*: a connection to the
same server that is used by one thread at a time. There are as many as threads that wait at once, up to
`MOST`; those that are not used for a while are closed.

A lane is a shortcut, never a promise: whatever happens on it (it cannot be had, it breaks, no answer comes
within a second, the server says "not now"), the lane is dropped and the request goes the long way, by the loop.
So only requests that may be sent twice go here: publishes, which carry the same `Nats-Msg-Id` both times, and
questions. Reconnecting, finding other servers and waiting for the right error are left to the long way alone,
and lanes go only where the connection is.

If the process dies while a lane waits, the message is stored or it is not, and nobody was told that it was.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import socket
import ssl
import struct
import sys
import threading
import time
import weakref
from collections import deque
from typing import Any, Final

from .client import DirectClient, Headers, Msg, encode

__all__ = ["Lanes"]

#: Connections of one process beyond its first, at most.
MOST: Final = 8

#: Seconds until a request goes the long way instead.
PATIENCE: Final = 1.0

#: Seconds without lanes after one failed; doubled each time that none can be opened, up to the second.
PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 300.0

#: Seconds after which a lane that nobody used is closed.
IDLE: Final = 20.0

logger = logging.getLogger(__name__)


class _Broken(Exception):
    """This lane is of no use any more."""


class _Lane:
    """One connection, for one thread at a time."""

    def __init__(self, client: DirectClient, patience: float) -> None:
        """Connect to the server where `client` is, as whom it is there.

        Raises:
          OSError, _Broken: When that does not work.
        """
        url = client.connected_url
        if url is None or url.hostname is None or url.scheme not in ("nats", "tls"):
            raise _Broken("there is no plain connection to go beside")
        self.used = time.monotonic()
        self._buffer = b""
        self._inbox = client.new_inbox()
        self._numbers = itertools.count(1)
        self._socket: Any = socket.create_connection((url.hostname, url.port or 4222), timeout=patience)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            info = json.loads(self._line().partition(b" ")[2])
            if info.get("tls_required"):
                # A server that was discovered is known by its address, and certified by the name of the first one.
                first = getattr(client._current_server, "tls_name", None)
                name = client.options.get("tls_hostname") or first or url.hostname
                self._socket = _context(client).wrap_socket(self._socket, server_hostname=name)
            # nats-py signs the server's nonce; a copy of its client does it for ours.
            greeter = copy.copy(client)
            greeter._server_info = info
            greeter._auth_configured = bool(info.get("auth_required"))
            self._socket.sendall(
                greeter._connect_command() + b"SUB %b.* 1\r\nPING\r\n" % self._inbox.encode()
            )
            while not (line := self._line()).startswith(b"PONG"):
                self._other(line)
            self._wait_at_most(patience)
        except BaseException:
            self.close()
            raise

    def ask(self, subject: str, payload: bytes, headers: Headers | bytes | None, patience: float) -> Msg:
        """Send a request and wait for its answer.

        Raises:
          OSError, _Broken: When none came; whether the request arrived is not known.
        """
        if patience != self.patience:
            self._wait_at_most(patience)
        reply = f"{self._inbox}.{next(self._numbers):x}"
        self._socket.sendall(encode((subject, payload, reply, headers)))
        while True:
            line = self._line()
            if line.startswith((b"MSG ", b"HMSG ")):
                words = line.split()
                body = self._exactly(int(words[-1]) + 2)[:-2]
                split = int(words[-2]) if words[0] == b"HMSG" else 0
                arrived = words[1].decode()
                if arrived == reply:
                    self.used = time.monotonic()
                    return Msg(arrived, "", body[split:], body[:split])
            else:
                self._other(line)

    def _wait_at_most(self, seconds: float) -> None:
        self.patience = seconds
        if sys.platform == "win32" or isinstance(self._socket, ssl.SSLSocket):
            self._socket.settimeout(seconds)
            return
        # The kernel's own timeout: with Python's, every call is two.
        whole = int(seconds)
        timeval = struct.pack("@ll", whole, int((seconds - whole) * 1_000_000))
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def _other(self, line: bytes) -> None:
        if line.startswith(b"PING"):
            self._socket.sendall(b"PONG\r\n")
        elif line.startswith(b"-ERR"):
            raise _Broken(line.decode("utf-8", "replace"))

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            self._more()
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _more(self) -> None:
        received = self._socket.recv(65_536)
        if not received:
            raise _Broken("the server closed it")
        self._buffer += received

    def close(self) -> None:
        self._socket.close()


def _context(client: DirectClient) -> ssl.SSLContext:
    return client.options.get("tls") or client.ssl_context


class Lanes:
    """The lanes of one connection; any thread may ask.

    Attributes:
      failures: How many requests failed on a lane, and may have arrived all the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: deque[_Lane] = deque()
        # Weakly: an exception that Dramatiq raises in a thread may strike before the lane is given back.
        self._lanes: weakref.WeakSet[_Lane] = weakref.WeakSet()
        self._opening = 0
        self.failures = 0
        self._not_before = 0.0
        self._pause = PAUSE

    def ask(
        self,
        client: DirectClient,
        subject: str,
        payload: bytes,
        headers: Headers | bytes | None,
        seconds: float,
    ) -> Msg | None:
        """The answer to a request, or None when it must go the long way; it may have arrived even then."""
        patience = min(PATIENCE, seconds / 2)
        try:
            lane = self._borrow(client, patience)
            if lane is None:
                return None
            try:
                answer = lane.ask(subject, payload, headers, patience)
            except BaseException:
                self._lanes.discard(lane)
                lane.close()
                raise
        except (OSError, ValueError, _Broken) as error:
            self.failures += 1
            self._not_before = time.monotonic() + self._pause
            logger.debug("A lane to NATS failed: %s", error)
            return None
        with self._lock:
            if lane in self._lanes:
                self._idle.append(lane)
                return answer
        lane.close()
        return answer

    def _borrow(self, client: DirectClient, patience: float) -> _Lane | None:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            full = len(self._lanes) + self._opening >= MOST
            if full or time.monotonic() < self._not_before:
                return None
            self._opening += 1
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        try:
            lane = _Lane(client, patience)
            with self._lock:
                self._lanes.add(lane)
        finally:
            with self._lock:
                self._opening -= 1
        self._pause = PAUSE
        return lane

    def close_unused(self) -> None:
        """Close what was not used for a while."""
        if self._idle and self._idle[0].used + IDLE < time.monotonic():
            with self._lock:
                lane = self._idle.popleft() if self._idle else None
            if lane is not None:
                self._lanes.discard(lane)
                lane.close()

    def clear(self) -> None:
        """Use none of these lanes again: the connection is elsewhere now, or closed."""
        with self._lock:
            idle, self._idle = self._idle, deque()
            self._lanes = weakref.WeakSet()
            self._not_before, self._pause = 0.0, PAUSE
        for lane in idle:
            lane.close()
