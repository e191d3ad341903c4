"""What a supervisor and a worker process say to each other: one JSON object a line, over a pair of sockets.

Neither side waits for the other: what does not fit into the socket's buffer is kept and sent later. A side that has
closed, or died, reads as the end of the stream.
"""

from __future__ import annotations

import json
import socket
from typing import Any

__all__ = ["Channel"]


class Channel:
    """One end of the pair."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._socket.setblocking(False)
        self._arrived = b""
        self._waiting = b""
        self.closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_waiting(self) -> bool:
        """Whether `flush` has something to send once the socket takes it."""
        return bool(self._waiting)

    def say(self, **message: Any) -> None:
        """Send a message, at once as far as the socket takes it."""
        self._waiting += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages."""
        try:
            while self._waiting:
                sent = self._socket.send(self._waiting)
                self._waiting = self._waiting[sent:]
        except BlockingIOError:
            return
        except OSError:
            self._waiting, self.closed = b"", True

    def read(self) -> list[dict[str, Any]]:
        """The messages that have arrived; afterwards `closed` says whether the other side is gone."""
        try:
            while True:
                received = self._socket.recv(65_536)
                if not received:
                    self.closed = True
                    break
                self._arrived += received
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._arrived = self._arrived.split(b"\n")
        return [json.loads(line) for line in lines if line]

    def close(self) -> None:
        self.closed = True
        self._socket.close()
