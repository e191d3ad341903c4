"""Every event is in the stream or in the archive, whose sums are right, and orders come back as they left."""

from __future__ import annotations

from tests.chaos.books import Books
from tests.chaos.checks.erasure import erased_orders
from tests.chaos.verdict import Verdict, verdict


def in_stream_or_archive(books: Books) -> Verdict:
    """No event is in neither, none was changed but for an erasure, and no file is damaged."""
    where, erased = books.whereabouts, erased_orders(books)
    order_of = {event.sequence: event.order_id for event in books.events}
    missing = {
        f"event {place} of {order_of.get(place)}"
        for place, data in where.published.items()
        if order_of.get(place) not in erased
        and data not in (where.stream.get(place), where.archive.get(place))
    }
    both = len(where.stream.keys() & where.archive.keys() & where.published.keys())
    archived = len(where.archive.keys() & where.published.keys())
    return verdict(
        "every event is in the stream or in the archive",
        missing | set(where.damage),
        f"{len(where.published)} events, {archived} in the archive, {both} in both, {len(missing)} in neither; "
        f"{where.orders} orders archived, {len(where.damage)} files damaged",
    )


def comes_back(books: Books) -> Verdict:
    """What is restored is what was archived, and the read model made again from both is the same."""
    otherwise = books.whereabouts.otherwise
    return verdict(
        "what comes back from the archive is what left",
        otherwise,
        f"{books.whereabouts.orders} orders brought back, {len(otherwise)} are otherwise",
    )
