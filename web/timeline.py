"""An order's timeline: what happened to it, what operators did to it, and what webhooks were told of it.

What happened is the order's own history. Acts are in the audit, deliveries in their log: neither is an event of the
order, so both come and go without it. `version` changes with all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from tasks import app
from tasks.audit import DONE, FAILED, Act
from tasks.erasure_jobs import find_job
from tasks.service import HistoryEntry, Order, waits_for_payment
from tasks.webhooks import service as webhooks
from tasks.webhooks.deliveries import Delivery
from web import words
from web.access import caller
from web.webhooks_page import EVENT_TEXT, outcome
from web.words import HistoryLine

#: How many deliveries are shown; the newest of more.
MOST: Final = 100

#: An act that has no end yet is being carried out, and is not shown before this many milliseconds have passed.
_UNDER_WAY_MS: Final = 60_000

#: What an operator asks for, and the event that says it.
_ASKS_FOR: Final = {
    "order.cancel": "cancel_requested",
    "order.accept": "offer_accepted",
    "order.refund": "refund_requested",
    "order.ship": "shipped",
    "order.return": "return_requested",
}
_NOUN: Final = {
    "order.cancel": "Cancellation",
    "order.accept": "Acceptance of the offer",
    "order.refund": "Refund",
    "order.ship": "Shipment",
    "order.return": "Return",
    "order.redrive": "Next step",
    "order.restore": "Restoring from the archive",
    "webhook.send_again": "Sending again",
    "webhook.send_failed": "Sending again",
}
_DONE_TEXT: Final = {
    "order.redrive": "Next step called again",
    "order.restore": "Restored from the archive",
}
_VIA: Final = {
    "page": "on a page, from",
    "API": "through the API, from",
    "command": "with a command, on",
}
_STATE_TEXT: Final = {
    "pending": "Webhook waits",
    "delivered": "Webhook delivered",
    "failed": "Webhook failed",
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the page of an order shows of its past, oldest first.

    Attributes:
      lines: What happened, and what operators did.
      deliveries: What webhooks were told, the newest `MOST` of it, with who had it sent again.
      told: How many deliveries there are.
      failed: How many of them have failed.
    """

    lines: list[HistoryLine]
    deliveries: list[HistoryLine]
    told: int
    failed: int

    @property
    def left_out(self) -> int:
        """How many deliveries are not shown."""
        return max(0, self.told - MOST)


def version(order: Order) -> str:
    """Return what changes whenever the page of an order does, for who makes this request."""
    parts = [f"{order.revision}{'w' if waits_for_payment(order) else ''}"]
    if _sees_acts():
        parts.append(str(app.audit_log().newest_place("order", order.order_id)))
    if _sees_deliveries():
        parts.append(str(webhooks.deliveries().newest_place(order.order_id)))
    return ".".join(parts)


def timeline_of(order: Order) -> Timeline:
    """Return the timeline of an order, as far as who makes this request may see it."""
    told = sorted(_deliveries(order), key=lambda one: one.last.at if one.last else one.at)
    lines = [*_happened(order, _acts(order)), *_erased(order)]
    sent = [*map(_delivery_line, told[-MOST:]), *_sent_again(told[-MOST:])]
    return Timeline(
        sorted(lines, key=lambda line: line.at),
        sorted(sent, key=lambda line: line.at),
        len(told),
        sum(one.state == "failed" for one in told),
    )


def _sees_acts() -> bool:
    """Whether the visitor is told who did what: that is for operators."""
    return caller().customer_id is None and caller().may("operate")


def _sees_deliveries() -> bool:
    return caller().customer_id is not None or caller().may("operate")


def _acts(order: Order) -> list[Act]:
    return app.audit_log().of("order", order.order_id) if _sees_acts() else []


def _deliveries(order: Order) -> list[Delivery]:
    return webhooks.deliveries_of(order, caller().customer_id) if _sees_deliveries() else []


def _happened(order: Order, acts: list[Act]) -> Iterator[HistoryLine]:
    """Yield what happened, with who asked for it, and the acts of which no event says so."""
    asked = {_said_by(entry): None for entry in order.history}
    made: dict[str, Act] = {}
    for act in acts:
        event = _asked_by(act)
        if act.outcome == DONE and event in asked and event not in made:
            made[event] = act
        elif line := _act_line(act):
            yield line
    for entry, line in zip(order.history, words.history(order), strict=True):
        by = made.get(_said_by(entry))
        yield line if by is None else replace(line, by=_by(by))


def _said_by(entry: HistoryEntry) -> str:
    """Return what tells an event from the others of its order that people ask for."""
    return (
        f"{entry.event}.{entry.detail.get('refund', '')}"
        if entry.event == "refund_requested"
        else entry.event
    )


def _asked_by(act: Act) -> str:
    """Return the event that says what an act asked for; empty when none does."""
    event = _ASKS_FOR.get(act.act, "")
    return f"{event}.{act.detail.get('refund', '')}" if event == "refund_requested" else event


def _act_line(act: Act) -> HistoryLine | None:
    noun = _NOUN.get(act.act, act.act)
    if act.outcome == DONE:
        return _line("act", _DONE_TEXT.get(act.act, f"{noun} asked for again"), "", act)
    if act.outcome == FAILED:
        # The name of the error is for programs.
        return _line("act-failed", f"{noun} refused", act.error.partition(": ")[2] or act.error, act)
    if app.now() - act.at < _UNDER_WAY_MS:
        return None
    return _line("act-failed", f"{noun} cut off", "It was carried out wholly, in part, or not at all.", act)


def _line(event: str, text: str, detail: str, act: Act) -> HistoryLine:
    return HistoryLine(event, text, detail, _moment(act.at), "", by=_by(act))


def _by(act: Act) -> str:
    """Return who did it, and from where: by ann on a page, from 10.0.0.7."""
    if act.kind == "customer":
        return "by the customer"
    via = _VIA.get(act.via, f"by {act.via},")
    place = f"{via} {act.address}" if act.address else via.rpartition(",")[0]
    return f"by {act.who} {place}"


def _erased(order: Order) -> Iterator[HistoryLine]:
    """Yield that the customer was erased, and by whom."""
    if order.customer_id or not _sees_acts():
        return
    noted = app.erased_orders().find(order.order_id)
    job = None if noted is None else find_job(app.erasures_bucket(), noted.certificate)
    if noted is not None:
        at, by = (noted.at, "") if job is None else (job.finished_at or job.at, f"by {job.by}")
        link = "/admin/erasures" if caller().may("admin") else ""
        yield HistoryLine(
            "act", "Customer erased", f"Certificate {noted.certificate}", _moment(at), "", link, by
        )


def _delivery_line(one: Delivery) -> HistoryLine:
    return HistoryLine(
        f"webhook-{one.state}",
        _STATE_TEXT[one.state],
        f"{EVENT_TEXT.get(one.type, one.type)} · {outcome(one)}",
        _moment(one.at if one.last is None else one.last.at),
        "",
        link=f"/webhooks/{one.webhook_id}#{one.id}",
    )


def _sent_again(deliveries: list[Delivery]) -> Iterator[HistoryLine]:
    """Yield who had deliveries sent again."""
    again = [one for one in deliveries if one.run]
    if not again or not _sees_acts():
        return
    for webhook_id in sorted({one.webhook_id for one in again}):
        for act in app.audit_log().of("webhook", webhook_id):
            for one in again:
                named = act.detail.get("delivery") == one.id or act.detail.get("run") == str(one.run)
                if named and one.webhook_id == webhook_id and act.act in _NOUN:
                    text = "Sent again" if act.outcome == DONE else "Sending again failed"
                    yield _line("act", text, EVENT_TEXT.get(one.type, one.type), act)


def _moment(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, UTC)
