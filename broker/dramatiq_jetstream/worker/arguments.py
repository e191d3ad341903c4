"""What people see of a message's arguments: the beginning of a text that the program may make itself."""

from __future__ import annotations

from collections.abc import Callable

from dramatiq.broker import MessageProxy

__all__ = ["MAX_ARGUMENTS", "Describe", "describe_arguments", "shown_arguments"]

#: Characters that are shown.
MAX_ARGUMENTS = 200

Describe = Callable[[MessageProxy], str]


def describe_arguments(message: MessageProxy) -> str:
    """The arguments of a message as a call shows them."""
    named = [f"{name}={value!r}" for name, value in message.kwargs.items()]
    return ", ".join([*map(repr, message.args), *named])


def shown_arguments(message: MessageProxy, describe: Describe) -> str:
    """What is shown of a message's arguments; of a `describe` that fails, the class of its error and nothing else."""
    try:
        return describe(message)[:MAX_ARGUMENTS]
    except Exception as error:  # noqa: BLE001 - the program's own code
        return f"({type(error).__name__})"
