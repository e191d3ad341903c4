"""Child processes that do not outlive this one, started safely from any thread.

On Linux a child asks the kernel to be killed when its parent dies (PR_SET_PDEATHSIG). Two things make that
subtle. The kernel means the parent *thread*, so all children are started by one thread that lives as long as
this process. And the request has to be made in the child: code run between fork and exec is not safe in a
threaded program, so the child starts as a small Python program that makes the request and then becomes the
wanted one, with the same pid.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["spawn"]

# The parent may be gone before the request is made; then the signal would never come.
_BIND_TO_PARENT = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""

_Process = subprocess.Popen[bytes]


def spawn(command: list[str], *, output: int, keep: int) -> _Process:
    """Start `command` (an absolute path and arguments) in a session of its own.

    Its output goes to the descriptor `output`; the descriptor `keep` stays open in it. The session of its own
    keeps the terminal's Ctrl-C away: the parent decides when its child stops.
    """
    if sys.platform == "linux" and sys.executable:
        command = [sys.executable, "-I", "-S", "-c", _BIND_TO_PARENT, str(os.getpid()), *command]

    def start() -> _Process:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(keep,),
            start_new_session=True,
        )

    return _starter().run(start)


class _Starter:
    """The thread that starts the children. It ends with the process, not before."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], _Process], Future[_Process]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="child-starter", daemon=True).start()

    def run(self, start: Callable[[], _Process]) -> _Process:
        result: Future[_Process] = Future()
        self._jobs.put((start, result))
        return result.result(timeout=30)

    def _work(self) -> None:
        while True:
            start, result = self._jobs.get()
            try:
                result.set_result(start())
            except BaseException as error:  # noqa: BLE001 - it belongs to the thread that waits
                result.set_exception(error)


_lock = threading.Lock()
_current: _Starter | None = None


def _starter() -> _Starter:
    global _current
    with _lock:
        # Threads do not survive a fork: the child process needs a starter of its own.
        if _current is None or _current.pid != os.getpid():
            _current = _Starter()
        return _current
