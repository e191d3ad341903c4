"""Wraps a method of one broker, and no other of its class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dramatiq import Broker


class SendingMethod:
    """A broker's method that sends, with something around it; it hides the method of the class."""

    def __init__(self, broker: Broker, name: str, around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(type(broker), name))
        self._broker = broker
        self._name = name
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Looked up at each call, so that what patches the class meanwhile goes on working.
        method = getattr(type(self._broker), self._name)
        return self._around(functools.partial(method, self._broker), *args, **kwargs)
