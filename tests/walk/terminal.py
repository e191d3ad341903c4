"""A terminal for the commands of a document: what a reader would type, and what the document says that they see."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.support.polling import eventually
from tests.support.ports import free_port

#: Generous: a worker of a loaded machine needs seconds to boot.
_SECONDS = 90

_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class File:
    """A program that a document shows; its first line is its name."""

    name: str
    text: str


@dataclass(frozen=True)
class Command:
    """A line after `$ `, and the lines that the document shows below it."""

    line: str
    output: str


def steps(document: Path) -> Iterator[File | Command]:
    """Yield what a reader of `document` does, in its order; Python that names no file is not run."""
    for language, text in _BLOCK.findall(document.read_text()):
        if language == "python":
            name = re.match(r"# ([\w/]+\.py)\n", text)
            if name:
                yield File(name[1], text)
            continue
        for line, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            yield Command(line, output)


class Terminal:
    """Does the steps of a document in `directory`; jobs in the background end with it."""

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        self._directory = directory
        self._variables = dict(variables)
        self._jobs: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._port = free_port()  # where documents have 8000

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _, job in self._jobs:
            job.kill()
            job.wait()

    def do(self, step: File | Command) -> None:
        """Do one step; an AssertionError says how what is seen differs from what is shown."""
        if isinstance(step, File):
            path = self._directory / step.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text)
            return
        line = re.sub(r"\b8000\b", str(self._port), step.line.partition("   #")[0].strip())
        if line.startswith("pip install "):
            return  # the environment has it
        if line.startswith("export "):
            self._variables |= dict(word.split("=", 1) for word in line.split()[1:])
        elif line.startswith("kill %"):
            self._stop(line.removeprefix("kill %"))
        elif line.endswith("&"):
            self._start(line.removesuffix("&").strip())
        else:
            self._run(line, step.output)

    def wait_for(self, text: str, file: str) -> None:
        """Wait until `file` has `text`."""

        def arrived() -> bool:
            path = self._directory / file
            log = path.read_text() if path.exists() else ""
            # Not as a line of its own: other processes write to the file too.
            assert text in log, f"{text!r} is not in:\n{log[-3000:]}"
            return True

        eventually(arrived, _SECONDS)

    def _start(self, line: str) -> None:
        redirected = re.search(r"> (\S+)", line)
        if redirected:
            (self._directory / redirected[1]).unlink(
                missing_ok=True
            )  # what an earlier job wrote is not this one's
        # `exec`, so that a signal reaches the program itself.
        job = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {line}"],
            cwd=self._directory,
            env=self._variables,
            start_new_session=True,
        )
        self._jobs.append((line, job))

    def _stop(self, beginning: str) -> None:
        named = [pair for pair in self._jobs if pair[0].startswith(beginning)]
        assert len(named) == 1, f"{beginning!r} names {len(named)} jobs"
        self._jobs.remove(named[0])
        line, job = named[0]
        try:
            job.send_signal(signal.SIGTERM)
            status = job.wait(_SECONDS)
        except BaseException:
            job.kill()
            raise
        assert status in (0, -signal.SIGTERM), f"{line} ended with {status}"

    def _run(self, line: str, expected: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=self._directory,
            env=self._variables,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}{self._logs()}"
        pattern = ".*".join(map(re.escape, expected.split("…")))
        assert not expected or re.fullmatch(pattern, done.stdout, re.DOTALL), f"$ {line}\n{done.stdout}"

    def _logs(self) -> str:
        return "".join(
            f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in self._directory.glob("*.log")
        )
