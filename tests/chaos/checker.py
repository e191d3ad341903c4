"""Holds the books against each other and says, for each promise, whether it was kept.

Nothing here knows how the service works: only what it promised.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tests.chaos.books import FINAL, Books, Event
from tests.chaos.checks.archive import comes_back, in_stream_or_archive
from tests.chaos.checks.erasure import erased_is_gone
from tests.chaos.checks.figures import figures_agree
from tests.chaos.checks.prices import charged_as_placed
from tests.chaos.checks.webhooks import signed_and_asked_for, told_or_listed
from tests.chaos.verdict import Verdict
from tests.chaos.verdict import verdict as _verdict
from tests.chaos.visitors import PRYING


def check(books: Books) -> list[Verdict]:
    """Return a verdict on every promise."""
    return [
        accepted_is_stored(books),
        accepted_is_this_order(books),
        one_final_status(books),
        one_order_each(books),
        charged_once(books),
        given_back(books),
        back_in_all_books(books),
        carried_out(books),
        stock_conserved(books),
        all_accounted(books),
        nothing_waits(books),
        model_agrees(books),
        ledger_is_shown(books),
        seen_by_its_own(books),
        probes_are_answered(books),
        outages_fail_nothing(books),
        charged_as_placed(books),
        in_stream_or_archive(books),
        comes_back(books),
        erased_is_gone(books),
        told_or_listed(books),
        signed_and_asked_for(books),
        figures_agree(books),
    ]


def accepted_is_stored(books: Books) -> Verdict:
    """Every order that was answered 202, or whose event was acknowledged, is in the stream."""
    accepted = accepted_orders(books)
    stored = {event.order_id for event in books.events if event.name == "created"}
    lost = accepted - stored
    return _verdict("accepted orders are stored", lost, f"{len(accepted)} accepted, {len(lost)} lost")


def accepted_is_this_order(books: Books) -> Verdict:
    """What was answered 202 is the order that was asked for, and its id stands for no other."""
    stored: dict[str, Event] = {}
    for event in sorted(books.events, key=lambda event: event.sequence):
        if event.name == "created":
            stored.setdefault(event.order_id, event)
    wrong = set()
    checked = 0
    for entry in books.log:
        event = stored.get(entry["order_id"]) if entry["accepted"] else None
        if event is not None and "quantities" in entry:
            checked += 1
            asked = (entry["customer_id"], entry["quantities"])
            if asked != (event.customer_id, dict(event.quantities)):
                wrong.add(event.order_id)
    return _verdict(
        "an accepted order is the one that was asked for",
        wrong,
        f"{checked} checked, {len(wrong)} are others",
    )


def one_final_status(books: Books) -> Verdict:
    """Every order in the stream has exactly one final status; of a confirmed one another may follow, as it may."""
    names = _names(books.events)
    none = {order_id for order_id, its in names.items() if not its & FINAL}
    two = {
        order_id
        for order_id, its in names.items()
        if any(its >= pair for pair in _EITHER) or ("returned" in its and "shipped" not in its)
    }
    never = {order_id for order_id, its in names.items() if "created" not in its}
    return _verdict(
        "each order has one final status",
        none | two | never,
        f"{len(names)} orders, {len(none)} without, {len(two)} with two, {len(never)} never created",
    )


#: No order has both of these.
_EITHER = (
    {"confirmed", "rejected"},
    {"cancelled", "rejected"},
    {"cancelled", "shipped"},
    {"shipped", "rejected"},
    {"cancelled", "returned"},
)


def one_order_each(books: Books) -> Verdict:
    """What the client asked for once is one order, however often it asked."""
    asked: defaultdict[str, set[str]] = defaultdict(set)
    requests: defaultdict[str, set[str]] = defaultdict(set)
    for event in books.events:
        if event.name == "created":
            asked[event.customer_id].add(event.order_id)
    for entry in books.log:
        requests[entry["customer_id"]].add(entry["key"])
        if entry["accepted"]:
            asked[entry["customer_id"]].add(entry["order_id"])
    twice = {customer for customer, orders in asked.items() if len(orders) > max(1, len(requests[customer]))}
    repeats = len(books.log) - len({entry["key"] for entry in books.log})
    return _verdict(
        "a request that is repeated is one order",
        twice,
        f"{len(asked)} requests, sent again {repeats} times, {len(twice)} became more than one order",
    )


def charged_once(books: Books) -> Verdict:
    """Every confirmed order has exactly one captured charge of its total, every other none or it was cancelled."""
    confirmed = {event.order_id: event.total for event in books.events if event.name == "confirmed"}
    captured = [charge for charge in books.charges if charge["status"] == "captured"]
    count = Counter(charge["order_id"] for charge in captured)
    uncharged = {order_id for order_id in confirmed if count[order_id] == 0}
    doubly = {order_id for order_id, times in count.items() if times > 1}
    others = set(count) - {
        event.order_id for event in books.events if event.name in ("confirmed", "cancelled")
    }
    wrong = {
        charge["order_id"]
        for charge in captured
        if charge["order_id"] in confirmed and charge["amount"] != confirmed[charge["order_id"]]
    }
    return _verdict(
        "a confirmed order is charged once, no other at all",
        uncharged | doubly | others | wrong,
        f"{len(confirmed)} confirmed, {len(captured)} charges; {len(uncharged)} not charged, {len(doubly)} twice,"
        f" {len(others)} though not confirmed, {len(wrong)} another amount",
    )


def given_back(books: Books) -> Verdict:
    """What was captured and did not go back is what is owed: nothing of what is over, and never less than nothing."""
    left: Counter[str] = Counter()
    for charge in books.charges:
        if charge["status"] == "captured":
            left[charge["order_id"]] += charge["amount"]
    captured = left.total()
    for moved in (*books.refunds, *books.chargebacks):
        left[moved["order_id"]] -= moved["amount"]
    names = _names(books.events)
    over = {order_id for order_id, its in names.items() if its & {"cancelled", "returned", "rejected"}}
    kept = {order_id for order_id in over if left[order_id] > 0}
    below = {order_id for order_id, amount in left.items() if amount < 0}
    return _verdict(
        "captured - refunded - charged back is what is owed",
        kept | below,
        f"{captured} = {left.total()} + {sum(one['amount'] for one in books.refunds)} refunded + "
        f"{sum(one['amount'] for one in books.chargebacks)} charged back; {len(over)} over, "
        f"{len(kept)} of them keep some, {len(below)} below zero",
    )


def back_in_all_books(books: Books) -> Verdict:
    """Gateway, ledger and stream say the same of what went back of each order."""
    gateway: defaultdict[str, dict[str, int]] = defaultdict(dict)
    # A refund has a name of ours, of which its key at the gateway is made.
    amounts: defaultdict[str, list[int]] = defaultdict(list)
    for moved in books.refunds:
        amounts[moved["order_id"]].append(moved["amount"])
    for moved in books.chargebacks:
        gateway[moved["order_id"]][moved["id"]] = moved["amount"]
    refunded, charged_back = _about(books.events, "refunded"), _about(books.events, "charged_back")
    orders = amounts.keys() | gateway.keys() | refunded.keys() | charged_back.keys() | books.decided.keys()
    differ = set()
    for order_id in orders:
        decided = books.decided.get(order_id, {"refunds": {}, "chargebacks": {}})
        same = (
            decided["refunds"] == refunded.get(order_id, {}),
            sorted(decided["refunds"].values()) == sorted(amounts.get(order_id, ())),
            decided["chargebacks"] == charged_back.get(order_id, {}) == gateway.get(order_id, {}),
        )
        if not all(same):
            differ.add(order_id)
    return _verdict(
        "gateway, ledger and stream have the same refunds and chargebacks",
        differ,
        f"{len(books.refunds)} refunds, {len(books.chargebacks)} chargebacks, {len(differ)} orders differ",
    )


#: What an order has in the end for which something was asked and accepted: one of these.
_CARRIED_OUT = {
    "cancel": {"cancelled", "rejected", "shipped"},
    "ship": {"shipped"},
    "back": {"returned"},
    "written_off": {"returned"},
}


def carried_out(books: Books) -> Verdict:
    """What was asked and accepted is done: cancels, shipments, returns, each refund once, each restocking once."""
    names = _names(books.events)
    accepted = [act for act in books.acts if act["accepted"]]
    undone = {
        f"{act['kind']} of {act['order_id']}"
        for act in accepted
        if act["kind"] in _CARRIED_OUT and not names.get(act["order_id"], set()) & _CARRIED_OUT[act["kind"]]
    }
    asked = Counter(act["order_id"] for act in accepted if act["kind"] == "refund")
    requested = Counter(
        event.order_id
        for event in books.events
        if event.name == "refund_requested" and event.about not in ("cancel", "return")
    )
    undone |= {f"refunds of {order_id}" for order_id in asked if requested[order_id] < asked[order_id]}
    times = Counter((sku, key, pieces) for sku, key, pieces in books.adjustments)
    delivered = Counter((sku, pieces) for sku, _, pieces in books.adjustments)
    undone |= {
        f"restocking {act['key']}"
        for act in accepted
        if act["kind"] == "restock" and times[act["sku"], act["key"], act["pieces"]] != 1
    }
    # A new product has one delivery; through the API it has a name that is not the caller's.
    undone |= {
        f"goods {act['key']}"
        for act in accepted
        if act["kind"] == "goods" and delivered[act["sku"], act["pieces"]] != 1
    }
    undone |= {f"{act['kind']} {act['key']}" for act in accepted if _is_unpriced(books, act)}
    kinds = Counter(act["kind"] for act in accepted)
    return _verdict(
        "what was asked and accepted is carried out",
        undone,
        f"{', '.join(f'{count} x {kind}' for kind, count in sorted(kinds.items())) or 'nothing'} accepted, "
        f"{len(undone)} not carried out",
    )


#: By how much clocks and the moments of a change may differ, in milliseconds.
_SLACK_MS = 3_000


def _is_unpriced(books: Books, act: Mapping[str, Any]) -> bool:
    """Whether an act set a price, or withdrew a product, and the product does not know of it."""
    if act["kind"] not in ("price", "withdraw"):
        return False
    first, last = act["asked"] * 1000 - _SLACK_MS, act["at"] * 1000 + _SLACK_MS
    planned = act.get("since")
    return not any(
        amount == act.get("price") and (since == planned if planned else first <= since <= last)
        for since, amount in books.prices.get(act["sku"], ())
    )


def stock_conserved(books: Books) -> Verdict:
    """Stock at the start + adjustments = stock at the end + what confirmed orders took and did not give back."""
    names = _names(books.events)
    back = {event.order_id for event in books.events if event.name == "returned" and event.about == "back"}
    sold: Counter[str] = Counter()
    for order_id, quantities in _taken(books.events).items():
        its = names[order_id]
        if "confirmed" in its and "cancelled" not in its and order_id not in back:
            sold.update(quantities)
    added: Counter[str] = Counter()
    for sku, _, pieces in books.adjustments:
        added[sku] += pieces
    # Of a product that came later there was nothing.
    before = {
        sku: books.stock_before.get(sku, 0) for sku in books.stock_before.keys() | books.stock_after.keys()
    }
    wrong = {
        f"{sku}: {pieces} at the start, {added[sku]} added, {sold[sku]} sold, {books.stock_after.get(sku)} left"
        for sku, pieces in before.items()
        if books.stock_after.get(sku) != pieces + added[sku] - sold[sku]
    }
    negative = {f"{sku}: {left}" for sku, left in books.stock_after.items() if left < 0}
    if not sum(books.stock_before.values()) or not sold.keys() <= before.keys():
        wrong.add("the stock at the start is not known")
    return _verdict(
        "stock at the start = stock at the end + confirmed",
        wrong | negative,
        f"{sum(books.stock_before.values())} + {added.total()} added = {sum(books.stock_after.values())} + "
        f"{sold.total()},"
        f" {len(wrong)} products differ, {len(negative)} negative",
    )


def all_accounted(books: Books) -> Verdict:
    """Finished + failed with a dead letter + waiting = everything that entered."""
    names = _names(books.events)
    entered = accepted_orders(books) | {order_id for order_id, its in names.items() if "created" in its}
    finished = {order_id for order_id in entered if names.get(order_id, set()) & FINAL}
    rest = entered - finished
    waiting, dead = sum(books.queues.values()), len(books.dead)
    missing = max(0, len(rest) - waiting - dead)
    return Verdict(
        "finished + dead letters + waiting = entered",
        missing == 0,
        f"{len(entered)} entered, {len(finished)} finished, {len(rest)} not; {dead} dead letters, {waiting} waiting,"
        f" {missing} nowhere",
        tuple(sorted(rest)) if missing else (),
    )


def nothing_waits(books: Books) -> Verdict:
    """After the time allowed nothing waits any more, and every dead letter was replayed to completion."""
    waiting = {f"{count} in {where}" for where, count in books.queues.items() if count}
    dead = {f"{letter['actor']}: {letter['reason']}: {letter['error']}" for letter in books.dead}
    return _verdict(
        "nothing is stuck",
        waiting | dead,
        f"{sum(books.queues.values())} waiting, {len(books.dead)} dead letters",
    )


def model_agrees(books: Books) -> Verdict:
    """The read model has the events that the stream has."""
    names = _names(books.events)
    differ = {order_id for order_id in names.keys() | books.model.keys() if _differs(books, names, order_id)}
    return _verdict(
        "the read model says what the stream says",
        differ,
        f"{len(books.model)} records, {len(names)} orders, {len(differ)} differ",
    )


#: The states of the ledger that each event reports.
_STATES = {
    "reserved": {"held"},
    "paid": {"paid"},
    "declined": {"declined"},
    "confirmed": {"confirmed"},
    "rejected": {"rejected", "released"},
    "cancelled": {"cancelled"},
    "shipped": {"shipped"},
    "return_requested": {"returning"},
    "returned": {"returned"},
}


#: What is not published any more when the order was cancelled before it could be.
_PASSED_OVER = frozenset({"reserved", "declined"})


def ledger_is_shown(books: Books) -> Verdict:
    """What is shown of an order is what the ledger says: nothing of a stranger's, and no step that was not done."""
    ahead = {
        order_id
        for order_id, names in books.model.items()
        for name in names & _STATES.keys()
        if not _STATES[name] & books.ledger.get(order_id, frozenset())
    }
    names = _names(books.events)
    behind = {
        order_id
        for order_id, states in books.ledger.items()
        if order_id in names
        for name, reported in _STATES.items()
        if name not in _PASSED_OVER and states & reported and name not in names[order_id]
    }
    return _verdict(
        "what is shown is what the ledger says",
        ahead | behind | books.believed,
        f"{len(books.model)} records, {len(ahead)} ahead of the ledger, {len(behind)} whose events are behind it, "
        f"{len(books.believed)} with what was forged",
    )


def seen_by_its_own(books: Books) -> Verdict:
    """A customer sees their own orders alone, and who is not signed in sees none."""
    looks = [visit for visit in books.visits if visit["kind"] == "look"]
    leaks = {
        f"{look['path']} {'for another customer' if look['signed_in'] else 'for a stranger'}"
        for look in looks
        if look["answer"] == 200
        and not (look["signed_in"] and set(look["customers"]) <= {PRYING} and (look["own"] or _is_list(look)))
    }
    hidden = {
        look["path"]
        for look in looks
        if look["signed_in"]
        and look["own"]
        and look["answer"] in (401, 403, 404)
        # What has left for the archive is not shown.
        and not _had_left(books, look)
    }
    return _verdict(
        "a customer sees their own orders, and no others",
        leaks | hidden,
        f"{len(looks)} looks, {len(leaks)} at what was not theirs, {len(hidden)} of their own were hidden",
    )


def _had_left(books: Books, look: Mapping[str, Any]) -> bool:
    left_at = books.whereabouts.left_at.get(look["path"].rpartition("/")[2])
    return left_at is not None and left_at <= look["at"]


def _is_list(look: Mapping[str, Any]) -> bool:
    return bool(look["path"] == "/api/orders")


def probes_are_answered(books: Books) -> Verdict:
    """Slow clients keep no probe from being answered; one that meets a process that was killed is not counted."""
    probes = [visit for visit in books.visits if visit["kind"] == "probe"]
    late = {f"{probe['seconds']:.0f} s" for probe in probes if probe["answer"] == "Timeout"}
    slowest = max((probe["seconds"] for probe in probes), default=0)
    return _verdict(
        "probes are answered beside slow clients",
        late,
        f"{len(probes)} probes, the slowest {slowest:.1f} s, {len(late)} without an answer",
    )


def outages_fail_nothing(books: Books) -> Verdict:
    """While a gateway that is away has its patience, no payment is given up for it."""
    given_up = {event.order_id for event in books.events if "GatewayUnavailable" in event.error}
    return _verdict(
        "an outage of the gateway fails no order before its time",
        given_up if books.patient else set(),
        f"{len(given_up)} payments given up, orders {'wait' if books.patient else 'do not wait'}",
    )


def accepted_orders(books: Books) -> set[str]:
    """Return the orders that the client was told are accepted."""
    return {entry["order_id"] for entry in books.log if entry["accepted"]}


def _differs(books: Books, names: dict[str, set[str]], order_id: str) -> bool:
    return set(books.model.get(order_id, frozenset())) != names.get(order_id, set())


def _names(events: Iterable[Event]) -> dict[str, set[str]]:
    names: defaultdict[str, set[str]] = defaultdict(set)
    for event in events:
        names[event.order_id].add(event.name)
    return dict(names)


def _about(events: Iterable[Event], name: str) -> dict[str, dict[str, int]]:
    """Return the amounts of the events with a name, by order and by what they are about."""
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for event in events:
        if event.name == name:
            found[event.order_id][event.about] = event.total
    return dict(found)


def _taken(events: Iterable[Event]) -> dict[str, dict[str, int]]:
    """Return what each order holds: of the first event with its id, for a second one is no second order."""
    taken: dict[str, dict[str, int]] = {}
    for event in sorted(events, key=lambda event: event.sequence):
        if event.name == "created":
            taken.setdefault(event.order_id, dict(event.quantities))
    return taken
