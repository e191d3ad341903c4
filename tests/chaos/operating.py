"""Runs an operator's command in haste: `python -m tests.chaos.operating archives run`.

Orders leave for the archive after KEEP_SECONDS in place of days. `--modules` names further modules to import, which
break the build, and `--dies` a function after which the process is killed: `tasks.retention:Retention._move:1`, where
the number is that of the call.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

#: For how long an event stays in the stream at least, in seconds: longer than anything is asked of an order.
KEEP_SECONDS = 12


def _dying(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    calls = iter(range(1, sys.maxsize))

    def called(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return called


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--modules", default="")
    parser.add_argument("--dies", default="")
    parser.add_argument("command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    for name in filter(None, options.modules.split(",")):
        importlib.import_module(name)
    from tasks import app
    from tasks.retention import Retention

    made = app.retention

    def hurried() -> Retention:
        found = made()
        found._keep = KEEP_SECONDS * 1000
        return found

    app.retention = hurried
    if options.dies:
        module, place, number = options.dies.split(":")
        owner, _, name = place.partition(".")
        of = getattr(importlib.import_module(module), owner)
        setattr(of, name, _dying(getattr(of, name), int(number)))
    program = importlib.import_module(f"tasks.{options.command}")
    sys.argv[1:] = options.arguments
    return int(program.main())


if __name__ == "__main__":
    sys.exit(main())
