"""Who is called when a message arrives or the connection changes. It outlives a link, and a fork."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dramatiq_jetstream.errors import PermissionDenied

from .client import Client
from .headers import Msg

__all__ = ["CoreSubscription", "Listeners"]


@dataclass(eq=False)
class CoreSubscription:
    """A subscription without JetStream, which lives until `close`, through every reconnect."""

    subject: str
    callback: Callable[[Msg], None]
    sid: int
    _close: Callable[[CoreSubscription], None] = field(repr=False)
    _withdraw: Callable[[CoreSubscription], None] = field(repr=False)
    denied: PermissionDenied | None = None

    def close(self) -> None:
        """End the subscription; messages still on their way are dropped."""
        self._close(self)

    def withdraw(self) -> None:
        """Tell the server to send no more; messages still on their way are delivered until `close`."""
        self._withdraw(self)


@dataclass
class Listeners:
    """Callbacks by occasion, called on the loop thread; `fork` in the child of a fork."""

    opened: list[Callable[[Client], None]] = field(default_factory=list)
    lost: list[Callable[[], None]] = field(default_factory=list)
    reconnect: list[Callable[[], None]] = field(default_factory=list)
    fence: list[Callable[[int], None]] = field(default_factory=list)
    node_lost: list[Callable[[], None]] = field(default_factory=list)
    tick: list[Callable[[], None]] = field(default_factory=list)
    fork: list[Callable[[], None]] = field(default_factory=list)

    def note_closed(self) -> None:
        """Say that the connection is lost, when its loop has ended."""
        for callback in list(self.lost):
            callback()

    def remove(self, callback: Callable[..., None]) -> None:
        everything: tuple[list[Any], ...] = (
            self.opened,
            self.lost,
            self.reconnect,
            self.fence,
            self.node_lost,
            self.tick,
            self.fork,
        )
        for callbacks in everything:
            with contextlib.suppress(ValueError):
                callbacks.remove(callback)
