"""A payment gateway for development and tests, as a process of its own: `python -m tasks.payments_stand_in`.

It behaves as real ones do: `POST /charges` with an `Idempotency-Key` charges once and answers the same for
every repetition; a charge is on disk (SQLite, synchronous=FULL) before it is answered; test tokens are
declined (`tok_declined`, `tok_insufficient`, `tok_expired`).

    GET  /charges      every charge, captured or declined; ?order_id=, ?after= (a row), ?limit=
    POST /refunds      gives back a part of a charge, or all of it; with an Idempotency-Key for each refund
    GET  /refunds      every refund; ?order_id=, ?after=, ?limit=
    POST /chargebacks  has the customer's bank take back a part of a charge; with an Idempotency-Key for each
    GET  /chargebacks  every chargeback; ?order_id=, ?after=, ?limit=
    GET  /knobs        how it misbehaves now
    PUT  /knobs        change that, with the same JSON; members that are left out stay as they are
    GET  /health       200

What is refunded and charged back of a charge is together never more than the charge. The service is told of each
chargeback at PAYMENTS_WEBHOOK_URL, signed with PAYMENTS_WEBHOOK_SECRET by the Standard Webhooks specification, until it
answers with 2xx; an event that was not taken is told again after a restart, too.

The knobs are about what the knob `about` names. They can also be set by environment variables, PAYMENTS_LATENCY_MS and
so on.
"""

from .knobs import Knobs

__all__ = ["Knobs"]
