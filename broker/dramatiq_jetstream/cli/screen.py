"""Shows text on a terminal as it is.

Errors, arguments and log lines are the program's, or those of people who use it. So no text is taken for rich's markup
or for the name of an emoji, and what would steer the terminal is shown as an escape.
"""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["Screen", "styled", "visible"]

# Control characters except tab and line feed, line separators, what overrides the direction of writing, and lone
# surrogates, which no terminal takes.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return text that a terminal can only show."""
    return _STEERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def styled(text: str, style: str) -> Text:
    """Return text in a style of rich's, such as `red`."""
    return Text(visible(text), style=style)


class Screen(Console):
    """A console that shows every text as it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text, or a cell of a table, as it is shown."""
        return super().render_str(visible(text), **options)
