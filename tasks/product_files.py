"""Reads products, prices and stock from a CSV file, and imports them.

The first line names the columns: `sku`, and any of `name`, `category`, `price` (12.90), `from` (a day, or a time with
its zone), `add`, `count`, `reason` and `withdraw` (`yes`). An empty cell leaves what there is. Each row is one change
(`tasks.assortment`), made as a whole or not at all. Rows may name the same product again, for instance with the next
price. The pieces of all rows of a product are one change, which the first of them makes.

Before anything is changed, all rows are tried on a copy. If one of them is wrong, none is imported, and everything
that is wrong is named with its line. A row's change has the id of the import and the number of the line, so an import
that was cut off is carried on by doing it again, and no row counts twice. By default the id is the digest of the file.
A product remembers the ids of its newest changes only, so a file has no more rows of one than that. A file that comes
again after as many other changes of a product would count again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from dramatiq.errors import BrokerError

from . import money
from .assortment import (
    MAX_CHANGES,
    Assortment,
    Changed,
    ChangeIdUsed,
    InvalidProduct,
    NoSuchProduct,
    Pieces,
    Wanted,
    check_sku,
    flaws_of_pieces,
)
from .audit import Who
from .catalogue import CURRENCY
from .levels import StockBusy
from .model import Flaw
from .moments import moment_of

COLUMNS: Final = ("sku", "name", "category", "price", "from", "add", "count", "reason", "withdraw")

MAX_BYTES: Final = 1_000_000
MAX_ROWS: Final = 10_000
#: How many errors are named.
MAX_ERRORS: Final = 200

_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,12}", re.ASCII)

#: The columns that `tasks.assortment` calls by another name.
_FIELDS: Final = {"unit_price_minor": "price"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row that could be read: its line, its product, and the change that it is.

    `joined` is the line of the earlier row with which its pieces count, 0 for none.
    """

    line: int
    sku: str
    wanted: Wanted
    joined: int = 0

    @property
    def changes(self) -> bool:
        """Whether it is a change of its own."""
        return self.wanted != Wanted()


@dataclass(frozen=True, slots=True)
class RowError:
    """What is wrong at a line of the file (0: with the file), in which column."""

    line: int
    column: str
    problem: str

    def __str__(self) -> str:
        where = f"line {self.line}, {self.column}" if self.line else self.column
        return f"{where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class RowDone:
    """What a row does, or did: in words, empty for nothing; `repeated` when an earlier import has done it."""

    line: int
    sku: str
    what: str
    repeated: bool = False


class InvalidFile(ValueError):
    """The file cannot be imported; `errors` are what is wrong with it; many are cut."""

    def __init__(self, errors: list[RowError]) -> None:
        super().__init__("\n".join(map(str, errors[:MAX_ERRORS])))
        self.errors = errors[:MAX_ERRORS]


class ProductFile:
    """A file that was read.

    Parameters:
      content: The bytes of the file: UTF-8, comma-separated.
      import_id: Names the import; without one it is the digest of the file.

    Raises:
      InvalidFile: With everything that can be seen to be wrong without looking at the products.
    """

    def __init__(self, content: bytes, import_id: str | None = None) -> None:
        self.id = import_id or hashlib.sha256(content).hexdigest()[:24]
        rows, errors = _read(content)
        self.rows = _joined(rows)
        errors += _too_many(self.rows)
        # What the products make of it is only asked for what can be read.
        self._errors = errors
        if errors and not self.rows:
            raise InvalidFile(errors)

    def plan(self, assortment: Assortment) -> list[RowDone]:
        """Return what an import would do, and change nothing.

        Raises:
          InvalidFile: With everything that is wrong.
        """
        errors, done = list(self._errors), list[RowDone]()
        copies = assortment.look_at({row.sku for row in self.rows})

        def change(row: Row) -> Changed:
            return copies[row.sku].apply(self._id_of(row), row.wanted, "", assortment.now())

        for one in self._each(change):
            if isinstance(one, RowDone):
                done.append(one)
            else:
                errors.append(one)
        if errors:
            raise InvalidFile(sorted(errors, key=lambda error: error.line))
        return done

    def run(self, assortment: Assortment, who: Who) -> Iterator[RowDone | RowError]:
        """Import the rows, one after the other, after a `plan` that found nothing wrong; see `make`."""
        self.plan(assortment)
        yield from self.make(assortment, who)

    def make(self, assortment: Assortment, who: Who) -> Iterator[RowDone | RowError]:
        """Import the rows of a file that was planned; yields each when it is done.

        A row that has become wrong meanwhile, because others changed its product, is left out and yielded as an error.
        When the store goes away, an error of the whole file is the last.
        """
        try:
            yield from self._each(lambda row: assortment.change(row.sku, self._id_of(row), row.wanted, who))
        except (BrokerError, StockBusy) as error:
            yield RowError(
                0, "file", f"was cut off: {error} Import the same file again; no row counts twice."
            )

    def _each(self, change: Callable[[Row], Changed]) -> Iterator[RowDone | RowError]:
        """Make the changes of all rows; yields what came of each."""
        repeated: dict[int, bool] = {}
        for row in self.rows:
            said, again = "", True
            if row.changes:
                try:
                    changed = change(row)
                except (InvalidProduct, NoSuchProduct, ChangeIdUsed) as refusal:
                    yield from _errors_of(row, refusal)
                    continue
                said, again = changed.what, changed.repeated
                repeated[row.line] = again
            if not row.joined:
                yield RowDone(row.line, row.sku, said, again)
            elif row.joined in repeated:
                said = "; ".join(filter(None, (said, f"its pieces count with line {row.joined}")))
                yield RowDone(row.line, row.sku, said, again and repeated[row.joined])
            else:
                yield RowError(row.line, "row", f"counts with line {row.joined}, which is wrong.")

    def _id_of(self, row: Row) -> str:
        return f"{self.id}.{row.line}"


def _joined(rows: list[Row]) -> list[Row]:
    """Return rows in which the first with pieces of a product has the pieces of all its rows."""
    joined: list[Row] = []
    heads: dict[str, int] = {}
    for row in rows:
        wanted = row.wanted
        if wanted.pieces is not None:
            head = joined[heads[row.sku]] if row.sku in heads else None
            if head is None or head.wanted.pieces is None:
                heads[row.sku] = len(joined)
            else:
                pieces = head.wanted.pieces.and_then(wanted.pieces)
                joined[heads[row.sku]] = replace(head, wanted=replace(head.wanted, pieces=pieces))
                row = replace(row, wanted=replace(wanted, pieces=None), joined=head.line)
        joined.append(row)
    return joined


def _too_many(rows: list[Row]) -> Iterator[RowError]:
    """Yield an error for each product whose changes would not all be remembered."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row.sku] += row.changes
        if row.changes and counts[row.sku] == MAX_CHANGES + 1:
            problem = (
                f"is changed by more than {MAX_CHANGES} rows, beside its stock: import them as two files."
            )
            yield RowError(row.line, "sku", problem)


def _errors_of(row: Row, refusal: InvalidProduct | NoSuchProduct | ChangeIdUsed) -> list[RowError]:
    if isinstance(refusal, ChangeIdUsed):
        return [RowError(row.line, "row", "is not what an import with this id had here: give it another id.")]
    if isinstance(refusal, NoSuchProduct):
        return [
            RowError(
                row.line, "sku", f"there is no product {row.sku}, and the row has no name and price for one."
            )
        ]
    return [RowError(row.line, _FIELDS.get(flaw.field, flaw.field), flaw.problem) for flaw in refusal.flaws]


def _read(content: bytes) -> tuple[list[Row], list[RowError]]:
    if len(content) > MAX_BYTES:
        return [], [RowError(0, "file", f"is larger than {MAX_BYTES:,} bytes: split it.")]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return [], [RowError(line, "file", "is not UTF-8: save it as UTF-8.")]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    errors: list[RowError] = []
    columns: list[str] = []
    try:
        columns = [cell.strip().lower() for cell in next(reader, [])]
        errors += _errors_of_header(columns)
        if errors:
            return [], errors
        line = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                row, wrong = _row(line, columns, cells)
                errors += wrong
                rows += [] if row is None else [row]
            line = reader.line_num + 1
            if len(rows) > MAX_ROWS:
                return [], [RowError(line, "file", f"has more than {MAX_ROWS:,} rows: split it.")]
    except csv.Error as error:
        errors.append(RowError(reader.line_num, "file", f"is not CSV: {error}."))
    if not rows and not errors:
        errors.append(RowError(0, "file", "has no rows."))
    return rows, errors


def _errors_of_header(columns: list[str]) -> Iterator[RowError]:
    if "sku" not in columns:
        yield RowError(
            1, "header", f"names no column sku; the columns are {', '.join(COLUMNS)}, separated by commas."
        )
        return
    for column in columns:
        if column not in COLUMNS:
            yield RowError(1, "header", f"names a column {column[:40]!r}; there are {', '.join(COLUMNS)}.")
    for column in COLUMNS:
        if columns.count(column) > 1:
            yield RowError(1, "header", f"names the column {column} twice.")


def _row(line: int, columns: list[str], cells: list[str]) -> tuple[Row | None, list[RowError]]:
    errors: list[RowError] = []
    if len(cells) > len(columns):
        return None, [RowError(line, "row", f"has {len(cells)} cells for {len(columns)} columns.")]
    given = {column: cell.strip() for column, cell in zip(columns, cells, strict=False) if cell.strip()}
    sku = given.pop("sku", "")
    try:
        check_sku(sku)
    except InvalidProduct as refusal:
        errors += [RowError(line, "sku", flaw.problem) for flaw in refusal.flaws]
    wanted = Wanted(name=given.get("name"), category=given.get("category"))
    if "price" in given:
        price = money.from_text(given["price"], CURRENCY)
        if price is None:
            errors.append(
                RowError(line, "price", f"must be an amount such as 12.90, not {given['price'][:40]!r}.")
            )
        wanted = replace(wanted, price=price)
    if "from" in given:
        since = moment_of(given["from"])
        if since is None:
            text = "must be a time with its zone, such as 2026-12-01T08:00:00Z, or a day, such as 2026-12-01."
            errors.append(RowError(line, "from", text))
        elif "price" not in given:
            errors.append(RowError(line, "from", "needs a price that holds from then on."))
        wanted = replace(wanted, since=since)
    if "withdraw" in given:
        if given["withdraw"].lower() != "yes":
            errors.append(RowError(line, "withdraw", "must be yes, or empty."))
        elif given.keys() & {"price", "from"}:
            errors.append(RowError(line, "withdraw", "a row that withdraws a product has no price."))
        wanted = replace(wanted, withdrawn=True)
    wanted, wrong = _with_pieces(line, given, wanted)
    errors += wrong
    if not errors and not given:
        errors.append(RowError(line, "row", "changes nothing."))
    return (None if errors else Row(line, sku, wanted)), errors


def _with_pieces(line: int, given: dict[str, str], wanted: Wanted) -> tuple[Wanted, list[RowError]]:
    numbers: dict[str, int | None] = {"add": None, "count": None}
    errors = []
    for column in sorted(numbers.keys() & given.keys()):
        if _WHOLE.fullmatch(given[column]):
            numbers[column] = int(given[column])
        else:
            errors.append(RowError(line, column, f"must be a whole number, not {given[column][:40]!r}."))
    if numbers.keys() <= given.keys():
        errors.append(RowError(line, "add", "or count must be given, and not both."))
    elif numbers.keys() & given.keys():
        if "count" in given and "reason" not in given:
            errors.append(RowError(line, "reason", "is needed for a count that is corrected."))
        reason = given.get("reason", "restock")
        pieces = Pieces(reason, added=numbers["add"], counted=numbers["count"])
        if not errors:
            errors += [RowError(line, flaw.field, flaw.problem) for flaw in flaws_of_pieces(pieces)]
        wanted = replace(wanted, pieces=pieces)
    elif "reason" in given:
        errors.append(RowError(line, "reason", "is for rows that add or count pieces."))
    return wanted, errors


def as_flaws(error: InvalidFile) -> list[Flaw]:
    """Return the errors of a file as the flaws of a request."""
    return [
        Flaw(f"line {one.line}.{one.column}" if one.line else one.column, one.problem) for one in error.errors
    ]
