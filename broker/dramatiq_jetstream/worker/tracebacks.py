"""Errors as text for people: bounded, and whatever the program's own exceptions do when they are shown."""

from __future__ import annotations

import traceback

__all__ = ["text_of", "traceback_of"]

#: Characters of what an error says.
MAX_TEXT = 2_000


def text_of(error: BaseException) -> str:
    """What an error says, shortened."""
    try:
        return str(error)[:MAX_TEXT]
    except Exception as broken:  # noqa: BLE001 - the program's own class
        return f"({type(broken).__name__})"


def traceback_of(error: BaseException, most: int) -> str:
    """The traceback of an error as Python prints it, shortened in the middle to about `most` characters."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as broken:  # noqa: BLE001 - the program's own class
        return f"(no traceback: {type(broken).__name__})"
    if len(text) <= most:
        return text
    return f"{text[: most // 4]}\n…\n{text[len(text) - most * 3 // 4 :]}"
