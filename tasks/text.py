"""Text from outside: what a name may consist of, and how text that may hold anything is shown and logged.

A name of a person may hold joiners, which Persian, Hindi and emoji need. It may not hold what changes how the
text around it reads: control characters, line breaks, and characters that override the direction of writing.
The same name is the same text: it is kept in Unicode's composed form (NFC).
"""

from __future__ import annotations

import unicodedata
from typing import Final

# Embeddings, overrides and isolates of the Unicode bidirectional algorithm.
_DIRECTION: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# Control characters, lone surrogates, line and paragraph separators.
_UNFIT: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})

# What alone shows nothing: spaces, joiners, marks that belong to a character before them.
_INVISIBLE: Final = frozenset({"Zs", "Cf", "Mn", "Me", "Mc"})

# What spreadsheets take for the beginning of a formula.
_FORMULA: Final = tuple("=+-@|%＝＋－＠")


def _fits(character: str) -> bool:
    return unicodedata.category(character) not in _UNFIT and character not in _DIRECTION


def normalised(text: str, limit: int) -> str:
    """Return text in NFC; one that is far beyond the limit comes back as it is, because composing it takes long."""
    return unicodedata.normalize("NFC", text) if len(text) <= 4 * limit else text


def flaw_of(name: str, limit: int) -> str | None:
    """Return what is wrong with a normalised name, as the end of a sentence about it; None when it is good.

    Parameters:
      limit: How many characters it may have.
    """
    if not 1 <= len(name) <= limit or all(unicodedata.category(c) in _INVISIBLE for c in name):
        return f"must be text of 1 to {limit} characters."
    if not all(map(_fits, name)):
        return "must not have control characters, line breaks, or characters that override the direction of writing."
    return None


def shown(text: str, limit: int) -> str:
    """Return text that can stand in a page, a record or a log: of bounded length, and without what does not fit."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return cut if cut.isprintable() else "".join(c if _fits(c) else "\ufffd" for c in cut)


def escaped(text: str) -> str:
    """Return text for one line of a log: what does not fit in it is written as a backslash and its number."""
    if text.isprintable():
        return text
    return "".join(c if _fits(c) else c.encode("unicode_escape").decode() for c in text)


def harmless(text: str) -> str:
    """Return text for a cell of a spreadsheet: what it would run as a formula gets an apostrophe in front."""
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text[:1] in ("\t", "\r", "\n") else text
