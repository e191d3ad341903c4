"""Draws pages: what every template can use, and the answers that views give."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from flask import Flask, Response, current_app, render_template
from markupsafe import Markup

from web import words
from web.access import visitor
from web.assets import asset_url
from web.formats import formats
from web.problems import Problem
from web.representation import timestamp

# Of how many pieces of a template a part of a page is made that is sent at once.
_PIECES = 50

# What a person is told instead of a problem's detail, which speaks of requests, fields and scopes.
_NOT_OURS = "The address or the form that was sent is not one of this site. Begin again from a page of it."
_FOR_PEOPLE = {
    "malformed-request": _NOT_OURS,
    "method-not-allowed": _NOT_OURS,
    "unsupported-media-type": _NOT_OURS,
    "forbidden": "Your account may not do that. If it should, ask an operator.",
    "request-in-progress": "The same order is being stored right now. Look at your orders in a moment.",
    "too-large": "What was sent is too large. Order fewer products at once.",
}


def helpers() -> dict[str, Any]:
    """Return what every template draws with."""
    written = formats()
    return {
        "asset": asset_url,
        "instant": instant,
        "locale": written.tag,
        "money": written.money,
        "number": written.number,
        "open": current_app.extensions["settings"].access == "open",
        "short": short,
        "status_text": words.STATUS_TEXT,
        "timestamp": timestamp,
        "visitor": visitor,
        "when": written.moment,
    }


def instant(at: int) -> Markup:
    """Return a time in milliseconds as a page shows it; its script turns it into the reader's own zone."""
    moment = datetime.fromtimestamp(at / 1000, UTC)
    return Markup('<time datetime="{}">{}</time>').format(timestamp(moment), formats().moment(moment))


def install(app: Flask) -> None:
    """Give the application's templates what they draw with."""
    app.context_processor(helpers)


def page(template: str, *, status: int = 200, **context: Any) -> Response:
    """Return a page."""
    return Response(render_template(template, **context), status, content_type="text/html; charset=utf-8")


def written_page(template: str, **context: Any) -> Iterator[str]:
    """Yield a page piece by piece, while what it shows is made."""
    current_app.update_template_context(context)
    stream = current_app.jinja_env.get_template(template).stream(context)
    stream.enable_buffering(_PIECES)
    return stream


def json_answer(body: Mapping[str, Any]) -> Response:
    """Return an answer for a script of a page."""
    return Response(json.dumps(body), content_type="application/json")


def see_other(location: str) -> Response:
    """Return the way to another page."""
    return Response(status=303, headers={"Location": location})


def error_page(problem: Problem) -> Response:
    """Return a readable page for a problem."""
    text = _FOR_PEOPLE.get(problem.kind.slug, problem.detail)
    response = page("error.html", status=problem.status, problem=problem, text=text)
    response.headers.extend(problem.headers)
    return response


def short(order_id: str) -> str:
    """Return an order id cut to what tells it from the others in a list."""
    return order_id if len(order_id) <= 14 else f"{order_id[:6]}…{order_id[-6:]}"
