"""A fleet of real worker processes, started, killed and watched by a test."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from tests.support.polling import eventually
from tests.support.processes import WORKER_READY, Process, dramatiq_worker, supervised_workers


class Fleet:
    """Worker processes of `tests.broker.fleet_app`, and a broker to talk to them.

    `options` are those of every broker of the fleet; `url` and `namespace` are among them.
    """

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        self.runs = directory / "runs.txt"
        self.runs.touch()
        self.options = options
        self.broker = JetStreamBroker(**options)
        self._processes: list[Process] = []

    def start(
        self,
        *arguments: str,
        processes: int = 1,
        threads: int = 2,
        wait: bool = True,
        env: dict[str, str] | None = None,
        supervised: bool = False,
        **options: Any,
    ) -> Process:
        """Run the dramatiq command, or `fleet work`, and wait until its processes are ready."""
        command = supervised_workers if supervised else dramatiq_worker
        process = command(
            "tests.broker.fleet_app",
            log=self.directory / f"workers-{len(self._processes)}.log",
            processes=processes,
            threads=threads,
            arguments=arguments,
            env={
                "FLEET_RUNS": str(self.runs),
                "FLEET_BROKER": json.dumps({**self.options, **options}),
                "dramatiq_restart_delay": "300",
                **(env or {}),
            },
        )
        self._processes.append(process.start())
        if wait:
            process.wait_for_output(WORKER_READY, count=processes, timeout=90)
        return process

    def send(self, actor: str, *args: Any, queue: str = "default", **options: Any) -> Message[Any]:
        """Send a message to an actor of the fleet."""
        return self.broker.enqueue(Message(queue, actor, args, {}, options))

    def open(self, name: str) -> None:
        """Let the `hold` or `flaky` of a name go on."""
        (self.directory / f"{name}.open").touch()

    def lines(self) -> list[str]:
        """What the actors wrote down, without process ids."""
        return [" ".join(line.split()[:2]) for line in self.runs.read_text().splitlines()]

    def counts(self) -> Counter[str]:
        return Counter(self.lines())

    def wait_for(self, line: str, *, count: int = 1, timeout: float = 60.0) -> None:
        """Wait until the actors have written a line `times` times."""
        eventually(lambda: self.counts()[line] >= count, timeout=timeout, message=f"{line!r} ({count} times)")

    def close(self) -> None:
        for process in self._processes:
            if process.running:
                process.kill()
        self.broker.close()


@contextmanager
def fleet(directory: Path, **options: Any) -> Iterator[Fleet]:
    """A fleet for the length of the block; nothing of it is left behind."""
    found = Fleet(directory, **options)
    try:
        yield found
    finally:
        found.close()
