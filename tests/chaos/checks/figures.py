"""The figures say of all orders together what the read model says of each."""

from __future__ import annotations

from tests.chaos.books import Books
from tests.chaos.verdict import Verdict, verdict


def figures_agree(books: Books) -> Verdict:
    """Each order is counted once, whatever left for the archive, was erased, or was repeated meanwhile."""
    names = books.figures.keys() | books.shown.keys()
    differ = {
        f"{name}: {books.figures.get(name, 0)} counted, {books.shown.get(name, 0)} shown"
        for name in names
        if books.figures.get(name, 0) != books.shown.get(name, 0)
    }
    return verdict(
        "the figures count what the read model shows",
        differ,
        f"{books.figures.get('placed', 0)} orders placed, {books.figures.get('revenue', 0)} confirmed, "
        f"{books.figures.get('refunded', 0)} given back, {len(differ)} differ",
    )
