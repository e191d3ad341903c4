"""Calls middleware as Dramatiq's `Broker` does, but only those that do something at a hook.

Dramatiq calls every middleware at every hook, and most of them inherit an empty method for most hooks: about
thirty calls for each message, a tenth of the time it takes to work off one that does nothing. What a middleware
has of its own is looked up when the list of middleware changes, so a method must not be replaced after that.
Dramatiq's `Pipelines` imports a module at every message, before it sees that this one is not part of a pipeline; it
is called for those that are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware, MiddlewareError, Pipelines

__all__ = ["EmittingBroker"]

_UNEXPECTED = "Unexpected failure in %s of %r."  # in the words of Dramatiq

#: The methods to call at a hook, in order, each with its middleware.
_Listeners = list[tuple[Callable[..., Any], Middleware]]


class _Hooks:
    """What a list of middleware does at each signal, looked up when it is first emitted."""

    def __init__(self, middleware: list[Middleware]) -> None:
        self.middleware = middleware
        self.before: dict[str, _Listeners] = {}
        self.after: dict[str, _Listeners] = {}
        self.own: dict[str, _Listeners] = {}

    def listeners(self, hook: str) -> _Listeners:
        return [(_method(one, hook), one) for one in self.middleware if _listens(one, hook)]


class EmittingBroker(Broker):
    """A broker that emits signals with the same order, arguments and handling of errors as Dramatiq's."""

    def __init__(self, middleware: list[Middleware] | None = None) -> None:
        self._hooks = _Hooks([])
        super().__init__(middleware=middleware)

    def _look(self) -> _Hooks:
        hooks = self._hooks
        if hooks.middleware != self.middleware:
            hooks = self._hooks = _Hooks(list(self.middleware))
        return hooks

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        hooks = self._look()
        listeners = hooks.before.get(signal)
        if listeners is None:
            listeners = hooks.before[signal] = hooks.listeners("before_" + signal)
        for method, middleware in listeners:
            try:
                method(self, *args, **kwargs)
            except MiddlewareError:
                raise
            except Exception:
                self.logger.critical(_UNEXPECTED, "before_" + signal, middleware, exc_info=True)

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        hooks = self._look()
        listeners = hooks.after.get(signal)
        if listeners is None:
            listeners = hooks.after[signal] = hooks.listeners("after_" + signal)[::-1]
        for method, middleware in listeners:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self.logger.critical(_UNEXPECTED, "after_" + signal, middleware, exc_info=True)
                self.failed_after(signal, middleware, error)

    def emit_own(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Call a hook of this library's own, which a middleware need not have."""
        hooks = self._look()
        listeners = hooks.own.get(hook)
        if listeners is None:
            listeners = hooks.own[hook] = hooks.listeners(hook)
        for method, middleware in listeners:
            try:
                method(self, *args, **kwargs)
            except Exception:
                self.logger.critical(_UNEXPECTED, hook, middleware, exc_info=True)

    def failed_after(self, signal: str, middleware: Middleware, error: Exception) -> None:
        """Called when a middleware failed after a signal."""


def _listens(middleware: Middleware, hook: str) -> bool:
    method = getattr(middleware, hook, None)
    if method is None:
        return False
    empty = getattr(Middleware, hook, None)
    return empty is None or getattr(method, "__func__", None) is not empty


def _method(middleware: Middleware, hook: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(middleware, hook)
    if type(middleware) is not Pipelines or hook != "after_process_message":
        return method

    def in_pipelines(broker: Broker, message: MessageProxy, **outcome: Any) -> None:
        if "pipe_target" in message.options:
            method(broker, message, **outcome)

    return in_pipelines
