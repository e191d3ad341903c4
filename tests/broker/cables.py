"""A cable that can lose what the server says, for tests of lost answers and lost announcements."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.broker.conformance.cable import Cable


class DeafCable(Cable):
    """While `deaf`, the client still gets through to the server, and nothing comes back."""

    deaf = False
    #: What was lost.
    lost = b""

    def _pass_on(self, end: socket.socket) -> None:
        if self.deaf and end.getpeername() == self._target:
            self.lost += end.recv(65536)
            return
        super()._pass_on(end)

    @contextmanager
    def deafness(self) -> Iterator[None]:
        """Lose the server's side of the connection, and at the end the connection."""
        self.deaf = True
        try:
            yield
        finally:
            self.cut()
            self.deaf = False
