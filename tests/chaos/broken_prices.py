"""A broken build: an order costs what the list of products says, whatever was changed since. Workers import this."""

from __future__ import annotations

from dataclasses import replace

from orders.v1.events_pb2 import OrderCreated
from tasks import openings, rules, saga
from tasks.catalogue import CATALOGUE
from tasks.claims import Claim
from tasks.ledger import PricedItem, Record

_first_record = saga.first_record


def _as_listed(claim: Claim, event: OrderCreated, at: int) -> Record:
    record = _first_record(claim, event, at)
    lines = tuple(
        PricedItem(line.sku, line.quantity, CATALOGUE[line.sku].unit_price) if line.sku in CATALOGUE else line
        for line in record.lines
    )
    return replace(record, lines=lines, total=rules.total_of(lines))


saga.first_record = openings.first_record = _as_listed
