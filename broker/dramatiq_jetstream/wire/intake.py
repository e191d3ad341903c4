"""What a process has received, in memory that another process can read when this one is dead.

The kernel writes what arrives straight into that memory, where it stays until every message in it was handed over. What
had not arrived yet is in the socket, of which the other process has a copy. So a delivery is lost in no place between
the server and the board of `fleet work`, whatever this process died of, and when.

The memory has three parts. The *chunk* is zero, but for what was read and has not been handed over: nothing else says
how much that is, because nothing can be written between a read and a death. There are two *beginnings* of a message
whose end has not arrived; its first bytes hold what it answers to. A single word says which of the two counts, and
whether the chunk does.

Through TLS this cannot work: what arrives is known only to the process that reads it. Nor where a read ended within a
message, at zeros of its own. Such deliveries come again after their `ack_wait`.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Iterator
from typing import Any, Final

from .ack_subjects import is_ack_subject
from .client import Client
from .headers import Msg
from .protocol import Protocol, ProtocolError

__all__ = ["INTAKE_BYTES", "Intake", "deliveries_in"]

#: How many bytes are read at once.
CHUNK_BYTES: Final = 262_144

#: How many bytes of an unfinished message are kept; a line with two subjects is far shorter.
BEGINNING_BYTES: Final = 16_384

#: The size of the shared memory.
INTAKE_BYTES: Final = 16 + 2 * (16 + BEGINNING_BYTES) + CHUNK_BYTES

#: For how long what is on its way to a dead process is waited for, in seconds.
DRAIN_SECONDS: Final = 0.25

_CHUNK_AT: Final = INTAKE_BYTES - CHUNK_BYTES
_IGNORE_CHUNK: Final = 2
_ZEROS: Final = memoryview(bytes(CHUNK_BYTES))


class _Memory:
    """The parts of an intake."""

    def __init__(self, memory: memoryview) -> None:
        self.state = memory[:8].cast("Q")
        self.chunk = memory[_CHUNK_AT:]
        starts = (16, 16 + 16 + BEGINNING_BYTES)
        self.sizes = [memory[at : at + 16].cast("Q") for at in starts]
        self.beginnings = [memory[at + 16 : at + 16 + BEGINNING_BYTES] for at in starts]


class Intake(asyncio.BufferedProtocol):
    """Reads for a client, into memory that outlives the process. One for each process; on the loop thread."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = _Memory(memory)
        self._client: Client | None = None
        self._copy: socket.socket | None = None

    def read_for(self, client: Client) -> socket.socket | None:
        """Read for this client from now on; returns a copy of its socket that it closes itself, None for TLS."""
        transport: Any = client.transport
        if transport.get_extra_info("ssl_object") is not None:
            return None
        own = transport.get_extra_info("socket")
        self._client, self._copy = client, socket.fromfd(own.fileno(), own.family, own.type)
        self._note_unfinished(client)
        self._memory.state[0] &= ~_IGNORE_CHUNK
        transport.set_protocol(self)
        return self._copy

    # What the transport calls

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._memory.chunk

    def buffer_updated(self, nbytes: int) -> None:
        client, chunk = self._client, self._memory.chunk
        assert client is not None
        client.data_received(bytes(chunk[:nbytes]))
        self._note_unfinished(client)
        chunk[:nbytes] = _ZEROS[:nbytes]
        self._memory.state[0] &= ~_IGNORE_CHUNK

    def pause_writing(self) -> None:
        assert self._client is not None
        self._client.pause_writing()

    def resume_writing(self) -> None:
        assert self._client is not None
        self._client.resume_writing()

    def eof_received(self) -> bool:
        return False  # the transport closes itself

    def connection_lost(self, error: Exception | None) -> None:
        client, copy = self._client, self._copy
        assert client is not None
        assert copy is not None
        client.connection_lost(error)
        # The other process has a copy too: without this, the server would go on delivering.
        with contextlib.suppress(OSError), contextlib.closing(copy):
            copy.shutdown(socket.SHUT_RDWR)
        memory = self._memory
        memory.state[0] = _IGNORE_CHUNK
        memory.sizes[0][0] = memory.sizes[0][1] = 0
        memory.chunk[:] = _ZEROS

    def _note_unfinished(self, client: Client) -> None:
        """Note what is left of the chunk, which does not count from then on."""
        memory = self._memory
        other = 1 - (memory.state[0] & 1)
        beginning, size = client.unfinished(BEGINNING_BYTES)
        memory.beginnings[other][: len(beginning)] = beginning
        memory.sizes[other][0], memory.sizes[other][1] = len(beginning), size
        memory.state[0] = other | _IGNORE_CHUNK


def deliveries_in(memory: memoryview, connection: socket.socket | None) -> Iterator[str]:
    """The ack subjects of what a dead process had received and not handed over, and of what was on its way to it.

    Parameters:
      connection: A copy of its socket, which is closed.
    """
    parts = _Memory(memory)
    current = parts.state[0] & 1
    kept, size = parts.sizes[current].tolist()
    received = [bytes(parts.beginnings[current][:kept]).ljust(size, b"\0")]
    if not parts.state[0] & _IGNORE_CHUNK:
        received.append(bytes(parts.chunk).rstrip(b"\0"))
    if connection is not None:
        with contextlib.closing(connection):
            received += _drain(connection)
    protocol = Protocol()
    try:
        for data in received:
            for event in protocol.receive(data) if data else ():
                if type(event) is Msg and is_ack_subject(event.reply):
                    yield event.reply
    except (
        ProtocolError
    ):  # the chunk ended with zeros of a message's own: what follows is found after `ack_wait`
        return


def _drain(connection: socket.socket) -> Iterator[bytes]:
    """What the server had sent; it is told that no more is wanted, and has sent all when it closes."""
    deadline = time.monotonic() + DRAIN_SECONDS
    try:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # the server has closed it already
            connection.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([connection], [], [], left)[0]:
                return
            data = connection.recv(CHUNK_BYTES)
            if not data:
                return
            yield data
    except OSError:
        return
