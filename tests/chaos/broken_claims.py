"""A broken build of the front end: an order id is never taken, and an answer that it is there already is believed."""

from __future__ import annotations

from flask import Flask

from tasks import app
from tasks.claims import Claim, Claims
from tasks.orders import Recorded
from web.app import create_app as build

Claims.claim = lambda self, order_id, wanted: (wanted, True)  # type: ignore[method-assign]
_projected = app.project_at


def _believed(sequence: int, claim: Claim | None = None) -> Recorded | None:
    recorded = _projected(sequence, claim)
    happened = app.events_stored().happened_at(sequence)
    return recorded if recorded is not None or happened is None else app.orders_store().recorded(happened)


app.project_at = _believed


def create_app() -> Flask:
    """Return the front end as it is built in this way."""
    return build()
