"""The bound of an awaited enqueue: a blocking socket, bytes that are made beforehand, and no client at all."""

from __future__ import annotations

import json
import os
import socket
import threading
from urllib.parse import urlsplit

from benchmarks.contenders.contender import App
from benchmarks.contenders.nats_bare import NatsBare
from benchmarks.servers import NatsServer

SIZE = 256
TIMEOUT_SECONDS = 10.0


class NatsSocket(NatsBare):
    name = "socket"
    title = "bound: a socket to nats-server"
    note = "no client: a publish is bytes, and of its answer only a sequence is looked for"
    distributions = ()
    only = ("enqueue",)

    def app(self) -> App:
        return SocketApp()


class SocketApp(App):
    broker = None

    def __init__(self) -> None:
        self._own = threading.local()

    def start(self) -> None:
        stream = {"name": "bench", "subjects": ["bench"], "retention": "workqueue"}
        answer = self._wire().ask("$JS.API.STREAM.CREATE.bench", json.dumps(stream).encode())
        if b'"error"' in answer:
            raise RuntimeError(f"there is no stream: {answer!r}")

    def enqueue(self, index: int = -1) -> None:
        answer = self._wire().publish()
        if b'"seq"' not in answer:
            raise RuntimeError(f"nothing was stored: {answer!r}")

    def _wire(self) -> Wire:
        wire: Wire | None = getattr(self._own, "wire", None)
        if wire is None:
            wire = self._own.wire = Wire()
        return wire


class Wire:
    """One connection, for one thread."""

    def __init__(self) -> None:
        url = urlsplit(os.environ[NatsServer.variable])
        self._inbox = b"answer.%d.%d" % (os.getpid(), threading.get_ident())
        self._message = self._request("bench", b"x" * SIZE)
        self._socket = socket.create_connection((url.hostname or "", url.port or 0), TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(b'CONNECT {"verbose":false}\r\nSUB %b 1\r\nPING\r\n' % self._inbox)
        greeting = b""
        while not greeting.endswith(b"PONG\r\n"):
            greeting += self._received()

    def publish(self) -> bytes:
        return self._exchange(self._message)

    def ask(self, subject: str, body: bytes) -> bytes:
        return self._exchange(self._request(subject, body))

    def _request(self, subject: str, body: bytes) -> bytes:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), self._inbox, len(body), body)

    def _exchange(self, request: bytes) -> bytes:
        self._socket.sendall(request)
        answer = b""
        # Its head is a line, and so is the JSON.
        while not (answer.endswith(b"\r\n") and answer.count(b"\r\n") == 2):
            answer += self._received().replace(b"PING\r\n", b"")
        return answer

    def _received(self) -> bytes:
        received = self._socket.recv(65_536)
        if not received:
            raise ConnectionError("the server hung up")
        return received
