"""Each event that a webhook asked for is delivered or listed as failed, signed, and nothing else is."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from standardwebhooks.webhooks import Webhook

from tests.chaos.books import FORGED, Books, Event
from tests.chaos.checks.erasure import erased_orders
from tests.chaos.verdict import Verdict, verdict

#: Where a delivery comes to its end.
DELIVERED_OR_FAILED = frozenset({"delivered", "failed"})

#: Failures of a step are told apart by the step, and a later one of the same step takes the place of one before.
_ONCE = frozenset({"failed"})

#: How old a signature may be when it comes, in seconds.
_FRESH_SECONDS = 60

#: What tells an event from the others of its order.
Key = tuple[str, str, str]


def told_or_listed(books: Books) -> Verdict:
    """Every event that was asked for was accepted by the receiver, or its delivery is listed as failed."""
    accepted, listed = _accepted(books), _listed(books)
    missing: set[str] = set()
    asked = failed = 0
    for hook in books.webhooks.hooks:
        for key in _wanted(books, hook):
            asked += 1
            if key in accepted[hook["path"]]:
                continue
            failed += 1
            if "failed" not in listed[hook["id"], key[0], key[1]]:
                missing.add(f"{key[1]} of {key[0]} for {hook['path']}")
    by_id = {hook["id"]: hook["path"] for hook in books.webhooks.hooks}
    came = {
        (one["path"], one["headers"].get("webhook-id"))
        for one in books.webhooks.received
        if one["answer"] == 200
    }
    untrue = {
        f"{one['id']} is delivered, says its log"
        for one in books.webhooks.log
        if one["state"] == "delivered"
        and one["webhook_id"] in by_id
        and (by_id[one["webhook_id"]], one["id"]) not in came
    }
    waiting = {
        f"{one['id']} is {one['state']}"
        for one in books.webhooks.log
        if one["state"] not in DELIVERED_OR_FAILED
    }
    return verdict(
        "what a webhook asked for is delivered or listed as failed",
        missing | untrue | waiting,
        f"{asked} asked for, {failed} of them failed, {len(missing)} nowhere, {len(untrue)} not as listed",
    )


def signed_and_asked_for(books: Books) -> Verdict:
    """Every request is signed, repeats itself alone, and is about an event of the ledger that its webhook asked for."""
    by_path = {hook["path"]: hook for hook in books.webhooks.hooks}
    allowed = {path: set(_events_for(books, hook)) for path, hook in by_path.items()}
    bodies: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    wrong: set[str] = set()
    for one in books.webhooks.received:
        hook, name = by_path.get(one["path"]), one["headers"].get("webhook-id", "none")
        if hook is None:
            continue  # the answer that had its secret was lost
        body = base64.b64decode(one["body"])
        bodies[one["path"], name].add(one["body"])
        if not _is_signed(hook, one, body):
            wrong.add(f"{name} has a wrong signature")
            continue
        told = json.loads(body)
        order_id = told["data"]["order_id"]
        # An order of a stranger that breaks no rule of orders is one, and an operator's webhook gets its events.
        if order_id.startswith(FORGED.decode()):
            if hook["customer_id"] is not None or told["type"] not in hook["events"]:
                wrong.add(f"{name} is a stranger's")
            continue
        if FORGED in body:
            wrong.add(f"{name} has what a stranger made up")
        if _key(told) not in allowed[one["path"]] and told["type"] != "order.failed":
            wrong.add(f"{name}: {told['type']} of {order_id} was not asked for")
        placed = books.placed.get(order_id)
        if (
            placed is not None
            and placed.lines
            and told["data"].get("total_minor", placed.total) != placed.total
        ):
            wrong.add(f"{name} has another total")
    wrong |= {f"{name} has two contents" for (_, name), contents in bodies.items() if len(contents) > 1}
    return verdict(
        "webhooks are signed, and nothing comes that was not asked for",
        wrong,
        f"{len(books.webhooks.received)} requests about {len(bodies)} deliveries, {len(wrong)} wrong",
    )


def _wanted(books: Books, hook: Mapping[str, Any]) -> Iterator[Key]:
    """Yield the events that a webhook has to be told of: since it is there, of people who are."""
    erased = erased_orders(books)
    since = (event for event in books.events if event.at > hook["at"] and event.order_id not in erased)
    return (key for key in _events_for(books, hook, since) if key[1].removeprefix("order.") not in _ONCE)


def _events_for(
    books: Books, hook: Mapping[str, Any], events: Iterable[Event] | None = None
) -> Iterator[Key]:
    customer_of = {event.order_id: event.customer_id for event in books.events if event.name == "created"}
    for event in dict.fromkeys(_told(event) for event in (books.events if events is None else events)):
        order_id, event_type, _ = event
        is_theirs = hook["customer_id"] in (None, customer_of.get(order_id))
        if is_theirs and (not hook["events"] or event_type in hook["events"]):
            yield event


def _told(event: Event) -> Key:
    which = event.about if event.name in ("refund_requested", "refunded", "charged_back") else ""
    return event.order_id, f"order.{event.name}", which


def _key(told: Mapping[str, Any]) -> Key:
    detail = told["data"].get("detail", {})
    return told["data"]["order_id"], told["type"], detail.get("refund") or detail.get("chargeback_id") or ""


def _accepted(books: Books) -> Mapping[str, set[Key]]:
    found: defaultdict[str, set[Key]] = defaultdict(set)
    for one in books.webhooks.received:
        if one["answer"] == 200:
            found[one["path"]].add(_key(json.loads(base64.b64decode(one["body"]))))
    return found


def _listed(books: Books) -> Mapping[tuple[str, str, str], set[str]]:
    found: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for one in books.webhooks.log:
        found[one["webhook_id"], one["order_id"], one["type"]].add(one["state"])
    return found


def _is_signed(hook: Mapping[str, Any], one: Mapping[str, Any], body: bytes) -> bool:
    headers = one["headers"]
    try:
        moment = datetime.fromtimestamp(int(headers["webhook-timestamp"]), UTC)
        right = Webhook(hook["secret"]).sign(headers["webhook-id"], moment, body.decode())
    except (KeyError, ValueError):
        return False
    return (
        right in headers.get("webhook-signature", "").split(" ")
        and abs(one["at"] - moment.timestamp()) < _FRESH_SECONDS
    )
