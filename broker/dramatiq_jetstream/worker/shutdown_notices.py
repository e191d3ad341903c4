"""Tells running actors, and no others, of a shutdown, for Dramatiq's `ShutdownNotifications`.

Dramatiq keeps thread identifiers in a set, and reads it while threads leave it. That raises an error, after which the
remaining threads are not told; and a thread that has gone on to its next message is interrupted in that one. Here each
message has a mark of its own, which is checked while its thread cannot go on (see `interrupts`).
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import Any

from dramatiq.middleware import Middleware, Shutdown, ShutdownNotifications
from dramatiq.middleware.shutdown import _CtypesShutdownManager

from .interrupts import interrupt

__all__ = ["ShutdownNotices", "give_notice_for"]


def give_notice_for(middleware: Middleware) -> None:
    """Have a `ShutdownNotifications` of Dramatiq's use this module; anything else stays as it is."""
    if isinstance(middleware, ShutdownNotifications) and type(middleware.manager) is _CtypesShutdownManager:
        middleware.manager = ShutdownNotices(middleware.logger)


class ShutdownNotices(_CtypesShutdownManager):
    """The threads whose actors want to know of a shutdown; each thread adds and removes itself."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._marks: dict[int, Any] = {}

    def add_notification(self) -> None:
        self._marks[threading.get_ident()] = object()

    def remove_notification(self) -> None:
        self._marks.pop(threading.get_ident(), None)

    def shutdown(self) -> None:
        for thread_id, mark in self._marks.copy().items():
            interrupt(thread_id, Shutdown, partial(self._is_due, thread_id, mark))

    def _is_due(self, thread_id: int, mark: object) -> bool:
        due = self._marks.get(thread_id) is mark
        if due:
            self._logger.info("This worker shuts down; interrupting what thread %r runs.", thread_id)
        return due
