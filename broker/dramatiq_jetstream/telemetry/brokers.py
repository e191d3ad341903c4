"""Reaches every broker of a process: those that exist and those that are made later."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import dramatiq
from dramatiq import Broker


class BrokerHook:
    """Calls `attach` once for every broker, until it is removed; then `detach` for each of them.

    A worker imports the module that makes the broker after the process was instrumented, and a program may
    instrument itself after it has made one. So the constructor is wrapped, and what is there is looked for.
    """

    def __init__(self, attach: Callable[[Broker], None], detach: Callable[[Broker], None]) -> None:
        self._attach = attach
        self._detach = detach
        self._installed = False
        self._lock = threading.RLock()
        self._original: Callable[..., None] = Broker.__init__
        self._wrapper: Callable[..., None] | None = None
        self.brokers: WeakSet[Broker] = WeakSet()

    def install(self, brokers: list[Broker] | None = None) -> None:
        """Attach to the given brokers; to all, now and in future, when none are given."""
        self._installed = True
        if brokers is None:
            self._wrap_constructor()
            brokers = existing_brokers()
        for broker in brokers:
            self._add(broker)

    def remove(self) -> None:
        """Leave every broker, and Dramatiq's class, as they were."""
        with self._lock:
            self._installed = False
            # If somebody has wrapped the constructor since, ours stays underneath and does nothing.
            if self._wrapper is not None and Broker.__init__ is self._wrapper:
                Broker.__init__ = self._original  # type: ignore[method-assign]
            self._wrapper = None
            for broker in list(self.brokers):
                self._detach(broker)
            self.brokers.clear()

    def _add(self, broker: Broker) -> None:
        with self._lock:
            if self._installed and broker not in self.brokers:
                self.brokers.add(broker)
                self._attach(broker)

    def _wrap_constructor(self) -> None:
        original = self._original = Broker.__init__
        hook = self

        @functools.wraps(original)
        def init(self: Broker, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            hook._add(self)

        self._wrapper = init
        Broker.__init__ = init  # type: ignore[method-assign]


def existing_brokers() -> list[Broker]:
    """The brokers that were made before anyone could see it."""
    # isinstance would ask lazy proxies for their class, and so wake them up.
    found: dict[int, Broker] = {id(o): o for o in gc.get_objects() if issubclass(type(o), Broker)}
    # gc.freeze, which web servers that fork like to call, hides objects; the broker in use is known anyway.
    known = dramatiq.broker.global_broker
    if known is not None:
        found[id(known)] = known
    return list(found.values())
