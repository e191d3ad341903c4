"""Importing a program the way the `dramatiq` command does, with one clear sentence for what can be wrong."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import dramatiq
from dramatiq.broker import Broker

from dramatiq_jetstream.broker import JetStreamBroker
from dramatiq_jetstream.errors import InvalidOption

__all__ = ["ProgramError", "load_broker", "load_function", "put_on_path"]


_DJANGO_SETTINGS = "DJANGO_SETTINGS_MODULE"

_SET_ONE = "call dramatiq.set_broker(JetStreamBroker(...)) in it, before its actors are declared."


class ProgramError(Exception):
    """The program cannot be used as it was named; the message says why and what to do."""


def put_on_path(directories: Iterable[str]) -> None:
    """Look for modules in these directories first."""
    for directory in reversed(list(directories)):
        sys.path.insert(0, os.path.abspath(directory))  # noqa: PTH100 - Path.resolve would follow links


def load_broker(name: str, modules: Iterable[str] = ()) -> JetStreamBroker:
    """Import a program and return its broker.

    Parameters:
      name: A module whose import sets Dramatiq's global broker; or `module:attribute` of a broker, or of a function
        to call, which sets the global one.
      modules: Further modules to import, for the actors in them.

    Raises:
      ProgramError: When a module or the attribute does not exist, or the broker is another kind.
      Exception: What the program itself raises.
    """
    found = _load(name)
    if callable(found):
        found()
    for module in modules:
        _load(module)
    broker = found if isinstance(found, Broker) else dramatiq.broker.global_broker
    if broker is None:
        raise ProgramError(f"{name!r} sets no broker: {_SET_ONE}")
    if not isinstance(broker, JetStreamBroker):
        raise ProgramError(f"{name!r} uses a {type(broker).__name__}, not a JetStreamBroker: {_SET_ONE}")
    return broker


def load_function(name: str) -> Any:
    """Return the function `module:function`; raises as `load_broker`."""
    found = _load(name)
    if not callable(found):
        raise ProgramError(f"{name!r} cannot be run: give module:function.")
    return found


def _load(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    module = _import(module_name)
    if not attribute:
        return module
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise ProgramError(f"module {module_name!r} has no {attribute!r}.") from None


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "pika" and dramatiq.broker.global_broker is None:  # Dramatiq would use RabbitMQ
            raise ProgramError(f"{name!r} declares actors and sets no broker: {_SET_ONE}") from None
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ProgramError(
                f"there is no module {name!r} here: run it where `python -c 'import {name}'` works, or give --path."
            ) from None
        settings = os.environ.get(_DJANGO_SETTINGS, "")
        if error.name and f"{settings}.".startswith(f"{error.name}."):
            raise ProgramError(
                f"{_DJANGO_SETTINGS} names {settings!r}, and there is no module {error.name!r} here: run it in the "
                "folder of manage.py, or correct the variable."
            ) from None
        raise
    except InvalidOption as error:
        raise ProgramError(str(error)) from error
    except Exception as error:
        if type(error).__name__ == "ImproperlyConfigured":  # Django's, which need not be installed
            raise ProgramError(f"{name!r} cannot be set up: {error}") from error
        raise
