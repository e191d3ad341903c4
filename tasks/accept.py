"""Accepts an order: claims its id, has JetStream store its event, and makes it readable before the client is told.

    claim the Idempotency-Key → claim the order's id with its content → keep the payment token → publish
    → add to the read model → 202

The claim is made once (`tasks.claims`), so an id stands for one content whatever else a
request says, and another order under it is refused. What is published is what was claimed. The event is read
back from its place in the stream, as a worker would read it, so an order that was accepted is in the stream and
is found. Its event says that this is done here (`tasks.events.CARRIED_ON`), so workers leave the read model to it.

A request that dies between two of these steps, or whose answer gets lost, has told its client nothing. The same
request, sent again, does every step again: the claim is there with the same content, the event has the same id and
bytes, and the read model has the event once.

The claim of an archived order no longer says for what it stands, so that an erasure need not look for it. Every request
under that id is told that its order was placed and archived, and places none.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Final, Protocol, TypeVar

from dramatiq_jetstream.errors import StoreTimeout

from . import rules
from .announcements import placed_event
from .claims import Claim, Claims, digest_of
from .events import CARRIED_ON
from .idempotency import Requests
from .model import AcceptedOrder, InvalidOrder, Order, OrderArchived, OrderIdTaken, OrderRequest
from .orders import Recorded
from .ports import Publisher
from .pricing import claim_of
from .products import Catalogue, Offered
from .tokens import Tokens, reference

#: The least time that a publish gets, in milliseconds.
_LEAST: Final = 200

#: The fields that are right or wrong by what is offered.
_OFFERED: Final = re.compile(r"\.sku$|\.unit_price_minor$|^total_")


class Ordered(Protocol):
    """What was read of a request, which says whose it is."""

    @property
    def customer_id(self) -> str: ...


T = TypeVar("T", bound=Ordered)


class Orders(Protocol):
    """The part of the read model that is used here."""

    def get(self, order_id: str) -> Order | None: ...


class Acceptance:
    """Accepts orders.

    Parameters:
      requests: Remembers idempotency keys.
      claims: The claims on ids.
      catalogue: The products and their prices.
      orders: The read model.
      tokens: Keeps payment tokens.
      publish: Stores an event and returns its place in the stream.
      project: Adds the event at a place to the read model, as far as the ledger confirms it; is given the claim, and
        returns the record.
      timeout: Milliseconds within which an order is stored or refused.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        requests: Requests,
        claims: Claims,
        catalogue: Catalogue,
        orders: Orders,
        tokens: Tokens,
        publish: Publisher,
        project: Callable[[int, Claim], Recorded | None],
        *,
        timeout: int,
        now: Callable[[], int],
    ) -> None:
        self._requests = requests
        self._claims = claims
        self._catalogue = catalogue
        self._orders = orders
        self._tokens = tokens
        self._publish = publish
        self._project = project
        self._timeout = timeout
        self._now = now

    def accept(self, request: OrderRequest, idempotency_key: str | None) -> AcceptedOrder:
        """Store the order's event and return the order; see `tasks.service.accept_order`."""
        deadline = time.monotonic() + self._timeout / 1000
        now = self._now()
        wanted = self.offered(
            lambda offer: _claim(request, offer, now), idempotency_key, lambda: request.order_id
        )
        order_id = request.order_id or new_order_id(now)
        if idempotency_key is None:
            return self._place(order_id, wanted, request, deadline)
        claim = self._requests.claim(f"key:{idempotency_key}", _digest(request), order_id, self._is_placed)
        try:
            return self._place(claim.order_id, replace(wanted, at=claim.created_at), request, deadline)
        finally:
            self._requests.finished(claim)

    def offered(
        self,
        read: Callable[[Mapping[str, Offered]], T],
        idempotency_key: str | None,
        order_id: Callable[[], str | None],
    ) -> T:
        """Read a request with the products that are sold now, or were when the same request came before.

        What seems wrong with one is looked at again with the catalogue as it is stored. One that claimed its order
        before is read with what it was claimed with, so that a change of the catalogue makes no request wrong that is
        sent again. What another customer's order was claimed with counts for no request, and so no answer tells of it.

        Parameters:
          read: Raises InvalidOrder for a request that is wrong.
          order_id: Returns the id that the request chooses.
        """
        try:
            return read(self._catalogue.at(self._now()))
        except InvalidOrder as error:
            if not any(_OFFERED.search(flaw.field) for flaw in error.flaws):
                raise
            self._catalogue.refresh()
            offer: Mapping[str, Offered] = self._catalogue.at(self._now())
            known = order_id() or (idempotency_key and self._requests.order_of(f"key:{idempotency_key}"))
            claim = self._claims.find(known) if known else None
            if claim is not None and claim.customer_id:
                with suppress(InvalidOrder):
                    again = read({**offer, **claim.offer})
                    if again.customer_id == claim.customer_id:
                        return again
            return read(offer)

    def was_placed(self, idempotency_key: str) -> bool:
        """Whether a request with this key has placed an order."""
        order_id = self._requests.order_of(f"key:{idempotency_key}")
        return order_id is not None and self._is_placed(order_id)

    def _place(self, order_id: str, wanted: Claim, request: OrderRequest, deadline: float) -> AcceptedOrder:
        claim, fresh = self._claims.claim(order_id, wanted)
        if claim.is_archived:
            raise OrderArchived(order_id)
        if claim.digest != wanted.digest:
            raise OrderIdTaken(f"another order has the id {order_id}", order_id)
        if not fresh:
            existing = self._orders.get(order_id)
            if existing is not None and existing.place:
                return AcceptedOrder(_as_accepted(existing), repeated=True)
        token = request.payment_token or ""
        if token:
            self._tokens.keep(order_id, request.customer_id, token)
        event = placed_event(order_id, claim, reference(request.customer_id, token))
        place = self._publish(event, claim.at, timeout=self._left(deadline), headers={CARRIED_ON: "1"})
        self._left(deadline)
        recorded = self._project(place, claim)
        order = None if recorded is None else recorded.order
        if order is None:
            raise StoreTimeout(f"order {order_id} is stored and cannot be read as it is now.")
        return AcceptedOrder(_as_accepted(order))

    def _left(self, deadline: float) -> int:
        """Return the milliseconds that are left; nothing is begun when none are."""
        left = int((deadline - time.monotonic()) * 1000)
        if left <= 0:
            raise StoreTimeout(f"the order was not accepted within {self._timeout} ms.")
        return max(_LEAST, left)

    def _is_placed(self, order_id: str) -> bool:
        order = self._orders.get(order_id)
        if order is not None and order.place > 0:
            return True
        claim = self._claims.find(order_id)
        return claim is not None and claim.is_archived


def new_order_id(at: int) -> str:
    """Return a new id (UUID version 7): unique, and sorted by the time in milliseconds with which it begins."""
    random = secrets.token_bytes(10)
    value = bytearray((at & (2**48 - 1)).to_bytes(6, "big") + random)
    value[6] = 0x70 | value[6] & 0x0F  # the version
    value[8] = 0x80 | value[8] & 0x3F  # the variant
    text = value.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _claim(request: OrderRequest, offer: Mapping[str, Offered], at: int) -> Claim:
    """Return the claim that a request makes, at the offer's prices, with one line per sku.

    Raises:
      InvalidOrder: When a product is not offered.
    """
    for position, item in enumerate(request.items):
        for broken in rules.broken_by_item(f"items[{position}]", item.sku, item.quantity, offer):
            raise InvalidOrder(broken.field, broken.problem)
    quantities = rules.quantities_of(request.items)
    token = reference(request.customer_id, request.payment_token or "")
    digest = digest_of(request.customer_id, quantities, token)
    return claim_of(quantities, offer, at, digest, request.customer_id)


def _as_accepted(order: Order) -> Order:
    """Return the order as its first answer showed it."""
    created = [entry for entry in order.history if entry.event == "created"]
    return replace(order, status="accepted", reason=None, history=created)


def _digest(request: OrderRequest) -> str:
    return hashlib.sha256(json.dumps(asdict(request), sort_keys=True).encode()).hexdigest()
