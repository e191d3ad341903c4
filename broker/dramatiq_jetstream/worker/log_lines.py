"""Keeps what an attempt logs, for actors with the option `log_history=True`.

While a worker runs whose program has such an actor, a handler at the root logger hears every line that the levels of
loggers let through. It finds the message by the context of the thread or coroutine that logs, and keeps the last
`MAX_LINES` lines with it. Dramatiq's own lines say what the record says, and are left out.

The handler takes no lock, because an interrupt could leave it taken. If the process dies, the lines die with it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dramatiq.broker import MessageProxy

from .current import current_message

__all__ = ["LogLines", "lines_of"]

#: Lines of an attempt, and characters of a line, that are kept.
MAX_LINES = 200
MAX_CHARACTERS = 500

_ATTRIBUTE = "log_lines"


@dataclass
class _Lines:
    """The last lines of an attempt, and how many there were."""

    last: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))
    count: int = 0


class LogLines(logging.Handler):
    """Keeps log lines with the messages whose actors want that.

    Parameters:
      actor_options: The options of the actor with that name.
    """

    def __init__(self, actor_options: Callable[[str], Mapping[str, Any]]) -> None:
        super().__init__()
        self._actor_options = actor_options

    def handle(self, record: logging.LogRecord) -> bool:
        """Keep a line, without the lock that other handlers take."""
        message = current_message.get()
        if message is not None and not record.name.startswith("dramatiq."):
            try:
                self._keep(message, record)
            except Exception:  # noqa: BLE001 - whatever the line's arguments do
                self.handleError(record)
        return True

    def _keep(self, message: MessageProxy, record: logging.LogRecord) -> None:
        kept = vars(message)
        if _ATTRIBUTE not in kept:
            wanted = self._actor_options(message.actor_name).get("log_history")
            kept[_ATTRIBUTE] = _Lines() if wanted else None
        lines: _Lines | None = kept[_ATTRIBUTE]
        if lines is None:
            return
        second = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = f"{second}.{int(record.msecs):03d} {record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[0] is not None:
            text += f" ({record.exc_info[0].__name__}: {record.exc_info[1]})"
        lines.last.append(text[:MAX_CHARACTERS])
        lines.count += 1


def lines_of(message: MessageProxy) -> tuple[str, ...]:
    """What was kept of a message's attempt; first, how much was not."""
    lines: _Lines | None = vars(message).get(_ATTRIBUTE)
    if lines is None:
        return ()
    missing = lines.count - len(lines.last)
    return (*([f"… {missing} earlier lines"] if missing > 0 else []), *lines.last)
