"""Signals as something to select on: the handler only wakes, so nothing runs between two lines of other code."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterable
from types import FrameType

__all__ = ["Signals"]


class Signals:
    """Receives signals on a socket; to be made in the main thread.

    A signal that arrives before `read` waits in the socket. One that arrives before this object is made has its
    default action.
    """

    def __init__(self, wanted: Iterable[signal.Signals]) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in wanted:
            signal.signal(number, _received)

    def fileno(self) -> int:
        return self._read.fileno()

    def read(self) -> list[signal.Signals]:
        """The signals that arrived since the last call, in their order."""
        try:
            return [signal.Signals(number) for number in self._read.recv(4_096)]
        except BlockingIOError:
            return []


def _received(number: int, frame: FrameType | None) -> None:
    """Nothing: Python has written the number to the socket."""
