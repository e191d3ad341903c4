"""What commands share: how those for credentials run (an error is one line, and status 1), and kinds of arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from dramatiq.errors import BrokerError

from .credentials import InvalidCredential
from .numbers import whole_number
from .text import flaw_of


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


def whole(what: str, least: int, most: int) -> Callable[[str], int]:
    """Return what reads a whole number, as the type of an argument.

    Parameters:
      what: What is counted, such as "days".
    """

    def read(text: str) -> int:
        number = whole_number(text, least, most)
        if number is None:
            raise argparse.ArgumentTypeError(f"{what} are a whole number from {least} to {most}")
        return number

    return read


pieces = whole("pieces", 0, 10**9)


def text(given: str) -> str:
    """Return text that people can read, as the type of an argument."""
    flaw = flaw_of(given, 200)
    if flaw is not None:
        raise argparse.ArgumentTypeError(flaw)
    return given
