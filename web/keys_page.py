"""The page on which administrators make, list and revoke API keys; `python -m tasks.keys` does the same."""

from __future__ import annotations

import logging
from typing import Final

from flask import Blueprint, Response, render_template, request

from tasks import app
from tasks.credentials import MAX_DAYS, SCOPES, InvalidCredential
from tasks.numbers import whole_number
from web.access import caller, needs
from web.acts import recorded
from web.problems import Problem

logger = logging.getLogger(__name__)

blueprint = Blueprint("keys_page", __name__)

#: What the form offers; 0 is for ever.
DAYS: Final = {30: "30 days", 90: "90 days", 365: "a year", 0: "until it is revoked"}
_DAY_MS: Final = 86_400_000

#: What a scope is for, in the words of the form.
SCOPE_TEXT: Final = {
    "order": "place orders",
    "read": "see all orders and the metrics",
    "operate": "both, and change orders (cancel, ship, refund), products, stock and webhooks",
    "admin": "everything, this page too",
}


@blueprint.get("/admin/keys")
@needs("admin")
def list_keys() -> Response:
    """Show all keys and the form for a new one."""
    return _page()


@blueprint.post("/admin/keys")
@needs("admin")
def make_key() -> Response:
    """Make a key and show it, this once."""
    days = whole_number(request.form.get("days", "0"), 0, MAX_DAYS)
    if days is None:
        # Not a key that is valid for ever.
        return _page(problem="Choose from the list for how long the key is valid.", status=422)
    expires_at = app.now() + days * _DAY_MS if days else None
    name = request.form.get("name", "").strip()
    try:
        with recorded("key.make", name, scopes=" ".join(request.form.getlist("scope"))) as act:
            key, text = app.keys().add(
                name,
                request.form.getlist("scope"),
                request.form.get("customer_id", "").strip() or None,
                expires_at,
            )
            act.detail["id"] = key.id
    except InvalidCredential as error:
        return _page(problem=str(error), status=422)
    logger.info("%s made key %s for %s: %s", caller().name, key.id, key.name, ", ".join(key.scopes))
    return _page(made=text, name=key.name, status=201)


@blueprint.post("/admin/keys/<key_id>/revoke")
@needs("admin")
def revoke_key(key_id: str) -> Response:
    """End a key."""
    with recorded("key.revoke", key_id):
        if not app.keys().revoke(key_id):
            raise Problem("not-found", "There is no such key.")
    logger.info("%s revoked key %s", caller().name, key_id)
    return Response(status=303, headers={"Location": "/admin/keys"})


def _page(*, status: int = 200, **context: str) -> Response:
    page = render_template(
        "keys.html",
        keys=app.keys().list(),
        now=app.now(),
        scopes=SCOPES,
        scope_text=SCOPE_TEXT,
        days=DAYS,
        **context,
    )
    return Response(page, status, content_type="text/html; charset=utf-8")
