"""Turns every error of the API into an RFC 9457 problem, and says which kinds of problem there are.

A problem's ``type`` is a link into ``/docs``, where the same table is shown to people, so that a client's
developer who follows it finds what happened and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Response

from tasks.model import Flaw

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Kind:
    """One kind of problem: what it is called, its status, and what a client should do about it."""

    slug: str
    status: int
    title: str
    advice: str


KINDS: dict[str, Kind] = {
    kind.slug: kind
    for kind in (
        Kind("malformed-request", 400, "The request cannot be read", "Correct what detail and errors name."),
        Kind(
            "unauthenticated",
            401,
            "Sign in first",
            "Send a valid API key or token as Authorization: Bearer, or sign in on the pages.",
        ),
        Kind(
            "forbidden",
            403,
            "You may not do this",
            "Ask an operator for a key with the scope that detail names.",
        ),
        Kind("cross-site-request", 403, "The form was sent from another site", "Use this site's own form."),
        Kind("not-found", 404, "There is nothing at this address", "Check the order id or the path."),
        Kind("method-not-allowed", 405, "The method is not allowed here", "Use one from the Allow header."),
        Kind(
            "request-in-progress",
            409,
            "A request with this Idempotency-Key is still being worked on",
            "Send the same request again after Retry-After seconds.",
        ),
        Kind(
            "order-id-taken",
            409,
            "Another order has this id",
            "Choose another order id, or leave it out.",
        ),
        Kind(
            "order-archived",
            409,
            "The order with this id is in the archive",
            "Do not send it again: it was placed. Ask an operator to bring the order back if you need it.",
        ),
        Kind(
            "not-cancellable",
            409,
            "The order cannot be cancelled",
            "Read the order: it is over, or it was shipped and an operator can return it.",
        ),
        Kind(
            "not-offered",
            409,
            "Nothing is offered of the order",
            "Read the order: stock covers it, or its offer was too old, or it was cancelled.",
        ),
        Kind(
            "not-refundable",
            409,
            "That cannot be refunded",
            "Read the order: it was not charged, or less of the charge is left.",
        ),
        Kind(
            "not-shippable",
            409,
            "The order cannot be shipped",
            "Read the order: only what is confirmed is shipped.",
        ),
        Kind(
            "not-returnable",
            409,
            "The order cannot be returned",
            "Read the order: it was not shipped, or its return was decided before.",
        ),
        Kind(
            "not-charged-back",
            409,
            "The charge of this chargeback is not known",
            "Send it again later: the charge may not be known yet, or less of it may be left.",
        ),
        Kind(
            "too-many-webhooks",
            409,
            "No more webhooks are possible",
            "Remove a webhook, or change one.",
        ),
        Kind(
            "webhook-disabled",
            409,
            "The webhook is disabled",
            "Enable it, and ask again.",
        ),
        Kind("too-large", 413, "The request is too large", "Send a smaller order; bodies may have 1 MB."),
        Kind(
            "unsupported-media-type",
            415,
            "The body's type is not supported",
            "Send application/json or application/x-protobuf.",
        ),
        Kind("invalid-webhook", 422, "The webhook is not valid", "Correct the fields named in errors."),
        Kind("invalid-order", 422, "The order is not valid", "Correct the fields named in errors."),
        Kind(
            "invalid-product", 422, "The product is not valid", "Correct the fields or lines named in errors."
        ),
        Kind(
            "idempotency-key-reused",
            422,
            "The Idempotency-Key was used for something else",
            "Use a new one for a new order or change.",
        ),
        Kind(
            "too-many-requests", 429, "Too many requests", "Send the request again after Retry-After seconds."
        ),
        Kind("internal-error", 500, "Something went wrong here", "Try again; tell us if it goes on."),
        Kind(
            "unavailable",
            503,
            "Orders cannot be stored or read right now",
            "Send the same request, with the same Idempotency-Key, after Retry-After seconds.",
        ),
    )
}

# What an HTTP error of the framework is called here; any other client error is a malformed request.
_BY_STATUS = {404: "not-found", 405: "method-not-allowed", 413: "too-large", 415: "unsupported-media-type"}


class Problem(Exception):
    """Raised anywhere in a request to answer with a problem."""

    def __init__(
        self,
        slug: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = KINDS[slug]
        self.status = self.kind.status
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the members of the problem document."""
        body: dict[str, Any] = {
            "type": f"/docs#{self.kind.slug}",
            "title": self.kind.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = [dict(error) for error in self.errors]
        return body

    def response(self) -> Response:
        """Return the problem as the API answers it."""
        return Response(
            json.dumps(self.body(), ensure_ascii=False) + "\n",
            status=self.status,
            content_type=MEDIA_TYPE,
            headers=self.headers,
        )


#: How many of several flaws the detail of a problem names; all are in its errors.
_NAMED = 3


def of_flaws(slug: str, flaws: Sequence[Flaw]) -> Problem:
    """Return the problem of a request with everything that is wrong with it."""
    sentences = [f"{flaw.field} {flaw.problem}" for flaw in flaws[:_NAMED]]
    if len(flaws) > _NAMED:
        sentences.append(f"{len(flaws) - _NAMED} more are in errors.")
    errors = [{"field": flaw.field, "problem": flaw.problem} for flaw in flaws]
    return Problem(slug, " ".join(sentences), errors=errors)


def from_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Problem:
    """Return the problem for an HTTP error that the framework found, keeping its status."""
    slug = _BY_STATUS.get(status, "malformed-request" if status < 500 else "internal-error")
    problem = Problem(slug, detail, headers=headers)
    problem.status = status
    return problem


def unavailable(detail: str, retry_after: int = 2) -> Problem:
    """Return the 503 of a store that does not answer."""
    return Problem("unavailable", detail, headers={"Retry-After": str(retry_after)})
