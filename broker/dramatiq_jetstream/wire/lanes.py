"""The short way for a single request: a socket that the calling thread itself writes to and reads from.

Over the connection's loop, a request and its reply each change threads, which takes longer than the server needs to
store a message. A thread that waits for one reply therefore borrows a *lane*: a connection to the same server that one
thread uses at a time. There are as many lanes as threads that wait at once, up to what `max_connections` leaves beside
the connection itself. Unused ones are closed after a while. Without them, a thread that stores one message after the
other does half as many, with twice the CPU.

A lane is a shortcut, never a promise. If there is none, it breaks, no reply comes within a second, or the server says
"not now", the lane is dropped and the request goes over the loop. So only requests that may be sent twice go here:
publishes, which carry the same `Nats-Msg-Id` both times, and reads. Only the loop reconnects, finds other servers and
waits for the right error; lanes go to the server that the connection has.

**Giving way.** A server, or an account, may allow only so many connections, and a program that it refuses cannot tell
the others. So a process that has lanes asks for room now and then: it opens one more than it needs and closes another,
or, where it has as many as it may, goes without one for a moment and takes it again. When it is refused, then or at
any time, it keeps half of its lanes, which leaves room for a program that waits. Each time that there is room again it
may have one lane more.

Reads and writes block without a kernel timeout, which a signal would restart. The loop's thread looks
at the lanes ten times a second instead, and cuts those whose time is up; their threads then read an end of file.

There is no lock and no counter here, so an interrupt leaves neither taken, and a signal handler may send whatever it
interrupted. A lane counts while it exists; one that an interrupt struck is closed as its last reference goes.

If the process dies while a lane waits, the message is stored or it is not, and no caller was told that it was.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions

from .addresses import Address
from .client import is_full
from .handshake import Identity
from .headers import Headers, Msg
from .ids import new_id
from .login import connect_command
from .protocol import (
    Event,
    Pong,
    Protocol,
    ProtocolError,
    ServerError,
    ServerInfo,
    encode_publish,
    encode_subscribe,
)
from .tls import tls_context, tls_name, wants_tls

__all__ = ["Lanes"]

#: Seconds until a request goes over the loop instead.
PATIENCE_SECONDS: Final = 1.0

#: Seconds without lanes after one failed; doubled each time that none can be opened, up to the second.
PAUSE_SECONDS: Final = 5.0
LONGEST_PAUSE_SECONDS: Final = 300.0

#: Seconds after which an unused lane is closed.
IDLE_SECONDS: Final = 20.0

#: Seconds between two checks whether the server has room for one more.
LOOK_SECONDS: Final = 10.0

#: Seconds without one lane, for others that want in; longer than they pause between two attempts.
REST_SECONDS: Final = 2.5

#: Seconds in which several refusals count as one.
AT_ONCE_SECONDS: Final = 1.0

_FOREVER: Final = float("inf")

logger = logging.getLogger(__name__)


class _Broken(Exception):
    """This lane is of no use any more."""


class _Lane:
    """One connection, for one thread at a time.

    Attributes:
      until: When a waiting thread is no longer to wait, by `time.monotonic`.
      used: When it was last used.
      sent: Whether the request under way may have been sent.
      opened: Whether it was ever ready.
    """

    def __init__(self) -> None:
        self.until = _FOREVER
        self.used = time.monotonic()
        self.sent = False
        self.opened = False
        self._socket: Any = None
        self._protocol = Protocol()
        self._events: deque[Event] = deque()
        self._inbox = ""
        self._numbers = itertools.count(1)

    def connect(
        self,
        options: ConnectOptions,
        address: Address,
        peer: tuple[str, int],
        identity: Identity,
        patience: float,
    ) -> None:
        """Connect to the server at `peer`, as who the connection is there.

        Raises:
          OSError, BrokerError, ProtocolError, _Broken: When that does not work.
        """
        self.until = time.monotonic() + patience
        self._socket = socket.create_connection(peer, timeout=patience)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.tls_first:
            self._encrypt(options, address)
        info = self._expect(ServerInfo).fields
        tls = wants_tls(options, address, info)
        if tls and not address.tls_first:
            self._encrypt(options, address)
        self._inbox = f"{options.inbox_prefix}.{new_id()}"
        hello = connect_command(options, identity.fields(str(info.get("nonce") or "")), tls=tls)
        self._socket.sendall(hello + encode_subscribe(f"{self._inbox}.*", 1))
        self._expect(Pong)
        self._socket.settimeout(None)
        self.until = _FOREVER
        self.opened = True

    def ask(self, subject: str, payload: bytes, headers: Headers | bytes | None, patience: float) -> Msg:
        """Send a request and wait for its reply.

        Raises:
          OSError, ProtocolError, _Broken: When no reply came.
        """
        self.sent = False
        reply = f"{self._inbox}.{next(self._numbers):x}"
        request = encode_publish((subject, payload, reply, headers))
        self.used = time.monotonic()
        self.until = self.used + patience
        self.sent = True
        self._socket.sendall(request)
        events = self._events
        while True:
            while events:
                event = events.popleft()
                if type(event) is Msg:
                    if event.subject == reply:
                        self.until = _FOREVER
                        return event
                elif isinstance(event, ServerError):
                    raise _Broken(event.text)
            self._read()

    def cut(self) -> None:
        """Wake the thread that waits on this lane; from another thread."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # Not an encrypted socket's own method, which would remove the encryption under its reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _encrypt(self, options: ConnectOptions, address: Address) -> None:
        self._socket = tls_context(options).wrap_socket(self._socket, server_hostname=tls_name(address))

    def _expect(self, kind: type[Any]) -> Any:
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, kind):
                    return event
                if isinstance(event, ServerError):
                    raise _Broken(event.text)
            self._read()

    def _read(self) -> None:
        data = self._socket.recv(65_536)
        if not data:
            raise _Broken("the server closed it, or its time was up")
        self._events.extend(self._protocol.receive(data))
        pongs = self._protocol.pongs()
        if pongs:
            self._socket.sendall(pongs)


class Lanes:
    """The lanes beside one connection; any thread may ask.

    Parameters:
      full: Is told why when the server takes no further connection.
    """

    def __init__(
        self,
        options: ConnectOptions,
        address: Address,
        peer: tuple[str, int],
        identity: Identity,
        full: Callable[[str], None],
    ) -> None:
        self._identity = identity
        self._options = options
        self._address = address
        self._peer = peer
        self._full = full
        self._closed = False
        self._idle: deque[_Lane] = deque()
        self._lanes: weakref.WeakSet[_Lane] = weakref.WeakSet()
        self._not_before = 0.0
        self._pause = PAUSE_SECONDS
        self._most = options.max_connections - 1
        self._allowed = self._most
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._gave_way = 0.0

    def ask(
        self, subject: str, payload: bytes, headers: Headers | bytes | None, seconds: float
    ) -> Msg | bool:
        """The reply to a request. If it must go over the loop instead: whether it may have been sent here."""
        patience = min(PATIENCE_SECONDS, seconds / 2)
        lane = None
        try:
            lane = self._borrow(patience)
            if lane is None:
                return False
            reply = lane.ask(subject, payload, headers, patience)
        except (OSError, ValueError, BrokerError, ProtocolError, _Broken) as error:
            logger.debug("A lane to NATS failed: %s", error)
            if is_full(str(error)):
                self._give_way(str(error))
            else:
                self._not_before = time.monotonic() + self._pause
            if lane is None:
                return False
            self._drop(lane)
            return lane.sent
        except BaseException:
            if lane is not None:
                self._drop(lane)
            raise
        self._idle.append(lane)
        if self._closed:
            self._close_idle()
        elif len(self._lanes) > self._allowed:
            self._drop_oldest()
        return reply

    def _borrow(self, patience: float) -> _Lane | None:
        now = time.monotonic()
        may_open = now >= self._not_before and not self._closed
        looks = may_open and now >= self._look_at
        if looks:
            self._look_at = now + LOOK_SECONDS
            if len(self._lanes) >= self._most:
                self._drop_oldest()
                self._not_before = now + REST_SECONDS
                looks = may_open = False
        if not looks:
            with contextlib.suppress(IndexError):
                return self._idle.pop()
            if not may_open or len(self._lanes) >= self._allowed:
                return None
        lane = self._open(patience)
        if looks and lane is not None:
            self._allowed = min(self._allowed + 1, self._most)
            self._drop_oldest()
        return lane

    def _open(self, patience: float) -> _Lane | None:
        lane = _Lane()
        self._lanes.add(lane)
        if len(self._lanes) > self._most:  # another thread opens one at the same moment
            self._drop(lane)
            return None
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        try:
            lane.connect(self._options, self._address, self._peer, self._identity, patience)
        except BaseException:
            self._drop(lane)
            raise
        self._pause = min(pause, PAUSE_SECONDS)
        return lane

    def _give_way(self, reason: str) -> None:
        """Keep half of the lanes: the server takes no further connection."""
        now = time.monotonic()
        self._not_before = now + LOOK_SECONDS
        self._pause = PAUSE_SECONDS
        if now < self._gave_way + AT_ONCE_SECONDS:
            return
        self._gave_way = now
        self._allowed = sum(lane.opened for lane in self._each()) // 2
        while self._idle and len(self._lanes) > self._allowed:
            self._drop_oldest()  # the others when they come back
        self._full(reason)

    def _drop_oldest(self) -> None:
        """Close the lane that was not used for the longest time, if one is free."""
        with contextlib.suppress(IndexError):
            self._drop(self._idle.popleft())

    def _drop(self, lane: _Lane) -> None:
        self._lanes.discard(lane)
        lane.close()

    def look(self) -> None:
        """Cut the lanes whose time is up, and close one that was not used for a while."""
        now = time.monotonic()
        for lane in self._each():
            if now >= lane.until:
                lane.cut()
        with contextlib.suppress(IndexError):
            if self._idle[0].used + IDLE_SECONDS < now:
                self._drop_oldest()

    def close(self) -> None:
        """Use none of these lanes again: the connection is elsewhere now, or closed."""
        self._closed = True
        for lane in self._each():
            if lane.until != _FOREVER:
                lane.cut()
        self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._drop(self._idle.popleft())

    def _each(self) -> list[_Lane]:
        try:
            return list(self._lanes)
        except RuntimeError:  # a thread adds one just now; the next look sees them all
            return []
