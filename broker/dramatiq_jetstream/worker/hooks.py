"""Calls middleware as Dramatiq's `Broker` does, but only the middleware that does something at a hook.

Dramatiq calls every middleware at every hook, and most of them inherit an empty method for most hooks: about thirty
calls per message. Here the methods to call are looked up once, and again when the list of middleware changes, so a
method must not be replaced in between. Without this, a message that does nothing costs a worker 18 % more CPU.

Three middleware classes are called differently. `Pipelines` imports a module at every message before it sees that the
message has no next step, so it is only called for messages that have one. `Retries` is not called for an aborted
message, which must not run again. `Results` stores a failure after the nack, when it is too late to keep the message if
storing fails, so it is called before the nack; a message that its actor has put off has no result yet.

What the broker itself does at a hook is kept with the hook. Methods around these would cost more calls per message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware, MiddlewareError, Pipelines, Retries, SkipMessage
from dramatiq.results import Results

from .current import is_abort, is_abortable

__all__ = ["HookedBroker"]

_UNEXPECTED = "Unexpected failure in %s of %r."  # in the words of Dramatiq

#: After these a worker thread has a message to settle and must live on, whatever a middleware raises.
_OF_A_MESSAGE = frozenset({"process_message", "skip_message", "ack", "nack"})

#: The methods to call at a hook, in order, each with its middleware.
_Listeners = list[tuple[Callable[..., Any], Middleware]]


@dataclass(slots=True)
class _Hook:
    """What happens at a hook: what the broker does first, what its middleware does, what the broker does last."""

    listeners: _Listeners
    first: Callable[..., object] | None
    last: Callable[..., object] | None


class _Hooks:
    """What a broker and its list of middleware do at each signal, looked up when it is first emitted."""

    def __init__(self, broker: HookedBroker) -> None:
        self._broker = broker
        self.middleware = list(broker.middleware)
        self.before: dict[str, _Hook] = {}
        self.after: dict[str, _Hook] = {}
        self.own: dict[str, _Listeners] = {}

    def find_before(self, signal: str) -> _Hook:
        name = "before_" + signal
        listeners = self.listeners(name)
        if signal == "nack":
            listeners += [listener for listener in self.listeners("after_nack") if _is_results(listener)]
        hook = self.before[signal] = self._hook(name, listeners)
        return hook

    def find_after(self, signal: str) -> _Hook:
        name = "after_" + signal
        listeners = self.listeners(name)[::-1]
        if signal == "nack":
            listeners = [listener for listener in listeners if not _is_results(listener)]
        hook = self.after[signal] = self._hook(name, listeners)
        return hook

    def listeners(self, name: str) -> _Listeners:
        return [(_method(one, name), one) for one in self.middleware if _listens(one, name)]

    def _hook(self, name: str, listeners: _Listeners) -> _Hook:
        return _Hook(listeners, self._broker.first.get(name), self._broker.last.get(name))


class HookedBroker(Broker):
    """A broker that emits signals with the same order, arguments and handling of errors as Dramatiq's.

    Attributes:
      first, last: What the broker itself does at a hook, before its middleware and when that is done or was
        interrupted. It gets the signal's positional arguments.
    """

    def __init__(self, middleware: list[Middleware] | None = None) -> None:
        self.first: dict[str, Callable[..., object]] = {}
        self.last: dict[str, Callable[..., object]] = {}
        self.middleware: list[Middleware] = []
        self._hooks = _Hooks(self)
        super().__init__(middleware=middleware)

    def _look_again(self) -> _Hooks:
        self._hooks = _Hooks(self)
        return self._hooks

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        hooks = self._hooks if self._hooks.middleware == self.middleware else self._look_again()
        hook = hooks.before.get(signal) or hooks.find_before(signal)
        if hook.first is not None:
            hook.first(*args)
        try:
            for method, middleware in hook.listeners:
                try:
                    method(self, *args, **kwargs)
                except MiddlewareError:
                    raise
                except Exception as error:
                    self.logger.critical(_UNEXPECTED, "before_" + signal, middleware, exc_info=True)
                    self._failed_in("before_" + signal, middleware, error)
        finally:
            if hook.last is not None:
                hook.last(*args)

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        hooks = self._hooks if self._hooks.middleware == self.middleware else self._look_again()
        hook = hooks.after.get(signal) or hooks.find_after(signal)
        if hook.first is not None:
            hook.first(*args)
        try:
            for method, middleware in hook.listeners:
                try:
                    method(self, *args, **kwargs)
                except BaseException as error:
                    if signal not in _OF_A_MESSAGE and not isinstance(error, Exception):
                        raise
                    self.logger.critical(_UNEXPECTED, "after_" + signal, middleware, exc_info=True)
                    self._failed_in("after_" + signal, middleware, error)
        finally:
            if hook.last is not None:
                hook.last(*args)

    def emit_own(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Call a hook of this library's own, which a middleware need not have."""
        hooks = self._hooks if self._hooks.middleware == self.middleware else self._look_again()
        listeners = hooks.own.get(hook)
        if listeners is None:
            listeners = hooks.own[hook] = hooks.listeners(hook)
        for method, middleware in listeners:
            try:
                method(self, *args, **kwargs)
            except Exception:
                self.logger.critical(_UNEXPECTED, hook, middleware, exc_info=True)

    def _failed_in(self, hook: str, middleware: Middleware, error: BaseException) -> None:
        """Called when a middleware failed at a hook."""


def _is_results(listener: tuple[Callable[..., Any], Middleware]) -> bool:
    return isinstance(listener[1], Results)


def _listens(middleware: Middleware, hook: str) -> bool:
    method = getattr(middleware, hook, None)
    if method is None:
        return False
    empty = getattr(Middleware, hook, None)
    return empty is None or getattr(method, "__func__", None) is not empty


def _method(middleware: Middleware, hook: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(middleware, hook)
    if hook == "before_process_message" and is_abortable(middleware):

        def noting_cancellation(broker: Broker, message: MessageProxy) -> None:
            try:
                method(broker, message)
            except SkipMessage:
                vars(message)["is_cancelled"] = True
                raise

        return noting_cancellation
    if hook == "after_skip_message" and isinstance(middleware, Results):

        def unless_put_off(broker: Broker, message: MessageProxy) -> None:
            if vars(message).get("put_off") is None:
                method(broker, message)

        return unless_put_off
    if hook != "after_process_message":
        return method
    if type(middleware) is Pipelines:

        def in_pipelines(
            broker: Broker,
            message: MessageProxy,
            *,
            result: Any = None,
            exception: BaseException | None = None,
        ) -> None:
            if "pipe_target" in message.options:
                method(broker, message, result=result, exception=exception)

        return in_pipelines
    if isinstance(middleware, Retries):

        def unless_aborted(
            broker: Broker,
            message: MessageProxy,
            *,
            result: Any = None,
            exception: BaseException | None = None,
        ) -> None:
            if exception is not None and is_abort(exception):
                message.fail()
            else:
                method(broker, message, result=result, exception=exception)

        return unless_aborted
    return method
