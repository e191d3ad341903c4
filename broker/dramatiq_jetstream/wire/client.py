"""One connection on the event loop, from the login until it is lost. Nothing here reconnects.

Everything runs on the loop thread. Before `ready`, events wait for `expect`; afterwards each goes to the receiver while
it is parsed. `lost` is done as soon as the connection is of no use, whatever ended it: the server, the network, a
breach of the protocol or `abort`. `reason` then says why, in the server's own words if it gave any.

The transport buffers little: `paused` is true while it holds more than `HELD_BACK_BYTES` that the socket did not take.
`taken` says how much the socket did take, so it is known what never left this process.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from dramatiq_jetstream.errors import ConnectionFailed

from .addresses import Address
from .protocol import Event, Protocol, ProtocolError, ServerError, ServerInfo

__all__ = ["Client", "Lost", "NoRoom", "RefusedByServer", "is_full"]

_FULL: Final = re.compile(r"maximum (account active )?connections exceeded", re.IGNORECASE)

#: Bytes that the transport may keep for a socket that takes no more.
HELD_BACK_BYTES: Final = 65_536

E = TypeVar("E", bound=Event)


class Lost(ConnectionFailed):
    """The connection ended before it was ready."""


class RefusedByServer(ConnectionFailed):
    """The server answered with an error; `str` is its text."""


class NoRoom(ConnectionFailed):
    """The server, or our account there, has as many connections as it may have."""


def is_full(text: str) -> bool:
    """Whether a server's error says that it takes no further connection."""
    return _FULL.search(text) is not None


class Client(asyncio.Protocol):
    """A connection to the server at `address`, whose numeric host and port are `peer`.

    Attributes:
      identity: Who we are to that server.
      info: What the server says of itself.
    """

    def __init__(self, address: Address, peer: tuple[str, int], identity: Any) -> None:
        self.address = address
        self.peer = peer
        self.identity = identity
        self.info: dict[str, Any] = {}
        self.transport: Any = None
        self.open = False
        self.paused = False
        self.heard = False  # whether anything arrived since the last look
        self.handed = 0  # bytes given to the transport
        self._taken: int | None = None  # how many the socket had taken when the connection was cut
        self.reason: str | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._protocol = Protocol()
        self._early: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._receive: Callable[[Event], None] = self._keep
        self._resume: Callable[[], None] = lambda: None

    def ready(self, receive: Callable[[Event], None], resume: Callable[[], None]) -> None:
        """From now on, `receive` gets each event, and `resume` is called when the socket takes more again."""
        self._receive, self._resume = receive, resume
        self.open = not self.lost.done()
        while self._early:
            receive(self._early.popleft())

    async def expect(self, kind: type[E]) -> E:
        """Wait for an event of this kind; others are dropped.

        Raises:
          RefusedByServer: When the server answered with an error.
          Lost: When the connection ended.
        """
        while True:
            while self._early:
                event = self._early.popleft()
                if isinstance(event, kind):
                    return event
                if isinstance(event, ServerError):
                    raise RefusedByServer(event.text)
            if self.lost.done():
                raise Lost(self.reason or "the server closed the connection")
            self._arrived.clear()
            await self._arrived.wait()

    def write(self, data: bytes) -> None:
        """Give bytes to the transport."""
        self.handed += len(data)
        try:
            self.transport.write(data)
        except (OSError, RuntimeError, AttributeError) as error:  # it was closed behind our back
            self.abort(str(error) or type(error).__name__)

    @property
    def taken(self) -> int:
        """How many of the written bytes the socket has taken; with TLS perhaps somewhat fewer."""
        if self._taken is not None:
            return self._taken
        try:
            return self.handed - cast(int, self.transport.get_write_buffer_size())
        except (OSError, RuntimeError, AttributeError):
            return self.handed

    def abort(self, reason: str) -> None:
        """Cut the connection at once, without waiting for a peer that may never take what is buffered."""
        self._end(reason)
        if self.transport is not None:
            self._taken = self.taken
            self.transport.abort()

    def close(self) -> None:
        """Close the connection when the socket has taken what was written; `lost` is done then."""
        self.open = False
        if self.transport is not None:
            self.transport.close()

    # What the transport calls

    def use(self, transport: asyncio.BaseTransport) -> None:
        """Write to this transport, whose protocol this is."""
        self.transport = transport
        self.transport.set_write_buffer_limits(high=HELD_BACK_BYTES)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        try:
            events = self._protocol.receive(data)
        except ProtocolError as error:
            self.abort(str(error))
            return
        pongs = self._protocol.pongs()
        if pongs:
            self.write(pongs)
        receive = self._receive
        for event in events:
            receive(event)

    def unfinished(self, most: int) -> tuple[bytes, int]:
        """As `Protocol.unfinished`."""
        return self._protocol.unfinished(most)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._resume()

    def eof_received(self) -> bool:
        return False  # the transport closes itself

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the server closed the connection" if error is None else str(error) or type(error).__name__)

    def _keep(self, event: Event) -> None:
        if isinstance(event, ServerInfo):
            self.info = event.fields
        elif isinstance(event, ServerError):
            self.reason = event.text
        self._early.append(event)
        self._arrived.set()

    def _end(self, reason: str) -> None:
        self.open = False
        if not self.lost.done():
            self.reason = self.reason or reason
            self.lost.set_result(None)
        self._arrived.set()
