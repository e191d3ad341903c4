"""Runs the commands for credentials (`tasks.keys`, `tasks.operators`): errors are one line, and status 1."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dramatiq.errors import BrokerError

from .credentials import InvalidCredential


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, what: str) -> int:
    """Run the chosen command's `run`; returns the exit status.

    Parameters:
      what: What cannot be read or changed when the server cannot be reached, such as "The keys".
    """
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except InvalidCredential as error:
        print(error, file=sys.stderr)
    except BrokerError as error:
        print(f"{what} cannot be read or changed: {error}", file=sys.stderr)
    return 1
