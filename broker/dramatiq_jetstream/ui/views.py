"""The pages: what each shows, from what was asked. A view returns what its template needs, or an answer."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from werkzeug.exceptions import Forbidden, NotFound
from werkzeug.wrappers import Response

from dramatiq_jetstream import audit as audits
from dramatiq_jetstream.activity import Minute, percentile
from dramatiq_jetstream.dead_letters import REASONS
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.history import OUTCOMES, Record
from dramatiq_jetstream.sending import delays
from dramatiq_jetstream.sending.fitting import fields_of

from .asking import Asked
from .changes import ACTIONS
from .charts import chart, sparkline
from .letter_changes import letter_filter
from .text import duration, number
from .tokens import check_token, give_token, refuse_cross_site

__all__ = ["VIEWS"]

#: Rows of a page.
ROWS: Final = 50
WORKER_ROWS: Final = 100

#: Characters of a body that a page shows.
MAX_BODY: Final = 20_000

#: How far back a search looks, in milliseconds, by what the page calls it.
WITHIN: Final[Mapping[str, int]] = {
    "15 minutes": 900_000,
    "hour": 3_600_000,
    "day": 86_400_000,
    "week": 604_800_000,
}

#: What tells where an event that a message carries stands.
_PLACE: Final = frozenset({"subject", "stream", "sequence"})

T = TypeVar("T")
View = Callable[..., Mapping[str, Any] | Response]


def _page(asked: Asked, rows: Sequence[T], size: int) -> dict[str, Any]:
    """One page of rows that were all read: `rows`, and what its links need."""
    text = asked.get("page")
    last = max(1, -(-len(rows) // size))
    number = min(max(1, int(text)), last) if text.isdecimal() and len(text) < 6 else 1
    return {
        "rows": rows[(number - 1) * size : number * size],
        "page": number,
        "pages": last,
        "total": len(rows),
    }


def overview(asked: Asked) -> Mapping[str, Any]:
    """Each queue with its counts, and the fleet as a whole."""
    queues, workers = asked.reader.queues(), asked.reader.workers()
    served = {name: sum(name in worker.queues for worker in workers) for name in asked.reader.queue_names()}
    return {
        "queues": queues,
        "served": served,
        **_hour(asked.reader.activity()),
        "workers": len(workers),
        "threads": sum(worker.threads for worker in workers),
        "running": sum(len(worker.running) for worker in workers),
        "totals": {
            name: sum(getattr(queue, name) for queue in queues)
            for name in ("ready", "in_flight", "delayed", "dead")
        },
    }


def _hour(minutes: Sequence[Minute]) -> dict[str, Any]:
    """The charts of the last hour, and for each queue a line and what it did in the last full minutes."""
    now = int(time.time() // 60) * 60_000
    places = [now - 60_000 * back for back in range(59, -1, -1)]
    by_minute: dict[int, list[Minute]] = {}
    for each in minutes:
        by_minute.setdefault(each.at, []).append(each)

    def of_queue(queue: str) -> dict[str, Any]:
        mine = {each.at: each for each in minutes if each.queue == queue}
        done = [mine[at].done if at in mine else 0 for at in places]
        times, waits = (_added([getattr(each, name) for each in mine.values()]) for name in ("ran", "waited"))
        recent = sum(done[-6:-1]) / 5
        return {
            "spark": sparkline(f"Up to {max(done):,} attempts a minute in the last hour", done),
            "rate": recent,
            "failed": sum(each.failed for each in mine.values()),
            "ran": percentile(times, 0.95),
            "waited": percentile(waits, 0.95),
        }

    def line(name: str, share: float) -> list[float | None]:
        return [
            percentile(_added([getattr(each, name) for each in by_minute.get(at, [])]), share)
            for at in places
        ]

    done = [float(sum(each.done for each in by_minute.get(at, []))) for at in places]
    failed = [float(sum(each.failed for each in by_minute.get(at, []))) for at in places]
    total, lost = int(sum(done)), int(sum(failed))
    return {
        "hour": {
            "done": total,
            "failed": lost,
            "throughput": chart(
                f"{total:,} attempts ended in the last hour", [("done", done)], number, bars=True
            ),
            "failures": chart(
                f"{lost:,} attempts failed in the last hour", [("failed", failed)], number, bars=True
            ),
            "waits": chart(
                "How long messages were ready before they began, median and 95th percentile",
                [("p95", line("waited", 0.95)), ("p50", line("waited", 0.5))],
                duration,
            ),
            "runs": chart(
                "How long attempts ran, median and 95th percentile",
                [("p95", line("ran", 0.95)), ("p50", line("ran", 0.5))],
                duration,
            ),
        },
        "did": {queue: of_queue(queue) for queue in {each.queue for each in minutes}},
    }


def _added(counts: Sequence[Mapping[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for each in counts:
        total.update(each)
    return total


def workers(asked: Asked) -> Mapping[str, Any]:
    """The processes that are alive."""
    found = asked.reader.workers()
    hosts = len({worker.host for worker in found})
    return {
        **_page(asked, found, WORKER_ROWS),
        "hosts": hosts,
        "threads": sum(each.threads for each in found),
    }


def running(asked: Asked) -> Mapping[str, Any]:
    """What is being worked on, the longest first."""
    queue, actor = asked.get("queue"), asked.get("actor")
    found = [
        here
        for here in asked.reader.running()
        if (not queue or here.message.queue == queue) and (not actor or here.message.actor == actor)
    ]
    return {
        **_page(asked, found, ROWS),
        "queue": queue,
        "actor": actor,
        "queues": asked.reader.queue_names(),
    }


def delayed(asked: Asked) -> Mapping[str, Any]:
    """What waits for its time, the next due first."""
    names = asked.reader.queue_names()
    queue = asked.get("queue")
    counts = {stats.queue: stats.delayed for stats in asked.reader.queues()}
    wanted = [queue] if queue in names else [name for name in names if counts.get(name)]
    found = sorted(
        (each for name in wanted for each in asked.reader.delayed(name)), key=lambda each: each.eta
    )
    there = sum(counts.get(name, 0) for name in wanted)
    return {**_page(asked, found, ROWS), "queue": queue, "queues": names, "there": max(there, len(found))}


def schedules(asked: Asked) -> Mapping[str, Any]:
    """The periodic actors: when they ran and will run."""
    return _page(asked, asked.reader.schedules(), ROWS)


def dead(asked: Asked) -> Mapping[str, Any]:
    """Dead letters, newest first, as the filters leave them."""
    fields = {name: [asked.get(name)] for name in ("queue", "actor", "reason", "text")}
    queue, matches = letter_filter(fields)
    before = asked.get("before")
    if before and not before.isdecimal():
        raise NotFound(f"{before!r} is no place in the list of dead letters.")
    found = asked.reader.dead(matches, queue=queue, before=before or None, limit=ROWS)
    return {
        "found": found,
        "before": before,
        "total": asked.broker.dead_letters.count(queue),
        "filters": {name: values[0] for name, values in fields.items()},
        "queues": asked.reader.queue_names(),
        "reasons": REASONS,
    }


def letter(asked: Asked, letter: str) -> Mapping[str, Any]:
    """One dead letter: its cause, its attempts and what it says."""
    if not letter.isdecimal():
        raise NotFound(f"There is no dead letter {letter!r}.")
    found = asked.broker.dead_letters.get(letter)
    if found is None:
        raise NotFound(f"There is no dead letter {letter}: it was replayed, dropped, or kept for its time.")
    body = found.data.decode("utf-8", "backslashreplace")
    return {
        "letter": found,
        "attempts": [Record.decode(json.dumps(dict(attempt)).encode()) for attempt in found.attempts],
        "body": body[:MAX_BODY],
        "is_cut": len(body) > MAX_BODY,
        **_said(fields_of(found.data, found.headers), found.headers),
    }


def _said(fields: Mapping[str, Any] | None, headers: Mapping[str, str]) -> dict[str, Any]:
    """What a message says of itself and of what it belongs to, as far as its bytes are JSON."""
    fields = fields or {}
    options = fields.get("options")
    options = options if isinstance(options, dict) else {}
    group, then, event = (options.get(name) for name in ("group_info", "pipe_target", "event"))
    return {
        "said": fields,
        "group": group.get("group_id") if isinstance(group, dict) else None,
        "then": then if isinstance(then, dict) else None,
        "event": event if isinstance(event, dict) and event.keys() >= _PLACE else None,
        "traceparent": headers.get("traceparent", ""),
    }


def messages(asked: Asked) -> Mapping[str, Any] | Response:
    """What became of messages, newest first, as the filters leave it."""
    if message := asked.get("message"):
        return Response(status=303, headers={"Location": asked.url("message", message=message)})
    filters = {name: asked.get(name) for name in ("actor", "queue", "outcome", "within", "error")}
    if filters["outcome"] and filters["outcome"] not in OUTCOMES:
        raise NotFound(f"There is no outcome {filters['outcome']!r}.")
    since = WITHIN.get(filters["within"])
    cursor = asked.get("cursor")
    found = asked.broker.history.search(
        actor=filters["actor"] or None,
        queue=filters["queue"] or None,
        outcome=filters["outcome"] or None,
        since=None if since is None else int(time.time() * 1_000) - since,
        error=filters["error"] or None,
        limit=ROWS,
        cursor=cursor or None,
    )
    return {
        "found": found,
        "cursor": cursor,
        "filters": filters,
        "queues": asked.reader.queue_names(),
        "outcomes": OUTCOMES,
        "within": list(WITHIN),
    }


def message(asked: Asked, message: str) -> Mapping[str, Any]:
    """One message: its state, every attempt, and what it belongs to."""
    broker = asked.broker
    status = broker.status(message)
    fields, headers = None, dict[str, str]()
    if status.letter is not None:
        if (letter := broker.dead_letters.get(status.letter)) is not None:
            fields, headers = fields_of(letter.data, letter.headers), dict(letter.headers)
    elif status.due is not None and status.queue is not None:
        stored = delays.waiting(broker.connection, broker.names, status.queue, message)
        if stored is not None:
            fields, headers = fields_of(stored.data, stored.headers), dict(stored.headers)
    attempts = broker.history.of(message)[::-1]
    return {
        "message": message,
        "status": status,
        "attempts": attempts,
        "trace_id": next((each.trace_id for each in attempts if each.trace_id), ""),
        "arguments": next((each.arguments for each in attempts if each.arguments), ""),
        **_said(fields, headers),
    }


def limits(asked: Asked) -> Mapping[str, Any]:
    """What limiters and barriers hold now."""
    return _page(asked, asked.reader.limits(), ROWS)


def audit(asked: Asked) -> Mapping[str, Any]:
    """Who changed what."""
    return {"rows": asked.reader.audit(ROWS)}


def change(asked: Asked, action: str) -> Mapping[str, Any] | Response:
    """Show what a change would do, or make it."""
    chosen = ACTIONS.get(action)
    if chosen is None:
        raise NotFound
    if chosen.permission not in asked.person.may:
        raise Forbidden(
            f"{asked.person.name} may not do that: it needs the permission {chosen.permission!r}."
        )
    is_post = asked.request.method == "POST"
    if is_post:
        refuse_cross_site(asked.request)
    source = asked.request.form if is_post else asked.request.args
    fields = {name: source.getlist(name) for name in chosen.fields if source.getlist(name)}
    if is_post:
        check_token(asked.request, asked.person, action, fields)
    plan = chosen.plan(asked.reader, fields)
    if is_post:
        return _make(asked, action, plan)
    fields = {**fields, **plan.fixed}
    token, keep = give_token(asked.request, asked.person, action, fields)
    endpoint, filters = plan.back
    context = {
        "plan": plan,
        "action": action,
        "fields": [(name, value) for name, values in fields.items() for value in values],
        "token": token,
        "back": asked.url(endpoint, **filters),
    }
    return {**context, "keep": keep}


def _make(asked: Asked, action: str, plan: Any) -> Response:
    broker, name = asked.broker, asked.person.name
    try:
        with audits.record(broker, who=name, what=action, target=plan.target, planned=plan.count) as made:
            plan.make(made)
    except InvalidOption as error:
        raise Forbidden(f"Nothing was changed: {error}") from None
    finally:
        asked.reader.forget()
    endpoint, filters = plan.back
    location = asked.url("changed", change=made.id, to=endpoint, **filters)
    return Response(status=303, headers={"Location": location})


def changed(asked: Asked, change: str) -> Mapping[str, Any]:
    """What became of a change."""
    found = audits.find(asked.broker, change)
    if found is None:
        raise NotFound(f"There is no record of a change {change!r}.")
    endpoint = asked.get("to")
    filters = {name: asked.get(name) for name in ("queue", "actor", "reason", "text")}
    back = asked.url(endpoint if endpoint in VIEWS and endpoint in _LISTS else "overview", **filters)
    return {"found": found, "back": back, "filters": filters}


_LISTS: Final = frozenset(
    {"overview", "workers", "running", "messages", "delayed", "schedules", "dead", "limits", "audit"}
)

VIEWS: Final[Mapping[str, View]] = {
    "overview": overview,
    "workers": workers,
    "running": running,
    "messages": messages,
    "message": message,
    "delayed": delayed,
    "schedules": schedules,
    "dead": dead,
    "letter": letter,
    "limits": limits,
    "audit": audit,
    "change": change,
    "changed": changed,
}
