"""Takes what the payment gateway tells by itself: chargebacks, signed by the Standard Webhooks specification.

The signature is the gateway's credential: without `PAYMENT_WEBHOOK_SECRET` nothing is taken. What was told is recorded
before it is answered, once however often it is told. Any other answer than 2xx has the gateway tell it again later,
so a chargeback of a charge that is not known here yet is refused until it is.
"""

from __future__ import annotations

import json
from typing import Any

from flask import Blueprint, Response, current_app, request
from standardwebhooks import Webhook, WebhookVerificationError

from tasks import logs, service
from tasks.events import usable_order_id
from tasks.model import MAX_TEXT, Flaw
from tasks.settings import Settings
from tasks.text import shown
from web.access import anyone
from web.identity import unauthenticated
from web.problems import Problem, of_flaws

blueprint = Blueprint("payments", __name__)

CHARGEBACK = "chargeback.created"


@blueprint.post("/api/payments/events")
@anyone
def payment_event() -> Response:
    """Record what the gateway tells, then answer 204; what is no chargeback is of no interest here."""
    event = _signed_body()
    if event.get("type") != CHARGEBACK:
        return Response(status=204)
    data = event.get("data")
    told = data if isinstance(data, dict) else {}
    if flaws := _flaws(told):
        raise of_flaws("malformed-request", flaws)
    logs.bind(order_id=told["order_id"])
    chargeback = service.Chargeback(
        told["id"], told["amount"], service.now(), shown(str(told.get("reason") or ""), MAX_TEXT)
    )
    try:
        service.charge_back(told["order_id"], told["charge_id"], chargeback)
    except service.NotChargedBack as error:
        raise Problem("not-charged-back", str(error)) from None
    return Response(status=204)


def _signed_body() -> dict[str, Any]:
    """Return the body of a request that the gateway has signed, in the last five minutes."""
    settings: Settings = current_app.extensions["settings"]
    body = request.get_data()
    if not any(_is_signed(secret, body) for secret in settings.payment_webhook_secrets):
        raise unauthenticated("The payment gateway signs what it tells with PAYMENT_WEBHOOK_SECRET.")
    event = json.loads(body)
    if not isinstance(event, dict):
        raise of_flaws("malformed-request", [Flaw("body", "must be a JSON object.")])
    return event


def _is_signed(secret: str, body: bytes) -> bool:
    try:
        Webhook(secret).verify(body, dict(request.headers))
    except (WebhookVerificationError, ValueError, RecursionError):
        # ValueError: a body that is no JSON, a signature that is none.
        return False
    return True


def _flaws(told: dict[str, Any]) -> list[Flaw]:
    flaws = [
        Flaw(f"data.{name}", "must be 1 to 64 letters, digits, '-', '_', '.' or '~'.")
        for name in ("id", "order_id")
        if not isinstance(told.get(name), str) or not usable_order_id(told[name])
    ]
    if not isinstance(told.get("charge_id"), str):
        flaws.append(Flaw("data.charge_id", "must be the id of a charge."))
    amount = told.get("amount")
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount < 2**53:
        flaws.append(Flaw("data.amount", "must be a whole number of minor units, 1 or more."))
    return flaws
