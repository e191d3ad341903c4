"""The API of webhooks: a customer's for their own orders, an operator's for all.

Both ways to them, this one and the pages (`web.webhooks_page`), come through the functions at the end: they say who may
see and change which webhook. Another customer's webhook is one that does not exist.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

from flask import Blueprint, Response, jsonify, request

from tasks import app
from tasks.events import isoformat
from tasks.model import Flaw, InvalidCursor
from tasks.numbers import whole_number
from tasks.webhooks import service
from tasks.webhooks.actors import send_failed_webhooks
from tasks.webhooks.addresses import MAX_URL
from tasks.webhooks.deliveries import Attempt, Delivery, is_delivery_id
from tasks.webhooks.health import Failing
from tasks.webhooks.subscriptions import InvalidWebhook, Subscription, TooManyWebhooks
from web.access import caller, needs
from web.acts import recorded
from web.problems import Problem, of_flaws

blueprint = Blueprint("webhooks", __name__)

DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 100

_LIMIT_PROBLEM: Final = f"must be a whole number from 1 to {MAX_LIMIT}."
_CURSOR_PROBLEM: Final = "must be the next cursor of an earlier page, as it was given."

#: What may be said of a webhook, with the kind of each.
_MEMBERS: Final[dict[str, tuple[type, str]]] = {
    "url": (str, f"must be text of 1 to {MAX_URL} characters."),
    "events": (list, "must be a list of types of events; an empty one means all."),
    "description": (str, "must be text."),
    "enabled": (bool, "must be true or false."),
}


@blueprint.get("/api/webhooks")
@needs("order", "operate")
def list_webhooks() -> Response:
    """Answer one page of the webhooks that the caller may see, newest first."""
    limit, flaws = _limit(), list[Flaw]()
    if limit is None:
        flaws.append(Flaw("limit", _LIMIT_PROBLEM))
    found: list[Subscription] = []
    following = None
    try:
        found, following = visible(limit or DEFAULT_LIMIT, request.args.get("before") or None)
    except InvalidCursor:
        flaws.append(Flaw("before", _CURSOR_PROBLEM))
    if flaws:
        raise of_flaws("malformed-request", flaws)
    return jsonify({"webhooks": [webhook_json(one) for one in found], "next": following})


@blueprint.post("/api/webhooks")
@needs("order", "operate")
def make_webhook() -> Response:
    """Make a webhook and answer it with its secret, this once."""
    body = _body("url", "events", "description")
    if "url" not in body:
        raise of_flaws("malformed-request", [Flaw("url", "must say where events are sent.")])
    made, secret = make(body["url"], body.get("events", []), body.get("description", ""))
    response = jsonify({**webhook_json(made), "secret": secret})
    response.status_code = 201
    response.headers["Location"] = f"/api/webhooks/{made.id}"
    return response


@blueprint.get("/api/webhooks/<webhook_id>")
@needs("order", "operate")
def show_webhook(webhook_id: str) -> Response:
    """Answer one webhook."""
    return jsonify(webhook_json(find(webhook_id)))


@blueprint.patch("/api/webhooks/<webhook_id>")
@needs("order", "operate")
def change_webhook(webhook_id: str) -> Response:
    """Change a webhook, or switch it off and on."""
    find(webhook_id)
    body = _body(*_MEMBERS)
    enabled = body.pop("enabled", None)
    if body:
        change(webhook_id, **body)
    if enabled is not None:
        switch(webhook_id, on=enabled)
    return jsonify(webhook_json(find(webhook_id)))


@blueprint.delete("/api/webhooks/<webhook_id>")
@needs("order", "operate")
def remove_webhook(webhook_id: str) -> Response:
    """Remove a webhook."""
    remove(webhook_id)
    return Response(status=204)


@blueprint.post("/api/webhooks/<webhook_id>/secret")
@needs("order", "operate")
def rotate_secret(webhook_id: str) -> Response:
    """Make a new secret and answer it, this once."""
    return jsonify({"secret": rotate(webhook_id)})


@blueprint.get("/api/webhooks/<webhook_id>/deliveries")
@needs("order", "operate")
def list_deliveries(webhook_id: str) -> Response:
    """Answer one page of the log, what changed last first."""
    one = find(webhook_id)
    flaws = []
    limit = _limit()
    if limit is None:
        flaws.append(Flaw("limit", _LIMIT_PROBLEM))
    before, flaw = read_cursor()
    if flaw is not None:
        flaws.append(flaw)
    if limit is None or flaws:
        raise of_flaws("malformed-request", flaws)
    page, following = service.deliveries().page(one.id, limit, before)
    cursor = None if following is None else str(following)
    return jsonify({"deliveries": [delivery_json(each) for each in page], "next": cursor})


@blueprint.post("/api/webhooks/<webhook_id>/deliveries/send-failed")
@needs("order", "operate")
def send_failed_deliveries(webhook_id: str) -> Response:
    """Have all deliveries sent once more that have failed, then answer 202."""
    response = jsonify({"run": send_failed(webhook_id)})
    response.status_code = 202
    return response


@blueprint.post("/api/webhooks/<webhook_id>/deliveries/<delivery_id>/send")
@needs("order", "operate")
def send_delivery(webhook_id: str, delivery_id: str) -> Response:
    """Have a delivery sent once more, then answer 202."""
    response = jsonify(delivery_json(send_again(webhook_id, delivery_id)))
    response.status_code = 202
    return response


# What the API and the pages share


def owner() -> str | None:
    """Return whose webhooks the caller makes: one customer's, or None for an operator's.

    Raises:
      Problem: For one who is neither.
    """
    who = caller()
    if who.customer_id is None and not who.may("operate"):
        raise Problem("forbidden", "Webhooks for all orders need the scope operate.")
    return who.customer_id


def visible(limit: int, before: str | None) -> tuple[list[Subscription], str | None]:
    """Return a page of the webhooks that the caller may see, their own, or all for an operator; and the next cursor.

    Raises:
      InvalidCursor: When `before` is none.
    """
    return service.subscriptions().page(limit, before, owner())


def find(webhook_id: str) -> Subscription:
    """Return a webhook if the caller may see it, or raise the 404 problem, which says the same for both reasons."""
    mine = owner()
    found = service.subscriptions().find(webhook_id) if is_webhook_id(webhook_id) else None
    if found is None or (mine is not None and found.customer_id != mine):
        raise Problem("not-found", f"There is no webhook {webhook_id[:64]!r}.")
    return found


def is_webhook_id(text: str) -> bool:
    """Whether a webhook can have this id."""
    return text.startswith("wh_") and len(text) == 23 and text[3:].isalnum() and text.isascii()


def make(url: str, events: list[str], description: str) -> tuple[Subscription, str]:
    """Make a webhook for the caller; returns it and its secret."""
    who = caller()
    mine = owner()
    try:
        with recorded("webhook.make", "") as act:
            made, secret = service.subscriptions().add(url, events, description, mine, who.name)
            act.detail["id"] = made.id
    except InvalidWebhook as error:
        _refuse(error)
    except TooManyWebhooks as error:
        raise Problem("too-many-webhooks", str(error)) from None
    return made, secret


def change(webhook_id: str, **changes: Any) -> None:
    """Change what a webhook is."""
    one = find(webhook_id)
    try:
        with recorded("webhook.change", one.id, members=" ".join(changes)):
            service.subscriptions().change(one.id, **changes)
    except InvalidWebhook as error:
        _refuse(error)


def switch(webhook_id: str, *, on: bool) -> None:
    """Have events sent to a webhook, or not."""
    one = find(webhook_id)
    with recorded("webhook.enable" if on else "webhook.disable", one.id):
        if on:
            service.health().recovered(one.id)
            service.subscriptions().enable(one.id)
        else:
            service.subscriptions().disable(one.id)


def remove(webhook_id: str) -> None:
    """Remove a webhook."""
    one = find(webhook_id)
    with recorded("webhook.remove", one.id):
        service.subscriptions().remove(one.id)


def rotate(webhook_id: str) -> str:
    """Make a new secret for a webhook; returns it."""
    one = find(webhook_id)
    with recorded("webhook.rotate", one.id):
        secret = service.subscriptions().rotate(one.id)
    if secret is None:
        raise Problem("not-found", f"There is no webhook {one.id!r}.")
    return secret


def send_again(webhook_id: str, delivery_id: str) -> Delivery:
    """Have a delivery sent once more; returns it."""
    one = find(webhook_id)
    if not one.is_active:
        raise Problem("webhook-disabled", "The webhook is disabled: enable it first.")
    if not is_delivery_id(delivery_id) or service.deliveries().find(one.id, delivery_id) is None:
        raise Problem("not-found", f"There is no delivery {delivery_id[:64]!r}.")
    with recorded("webhook.send_again", one.id, delivery=delivery_id):
        begun = service.send_again(one, delivery_id)
    if begun is None:
        raise Problem("not-found", f"There is no delivery {delivery_id!r}.")
    return begun


def send_failed(webhook_id: str) -> int:
    """Have all deliveries of a webhook sent once more that have failed; returns the number of their run."""
    one = find(webhook_id)
    if not one.is_active:
        raise Problem("webhook-disabled", "The webhook is disabled: enable it first.")
    run = app.now()
    with recorded("webhook.send_failed", one.id, run=str(run)):
        send_failed_webhooks.send(one.id, run)
    return run


def _limit() -> int | None:
    return whole_number(request.args.get("limit", str(DEFAULT_LIMIT)), 1, MAX_LIMIT)


def read_cursor() -> tuple[int | None, Flaw | None]:
    """Return the cursor of the query, and what is wrong with it."""
    given = request.args.get("before") or None
    before = None if given is None else whole_number(given, 0, 2**63 - 1)
    if given is not None and before is None:
        return None, Flaw("before", _CURSOR_PROBLEM)
    return before, None


def webhook_json(one: Subscription) -> dict[str, Any]:
    """Return a webhook as the API answers it."""
    body: dict[str, Any] = {
        "id": one.id,
        "url": one.url,
        "events": list(one.events),
        "description": one.description,
        "customer_id": one.customer_id,
        "enabled": one.is_active,
        "created_at": isoformat(one.created_at),
    }
    if one.reason:
        body["disabled_because"] = one.reason
    failing: Failing | None = service.health().find(one.id)
    if failing is not None:
        body["failing"] = {
            "since": isoformat(failing.since),
            "failures": failing.failures,
            "error": failing.error,
        }
    return body


def delivery_json(one: Delivery) -> dict[str, Any]:
    """Return a delivery as the API answers it."""
    body: dict[str, Any] = {
        "id": one.id,
        "order_id": one.order_id,
        "type": one.type,
        "at": isoformat(one.at),
        "state": one.state,
        "attempts": [_attempt_json(each) for each in one.attempts],
    }
    if one.reason:
        body["reason"] = one.reason
    if one.state == "pending" and one.next_at:
        body["next_at"] = isoformat(one.next_at)
    return body


def _attempt_json(one: Attempt) -> dict[str, Any]:
    return {
        "at": isoformat(one.at),
        "milliseconds": one.milliseconds,
        "status": one.status or None,
        "answer": one.text,
    }


def _body(*allowed: str) -> dict[str, Any]:
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise of_flaws("malformed-request", [Flaw("body", "must be a JSON object.")])
    flaws = [
        Flaw(name, problem)
        for name, (kind, problem) in _MEMBERS.items()
        if name in body and not (name in allowed and isinstance(body[name], kind))
    ]
    if not flaws and not all(isinstance(each, str) for each in body.get("events", [])):
        flaws = [Flaw("events", _MEMBERS["events"][1])]
    if flaws:
        raise of_flaws("malformed-request", flaws)
    return {name: body[name] for name in allowed if name in body}


def _refuse(error: InvalidWebhook) -> NoReturn:
    raise of_flaws("invalid-webhook", [Flaw(error.field, str(error))]) from None
