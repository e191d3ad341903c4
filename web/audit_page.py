"""The audit for administrators: a page with a search, and the API, which exports it as well."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlencode

from flask import Blueprint, Response, current_app, jsonify, request, stream_with_context

from tasks import app
from tasks.audit import COLUMNS, KINDS, Act, InvalidCursor, Sought, row_of
from tasks.events import isoformat
from tasks.model import Flaw
from tasks.numbers import whole_number
from tasks.text import shown
from web.access import needs
from web.export import Exports
from web.problems import of_flaws
from web.queries import DEFAULT_LIMIT, MAX_LIMIT, read_moment
from web.rendering import page

blueprint = Blueprint("audit_page", __name__)

#: Rows of the page.
PER_PAGE: Final = 50

#: What narrows the search, in the order in which an address has it.
FILTERS: Final = ("kind", "act", "target", "who", "text", "since", "until")

FORMATS: Final = {"json": "application/json", "ndjson": "application/x-ndjson", "csv": "text/csv"}

_MAX_FILTER: Final = 200


@blueprint.get("/admin/audit")
@needs("admin")
def show_audit() -> Response:
    """Show acts, newest first, as the filters leave them."""
    sought, flaws = _read()
    before = request.args.get("before") or None
    found = None
    if not flaws:
        try:
            found = app.audit_log().search(sought, PER_PAGE, before)
        except InvalidCursor:
            flaws.append(Flaw("before", ""))
    asked = _asked()
    return page(
        "audit.html",
        status=400 if flaws else 200,
        asked=asked,
        errors={flaw.field: _TEXT[flaw.field] for flaw in flaws},
        found=found,
        first=before is None,
        kinds=KINDS,
        address=lambda **more: f"/admin/audit?{urlencode({**asked, **more})}",
        export=lambda form: f"/api/audit?{urlencode({**asked, 'format': form})}",
    )


_TEXT: Final = {
    "kind": "Choose what was done to from the list.",
    "since": "Choose the first day from the calendar.",
    "until": "Choose the last day from the calendar.",
    "before": "That page does not exist: begin with the newest.",
}


@blueprint.get("/api/audit")
@needs("admin")
def list_audit() -> Response:
    """Answer one page of acts, newest first; or all of them, as NDJSON or CSV, while they are read."""
    sought, flaws = _read()
    form = request.args.get("format") or "json"
    if form not in FORMATS:
        flaws.append(Flaw("format", f"must be one of {', '.join(FORMATS)}."))
    limit = whole_number(request.args.get("limit", str(DEFAULT_LIMIT)), 1, MAX_LIMIT)
    if limit is None:
        flaws.append(Flaw("limit", f"must be a whole number from 1 to {MAX_LIMIT}."))
    if flaws:
        raise of_flaws("malformed-request", flaws)
    if form != "json":
        lines = (_csv if form == "csv" else _ndjson)(app.audit_log().all(sought))
        exports: Exports = current_app.extensions["exports"]
        exports.take()
        response = Response(stream_with_context(lines), mimetype=FORMATS[form])
        response.call_on_close(exports.release)
        response.headers["Content-Disposition"] = f'attachment; filename="audit.{form}"'
        return response
    try:
        found = app.audit_log().search(sought, limit or DEFAULT_LIMIT, request.args.get("before") or None)
    except InvalidCursor:
        flaw = Flaw("before", "must be the next cursor of an earlier page, as it was given.")
        raise of_flaws("malformed-request", [flaw]) from None
    return jsonify({"acts": list(map(_json, found.acts)), "next": found.next})


def _asked() -> dict[str, str]:
    return {name: text for name in FILTERS if (text := request.args.get(name, "").strip())}


def _read() -> tuple[Sought, list[Flaw]]:
    """Return what is asked for, and what is wrong with it."""
    asked, flaws = _asked(), list[Flaw]()
    if "kind" in asked and asked["kind"] not in KINDS:
        flaws.append(Flaw("kind", f"must be one of {', '.join(KINDS)}."))
    texts = {name: shown(text, _MAX_FILTER) for name, text in asked.items() if name not in ("since", "until")}
    since, until = (read_moment(asked, name, flaws) for name in ("since", "until"))
    return Sought(**texts, since=since, until=until), flaws


def _json(act: Act) -> dict[str, Any]:
    said: Mapping[str, Any] = act.to_json()
    return {**said, "at": isoformat(act.at)}


def _ndjson(acts: Iterable[Act]) -> Iterator[str]:
    for act in acts:
        yield f"{json.dumps(_json(act), ensure_ascii=False)}\n"


def _csv(acts: Iterable[Act]) -> Iterator[str]:
    yield _line(COLUMNS)
    for act in acts:
        yield _line(row_of(act, isoformat))


def _line(cells: Iterable[str]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()
