"""What a supervisor and a worker process say to each other: one JSON object a line, over a pair of sockets.

A line may come with a socket; the other side gets a copy of it. Any thread may speak.

Neither side waits for the other: what does not fit into the socket's buffer is kept and sent later. A side that has
closed, or died, reads as the end of the stream.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from typing import Any

__all__ = ["Channel"]

#: Sockets that are received at once.
MOST_SOCKETS = 16


class Channel:
    """One end of the pair."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._socket.setblocking(False)
        self._arrived = b""
        self._sockets: deque[socket.socket] = deque()
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._speaking = threading.Lock()
        self.closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_waiting(self) -> bool:
        """Whether `flush` has something to send once the socket takes it."""
        return bool(self._waiting)

    def say(self, *sockets: socket.socket, **message: Any) -> None:
        """Send a message, at once as far as the socket takes it."""
        line = json.dumps({**message, "sockets": len(sockets)}).encode() + b"\n"
        self._waiting.append((line, [each.fileno() for each in sockets]))
        self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages."""
        with self._speaking:
            try:
                while self._waiting:
                    line, sockets = self._waiting[0]
                    sent = socket.send_fds(self._socket, [line], sockets)
                    if sent < len(line):
                        self._waiting[0] = line[sent:], []
                    else:
                        self._waiting.popleft()
            except BlockingIOError:
                return
            except OSError:
                self._waiting.clear()
                self.closed = True

    def read(self) -> list[dict[str, Any]]:
        """The messages that have arrived, each with its sockets; `closed` says whether the other side is gone."""
        try:
            while True:
                received, descriptors, _, _ = socket.recv_fds(self._socket, 65_536, MOST_SOCKETS)
                self._sockets += [socket.socket(fileno=descriptor) for descriptor in descriptors]
                if not received:
                    self.closed = True
                    break
                self._arrived += received
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._arrived = self._arrived.split(b"\n")
        messages = [json.loads(line) for line in lines if line]
        for message in messages:
            message["sockets"] = [self._sockets.popleft() for _ in range(message["sockets"])]
        return messages

    def close(self) -> None:
        self.closed = True
        self._socket.close()
