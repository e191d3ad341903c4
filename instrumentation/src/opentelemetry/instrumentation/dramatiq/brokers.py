"""Reaches every broker of a process: those that exist, and those that are made later."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import dramatiq
from dramatiq import Broker


class Brokers:
    """Calls `attach` once for every broker until it is removed; then `detach` for each of them.

    A worker imports the module that makes the broker after the process was instrumented, and a program may instrument
    itself after it has made one. So the constructor is wrapped, and existing brokers are looked for.
    """

    def __init__(self, attach: Callable[[Broker], None], detach: Callable[[Broker], None]) -> None:
        self._attach = attach
        self._detach = detach
        self._attached: WeakSet[Broker] = WeakSet()
        self._lock = threading.RLock()
        self._installed = False
        self._original = Broker.__init__
        self._wrapper: Callable[..., None] | None = None

    def install(self) -> None:
        """Attach to all brokers, now and in future."""
        original = self._original = Broker.__init__

        @functools.wraps(original)
        def init(broker: Broker, *args: Any, **kwargs: Any) -> None:
            original(broker, *args, **kwargs)
            self._add(broker)

        self._installed = True
        self._wrapper = init
        Broker.__init__ = init  # type: ignore[method-assign, assignment]
        for broker in _existing():
            self._add(broker)

    def remove(self) -> None:
        """Leave every broker, and Dramatiq's class, as they were."""
        with self._lock:
            self._installed = False
            # A wrapper that another library has put around ours since stays; ours then does nothing.
            if Broker.__init__ is self._wrapper:
                Broker.__init__ = self._original  # type: ignore[method-assign]
            for broker in self._attached:
                self._detach(broker)
            self._attached.clear()

    def _add(self, broker: Broker) -> None:
        with self._lock:
            if self._installed and broker not in self._attached:
                self._attached.add(broker)
                self._attach(broker)


def _existing() -> list[Broker]:
    # By its type: isinstance would ask lazy proxies for their class, and so wake them up.
    found = [one for one in gc.get_objects() if issubclass(type(one), Broker)]
    # Web servers that fork may hide all objects with gc.freeze. The broker in use is known anyway.
    known = dramatiq.broker.global_broker
    return found if known is None or known in found else [*found, known]
