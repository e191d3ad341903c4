"""The service's commands without the second or two that each needs to import the service.

They run in real processes, one for each command, which are forked off one that has imported the service with the
settings of the test and does nothing else: it has no thread and no connection.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.processes import REPOSITORY

#: Which file is which stream of a command, and how it is opened.
STREAMS = {0: os.O_RDONLY, 1: os.O_WRONLY, 2: os.O_WRONLY}


class Commands:
    """Runs `python -m MODULE ARGUMENT ...`; the process behind it starts with the first command.

    Parameters:
      environment: What is added to the environment of the commands.
      within: What comes before the process behind them, such as a command that enters a network namespace.
    """

    def __init__(self, environment: Mapping[str, str], *, within: Sequence[str] = ()) -> None:
        self._environment = {**os.environ, **environment}
        self._within = list(within)
        self._lock = threading.Lock()
        self._forks: subprocess.Popen[str] | None = None

    def run(self, module: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with self._lock, tempfile.TemporaryDirectory() as directory:
            files = [Path(directory, str(stream)) for stream in STREAMS]
            for file, text in zip(files, (stdin, "", ""), strict=True):
                file.write_text(text)
            forks = self._forks or self._start()
            assert forks.stdin is not None
            assert forks.stdout is not None
            forks.stdin.write(json.dumps([module, arguments, list(map(str, files))]) + "\n")
            forks.stdin.flush()
            code = int(forks.stdout.readline())
            _, output, errors = (file.read_text() for file in files)
        return subprocess.CompletedProcess([module, *arguments], code, output, errors)

    def _start(self) -> subprocess.Popen[str]:
        self._forks = subprocess.Popen(
            [*self._within, sys.executable, "-m", "tests.support.commands"],
            cwd=REPOSITORY,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self._forks

    def close(self) -> None:
        """End the process behind it."""
        if self._forks is not None:
            self._forks.communicate(timeout=60)
            self._forks = None

    def __enter__(self) -> Commands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main() -> None:
    """Fork a process for each line of standard input, and answer with its exit status."""
    import tasks  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    assert threading.active_count() == 1
    while line := sys.stdin.readline():
        module, arguments, files = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for file, (stream, flags) in zip(files, STREAMS.items(), strict=True):
                os.dup2(os.open(file, flags), stream)
            sys.argv[1:] = arguments
            # It ends as a program does: with what is to be done at exit, and its status.
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()


if __name__ == "__main__":
    main()
