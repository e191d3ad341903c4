"""The pages of webhooks: the list with the form for a new one, and each one's settings with its log of deliveries."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

from flask import Blueprint, Response, request

from tasks import app
from tasks.events import TYPES
from tasks.model import InvalidCursor
from tasks.webhooks import service
from tasks.webhooks.deliveries import Delivery
from tasks.webhooks.subscriptions import EVENT_TYPES, MAX_DESCRIPTION, Subscription
from web import webhooks, words
from web.access import needs
from web.problems import Problem
from web.rendering import page, see_other

blueprint = Blueprint("webhooks_page", __name__)

PER_PAGE: Final = 20

#: What the form calls each type of event.
EVENT_TEXT: Final = {f"order.{name}": words.EVENT_TEXT.get(name, name) for name in TYPES}

STATE_TEXT: Final = {"pending": "Waiting", "delivered": "Delivered", "failed": "Failed"}


@blueprint.get("/webhooks")
@needs("order", "operate")
def list_webhooks() -> Response:
    """Show the visitor's webhooks and the form for a new one."""
    return _list()


@blueprint.post("/webhooks")
@needs("order", "operate")
def make_webhook() -> Response:
    """Make a webhook and show its secret, this once."""
    asked = _asked()
    try:
        made, secret = webhooks.make(asked["url"], asked["events"], asked["description"])
    except Problem as problem:
        if problem.kind.slug not in ("invalid-webhook", "too-many-webhooks"):
            raise
        return _list(asked, _errors(problem), status=problem.status)
    return _show(made, secret=secret, status=201)


@blueprint.get("/webhooks/<webhook_id>")
@needs("order", "operate")
def show_webhook(webhook_id: str) -> Response:
    """Show a webhook with the log of its deliveries."""
    return _show(webhooks.find(webhook_id))


@blueprint.post("/webhooks/<webhook_id>")
@needs("order", "operate")
def change_webhook(webhook_id: str) -> Response:
    """Change a webhook."""
    asked = _asked()
    try:
        webhooks.change(webhook_id, **asked)
    except Problem as problem:
        if problem.kind.slug != "invalid-webhook":
            raise
        return _show(webhooks.find(webhook_id), asked=asked, errors=_errors(problem), status=problem.status)
    return see_other(f"/webhooks/{webhook_id}")


@blueprint.post("/webhooks/<webhook_id>/enabled")
@needs("order", "operate")
def switch_webhook(webhook_id: str) -> Response:
    """Have events sent to a webhook, or not."""
    webhooks.switch(webhook_id, on=request.form.get("on") == "1")
    return see_other(f"/webhooks/{webhook_id}")


@blueprint.post("/webhooks/<webhook_id>/secret")
@needs("order", "operate")
def rotate_secret(webhook_id: str) -> Response:
    """Make a new secret and show it, this once."""
    secret = webhooks.rotate(webhook_id)
    return _show(webhooks.find(webhook_id), secret=secret)


@blueprint.post("/webhooks/<webhook_id>/remove")
@needs("order", "operate")
def remove_webhook(webhook_id: str) -> Response:
    """Remove a webhook."""
    webhooks.remove(webhook_id)
    return see_other("/webhooks")


@blueprint.post("/webhooks/<webhook_id>/deliveries/send-failed")
@needs("order", "operate")
def send_failed_deliveries(webhook_id: str) -> Response:
    """Have all deliveries sent once more that have failed."""
    webhooks.send_failed(webhook_id)
    return see_other(f"/webhooks/{webhook_id}#deliveries")


@blueprint.post("/webhooks/<webhook_id>/deliveries/<delivery_id>/send")
@needs("order", "operate")
def send_delivery(webhook_id: str, delivery_id: str) -> Response:
    """Have a delivery sent once more."""
    webhooks.send_again(webhook_id, delivery_id)
    return see_other(f"/webhooks/{webhook_id}#deliveries")


def outcome(one: Delivery) -> str:
    """Return what came of the newest attempt: 200 after 35 ms."""
    if one.reason:
        return f"not sent: {one.reason}"
    last = one.last
    if last is None:
        return "not sent yet"
    return f"{last.status} after {last.milliseconds} ms" if last.status else last.text


def _asked() -> dict[str, Any]:
    chosen = request.form.getlist("event")
    return {
        "url": request.form.get("url", "").strip(),
        # All of them are all that there will ever be.
        "events": [] if set(chosen) == set(EVENT_TYPES) else chosen,
        "description": request.form.get("description", ""),
    }


def _errors(problem: Problem) -> dict[str, str]:
    """Return what is wrong, by control."""
    subject = {"url": "The address", "events": "The events", "description": "The description"}
    named = {each["field"]: f"{subject[each['field']]} {each['problem']}" for each in problem.errors}
    return named or {"": problem.detail}


def _list(
    asked: dict[str, Any] | None = None, errors: dict[str, str] | None = None, status: int = 200
) -> Response:
    before = request.args.get("before") or None
    try:
        shown, following = webhooks.visible(PER_PAGE, before)
    except InvalidCursor:
        raise Problem("not-found", "That page of the list does not exist: begin with the newest.") from None
    return page(
        "webhooks.html",
        status=status,
        webhooks=shown,
        first=before is None,
        following=following,
        failing={one.id: service.health().find(one.id) for one in shown},
        for_all=webhooks.owner() is None,
        asked=asked or {"url": "", "events": [], "description": ""},
        errors=errors or {},
        **_constants(),
    )


def _show(one: Subscription, *, status: int = 200, secret: str | None = None, **context: Any) -> Response:
    before, flaw = webhooks.read_cursor()
    found, following = service.deliveries().page(one.id, PER_PAGE, None if flaw else before)
    asked = {"url": one.url, "events": list(one.events), "description": one.description}
    return page(
        "webhook.html",
        status=status,
        webhook=one,
        failing=service.health().find(one.id),
        secret=secret,
        deliveries=found,
        first=before is None,
        following=following,
        outcome=outcome,
        state_text=STATE_TEXT,
        now=app.now(),
        for_all=one.customer_id is None,
        **{"asked": asked, "errors": {}, **context},
        **_constants(),
    )


def _constants() -> dict[str, Any]:
    return {
        "event_types": EVENT_TYPES,
        "event_text": EVENT_TEXT,
        "host": lambda url: urlsplit(url).netloc,
        "max_description": MAX_DESCRIPTION,
    }
