"""What commands share: how those for credentials run (an error is one line, and status 1), and kinds of arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dramatiq.errors import BrokerError

from .credentials import InvalidCredential
from .numbers import whole_number
from .text import flaw_of

_MOST_PIECES = 10**9


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


def pieces(text: str) -> int:
    """Return a number of pieces, as the type of an argument."""
    number = whole_number(text, 0, _MOST_PIECES)
    if number is None:
        raise argparse.ArgumentTypeError(f"pieces are a whole number from 0 to {_MOST_PIECES}")
    return number


def text(given: str) -> str:
    """Return text that people can read, as the type of an argument."""
    flaw = flaw_of(given, 200)
    if flaw is not None:
        raise argparse.ArgumentTypeError(flaw)
    return given
