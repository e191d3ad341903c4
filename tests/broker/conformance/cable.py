"""A cable between a client and its server that a test can cut."""

from __future__ import annotations

import selectors
import socket
import threading
from urllib.parse import urlsplit, urlunsplit


class Cable:
    """Passes bytes to and from the server in `url`; `cut` breaks every connection that is open.

    A client that connects again after that gets through: what is tested is how it comes back.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"{url!r} has no host and port to lay a cable to.")
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        user, at, _ = parts.netloc.rpartition("@")
        port = self._listener.getsockname()[1]
        self.url = urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

        self._selector = selectors.DefaultSelector()
        self._other_end: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="cable", daemon=True)
        self._thread.start()

    def cut(self) -> int:
        """Break all connections and return how many there were."""
        with self._lock:
            ends = list(self._other_end)
            for end in ends:
                self._drop(end)
        return len(ends) // 2

    def close(self) -> None:
        self._closed = True
        self._thread.join(timeout=5)
        self.cut()
        self._listener.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(timeout=0.1):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._other_end:
                        self._pass_on(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return  # it gave up before it was accepted
        try:
            server = socket.create_connection(self._target, timeout=5)
        except OSError:
            client.close()
            return
        for end, other in ((client, server), (server, client)):
            end.settimeout(5)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._other_end[end] = other
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        try:
            data = end.recv(65536)
            if data:
                self._other_end[end].sendall(data)
                return
        except OSError:
            pass  # one side is gone; the other learns it from the cut below
        self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        other = self._other_end.pop(end, None)
        if other is None:
            return
        self._other_end.pop(other, None)
        for side in (end, other):
            self._selector.unregister(side)
            side.close()
