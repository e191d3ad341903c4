"""Arguments that pydantic checks by an actor's annotations, when they are sent and when they arrive.

    @dramatiq.actor(actor_class=ValidatedActor)
    def charge(order: Order, at: datetime) -> None: ...

    charge.send(Order(id=7), datetime.now(UTC))

At the sender, models and anything else that pydantic knows become JSON, and what is wrong raises in the caller. At the
worker, the actor gets models again. What does not fit there, such as a message of an older program, is a dead letter
at once: another attempt would fail as well. The next step of a pipeline gets its first argument from the step before,
so that one is checked when it arrives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, get_type_hints

from dramatiq.message import Message

try:
    from pydantic import TypeAdapter, ValidationError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dramatiq_jetstream.pydantic needs the package pydantic: pip install 'dramatiq-jetstream[pydantic]'",
        name=error.name,
    ) from error

from .aio import AsyncActor
from .errors import InvalidOption

__all__ = ["InvalidArguments", "ValidatedActor"]

P = ParamSpec("P")
R = TypeVar("R")


class InvalidArguments(ValueError):
    """Arguments that an actor cannot be called with; the message names each, and not its value.

    Examples:
      >>> from dramatiq_jetstream.pydantic import InvalidArguments, ValidatedActor
      >>> @dramatiq.actor(actor_class=ValidatedActor)
      ... def refund(amount: int) -> None: ...
      >>> try:
      ...     refund.send("much")
      ... except InvalidArguments as error:
      ...     print("nothing is enqueued")
      nothing is enqueued
    """


class ValidatedActor(AsyncActor[P, R]):
    """An actor whose arguments are checked by pydantic: `@dramatiq.actor(actor_class=ValidatedActor)`.

    An argument without an annotation may be anything.

    Raises:
      InvalidOption: For a function with `*args` or `**kwargs`, whose arguments have no names to report.

    Examples:
      >>> from datetime import date
      >>> from dramatiq_jetstream.pydantic import ValidatedActor
      >>> @dramatiq.actor(actor_class=ValidatedActor)
      ... def book(day: date) -> None: ...
      >>> book.message(date(2026, 12, 24)).args
      ('2026-12-24',)
      >>> later = book.send_with_options(args=(date(2026, 12, 24),), delay=60_000)
      >>> book.message_with_options(args=("2026-12-24",), max_retries=0).options
      {'max_retries': 0}
    """

    def __init__(self, fn: Callable[P, Any], *, options: dict[str, Any], **settings: Any) -> None:
        self._signature = inspect.signature(fn)
        for parameter in self._signature.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise InvalidOption(
                    f"Actor {settings['actor_name']!r} takes {parameter}: a ValidatedActor needs named arguments."
                )
        hints = get_type_hints(fn, include_extras=True)
        self._types = {name: TypeAdapter(hints.get(name, Any)) for name in self._signature.parameters}
        throws = options.get("throws") or ()
        throws = throws if isinstance(throws, tuple) else (throws,)
        super().__init__(fn, options={**options, "throws": (*throws, InvalidArguments)}, **settings)

    def message_with_options(
        self, *, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Message[R]:
        """As Dramatiq's; the arguments are checked, and those that are missing may be added by a pipeline.

        Raises:
          InvalidArguments: When one of them does not fit.
        """
        bound = self._bind(self._signature.bind_partial, args, kwargs or {})
        values = self._validated(bound.arguments)
        bound.arguments.update(
            {name: self._types[name].dump_python(value, mode="json") for name, value in values.items()}
        )
        return super().message_with_options(args=bound.args, kwargs=bound.kwargs, **options)

    def send_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        delay: timedelta | int | None = None,
        **options: Any,
    ) -> Message[R]:
        """As Dramatiq's; the arguments are checked, and none may be missing.

        Parameters:
          delay: Milliseconds until it runs, or a timedelta; None for at once.

        Raises:
          InvalidArguments: When one of them does not fit, or is missing.
        """
        self._bind(self._signature.bind, args, kwargs or {})
        return super().send_with_options(args=args, kwargs=kwargs, delay=delay, **options)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the actor's function here, with checked arguments.

        Raises:
          InvalidArguments: When one of them does not fit, or is missing.
        """
        bound = self._bind(self._signature.bind, args, kwargs)
        bound.arguments.update(self._validated(bound.arguments))
        return super().__call__(*bound.args, **bound.kwargs)

    def _bind(
        self, bind: Callable[..., inspect.BoundArguments], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> inspect.BoundArguments:
        try:
            return bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{self.actor_name}: {error}.") from None

    def _validated(self, arguments: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        wrong: list[str] = []
        for name, value in arguments.items():
            try:
                values[name] = self._types[name].validate_python(value)
            except ValidationError as error:
                for one in error.errors(include_url=False, include_input=False, include_context=False):
                    place = ".".join(map(str, (name, *one["loc"])))
                    wrong.append(f"{place}: {one['msg']}")
        if wrong:
            raise InvalidArguments(f"{self.actor_name}: {'; '.join(wrong)}.")
        return values
