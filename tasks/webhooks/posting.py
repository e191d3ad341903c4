"""Sends one request to a receiver, within one time limit for all of it, and reads a bounded part of the answer.

A receiver may send its answer byte by byte, or never: what is left of the time is set before every wait on the socket,
so that the limit holds for the whole request, from resolving the name to the last byte. Redirects are answers like any
other, proxies of the environment are not asked, and no connection is kept open.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from tasks.answers import Deadline

from .addresses import InvalidAddress, Network, NoAddress, Target, parse, resolve

#: How much of an answer is read, in bytes.
MAX_ANSWER: Final = 4_096

#: How many of a name's addresses are tried.
_ADDRESSES: Final = 3


class NotAnswered(Exception):
    """The receiver gave no answer; the message says why in a few words."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a receiver answered: its status, and the beginning of its text."""

    status: int
    text: str


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, allowed: Sequence[Network], seconds: float
) -> Answer:
    """Send a request and return the answer.

    Parameters:
      allowed: Networks that may be connected to although they are private.
      seconds: For all of it.

    Raises:
      NotAnswered: When no answer came in time, or it was none.
    """
    deadline = Deadline(seconds)
    try:
        target = parse(url)
        connection = _Connection(target, allowed, deadline)
        try:
            sent = {**headers, "Host": target.authority, "Accept-Encoding": "identity", "Connection": "close"}
            connection.request("POST", target.path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, _beginning(response))
        finally:
            connection.finish()
    except TimeoutError:
        raise NotAnswered(f"no answer within {seconds * 1000:.0f} ms") from None
    except ssl.SSLCertVerificationError as error:
        raise NotAnswered(f"its certificate is not valid: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise NotAnswered(f"no TLS connection: {error.reason or 'the handshake failed'}") from None
    except (InvalidAddress, NoAddress) as error:
        raise NotAnswered(str(error)) from None
    except OSError as error:
        raise NotAnswered(f"no connection: {error.strerror or type(error).__name__}") from None
    except (http.client.HTTPException, ValueError):
        raise NotAnswered("its answer is not one of HTTP") from None


def _beginning(response: http.client.HTTPResponse) -> str:
    """Return the beginning of an answer's text; what comes too late, or is broken, is left out."""
    read = bytearray()
    try:
        while len(read) < MAX_ANSWER and (part := response.read1(MAX_ANSWER - len(read))):
            read += part
    except (OSError, http.client.HTTPException, ValueError):
        pass  # the status is what counts
    return read.decode("utf-8", "replace")


class _Reading(io.RawIOBase):
    """The bytes that come from a socket, until the deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.left())
        return self._sock.recv_into(buffer)


class _Channel:
    """The part of a socket that `http.client` uses."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reading(self._sock, self._deadline))

    def close(self) -> None:
        """Do nothing: `http.client` closes it before the answer is read, and `_Connection.finish` when that is done."""


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, with the name that the URL has."""

    def __init__(self, target: Target, allowed: Sequence[Network], deadline: Deadline) -> None:
        super().__init__(target.host, target.port)
        self._target = target
        self._allowed = allowed
        self._deadline = deadline
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        self._socket = self._connected()
        if self._target.scheme == "https":
            self._socket.settimeout(self._deadline.left())
            self._socket = _tls().wrap_socket(self._socket, server_hostname=self._target.host)
        self.sock = _Channel(self._socket, self._deadline)

    def finish(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()

    def _connected(self) -> socket.socket:
        addresses = resolve(self._target, self._allowed, self._deadline.left())[:_ADDRESSES]
        for position, address in enumerate(addresses, start=1):
            # A share of the time for each, so that one that does not answer leaves some for the next.
            share = self._deadline.left() / (len(addresses) - position + 1)
            try:
                return socket.create_connection((address, self._target.port), timeout=share)
            except OSError:
                if position == len(addresses):
                    raise
        raise NoAddress("no public address was found for its name")


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
