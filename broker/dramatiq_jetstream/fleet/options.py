"""What `fleet work` was told: the program, how many processes and threads, and when a process is replaced."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

__all__ = ["WorkOptions"]


@dataclass(frozen=True, slots=True)
class WorkOptions:
    """The options of a fleet.

    Attributes:
      broker: The module of the program, or `module:attribute` of its broker or of a function that sets one up.
      modules: Further modules to import.
      queues: The queues to serve; all that are declared when empty.
      path: Directories put before the import path.
      shutdown_timeout: Milliseconds that a stopping process gets for its running actors.
      max_tasks, max_age, max_memory: After this many attempts, at this age in seconds, or with this many resident
        bytes, a process is replaced; None for never.
      max_memory_hard: With this many bytes it is killed.
      forks: Functions to run in a process each, as `module:function`; those of the middleware come on top.
      verbose: 0 logs from INFO up, 1 from DEBUG.
      skip_logging: Leave logging to the program.
      quiet: Take nothing: a process that replaces another one of a quiet fleet.
    """

    broker: str
    modules: tuple[str, ...] = ()
    processes: int = 1
    threads: int = 8
    queues: tuple[str, ...] = ()
    path: tuple[str, ...] = (".",)
    shutdown_timeout: int = 600_000
    max_tasks: int | None = None
    max_age: float | None = None
    max_memory: int | None = None
    max_memory_hard: int | None = None
    forks: tuple[str, ...] = ()
    verbose: int = 0
    skip_logging: bool = False
    quiet: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkOptions:
        values: dict[str, Any] = json.loads(text)
        complete: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**complete)
