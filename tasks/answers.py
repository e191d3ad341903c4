"""Bounds how long an HTTP answer of another party may take as a whole, for sessions of `requests`.

    session = timed(requests.Session())
    with within(5.0):
        session.get(url, timeout=5.0)

A time-out of `requests` bounds the wait for each part of an answer, so one that comes byte by byte takes as long as it
likes. Here what is left of the time is set before every wait on the socket. Connecting has the request's own time-out.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from requests import Session
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection

__all__ = ["Deadline", "timed", "within"]

S = TypeVar("S", bound=Session)


class Deadline:
    """The moment at which a request has to be over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
          TimeoutError: When there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for an answer is over")
        return left


_deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give the answers to requests that this block sends so much time altogether."""
    token = _deadline.set(Deadline(seconds))
    try:
        yield
    finally:
        _deadline.reset(token)


class _Reading(io.RawIOBase):
    """The bytes that come from a socket, until the deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        # It keeps the socket open until the answer is read, also when its connection is closed before.
        self._bytes = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left())
        return self._bytes.readinto(buffer)

    def close(self) -> None:
        self._bytes.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read until the deadline of the block in which its request was sent."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        deadline = _deadline.get()
        if deadline is not None:
            self.fp.close()
            self.fp = io.BufferedReader(_Reading(sock, deadline))


class _Connection(HTTPConnection):
    response_class = _Response


class _TlsConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS: Final = {"http": _Pool, "https": _TlsPool}


def timed(session: S) -> S:
    """Have a session keep to `within`; returns it."""
    for scheme in _POOLS:
        session.mount(f"{scheme}://", _TimedAdapter())
    return session


class _TimedAdapter(HTTPAdapter):
    """Connects as sessions of `requests` do."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the pools of connections."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> PoolManager:
        """Return the pools of connections through a proxy."""
        manager: PoolManager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager
