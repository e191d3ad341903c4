"""A program that publishes what it likes: forged and mutated steps, other contents, repetitions, our events' ids.

Whatever it makes up has the word `forged` in it, by which the books know it from what the service and its clients have
published.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

import nats
from google.protobuf.message import Message
from nats.errors import Error as NatsError
from nats.js.client import JetStreamContext

from orders.v1.events_pb2 import (
    OrderCancelled,
    OrderCancelRequested,
    OrderChargedBack,
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderItem,
    OrderPaid,
    OrderRefunded,
    OrderRefundRequested,
    OrderRejected,
    OrderReserved,
    OrderReturned,
    OrderReturnRequested,
)
from tests.chaos.client import Log

FORGED = "forged"

#: A field that no event has, so that the word stands in what was mutated, too.
_MARK = b"\x7a\x06" + FORGED.encode()

#: Seconds between two events.
_PAUSE = 0.3


class Stranger:
    """Publishes until it is closed; what cannot be published while the server is away is left out."""

    def __init__(self, nats_url: str, log: Log, *, seed: int) -> None:
        self._nats_url = nats_url
        self._log = log
        self._choice = random.Random(f"{seed}.stranger")
        self._stop = threading.Event()
        self._squatted: set[str] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Stranger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the stranger did not come to an end"

    async def _run(self) -> None:
        async def ignore(_error: Exception) -> None:
            pass

        client = await nats.connect(
            self._nats_url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=ignore
        )
        try:
            while not self._stop.is_set():
                with contextlib.suppress(NatsError, TimeoutError):
                    await self._meddle(client.jetstream(timeout=2))
                await asyncio.sleep(_PAUSE)
        finally:
            await client.close()

    async def _meddle(self, js: JetStreamContext) -> None:
        for order_id in self._log.chosen:
            if order_id not in self._squatted:
                self._squatted.add(order_id)
                for name in ("created", "reserved", "paid"):
                    event = OrderCreated(order_id=f"{FORGED}-{order_id}-{name}", customer_id=FORGED)
                    headers = {"Nats-Msg-Id": f"{order_id}.{name}"}
                    await js.publish("ORDER.created", event.SerializeToString(), headers=headers)
        known = list(self._log.accepted)
        if not known:
            return
        order_id = self._choice.choice([*known[-20:], f"{FORGED}-{self._choice.randrange(1_000)}"])
        name, forged = self._choice.choice(_events(order_id))
        if name == "created" and order_id in known and order_id not in self._log.claimed:
            # Of two programs that publish orders under one id, the one whose event is read first has it.
            return
        if name != "created" and self._choice.random() < 0.3:
            _mutate(forged, self._choice)
        headers = {"Nats-Msg-Id": f"{order_id}.{name}"} if self._choice.random() < 0.5 else None
        await js.publish(f"ORDER.{name}", forged.SerializeToString() + _MARK, headers=headers)


def _mutate(event: Message, choice: random.Random) -> None:
    """Set fields of an event, other than its order, to values of the wrong kind."""
    for field in event.DESCRIPTOR.fields:
        if field.name == "order_id" or choice.random() < 0.5:
            continue
        if field.message_type is not None and field.name.endswith("_at"):
            getattr(event, field.name).seconds = choice.choice((0, -1, 2**40, 2**62))
        elif field.cpp_type == field.CPPTYPE_STRING and not field.is_repeated:
            setattr(event, field.name, choice.choice(("", "\x00", "<b>", "\u202e", "x" * 3_000, "NOPE")))
        elif field.cpp_type == field.CPPTYPE_INT64 and not field.is_repeated:
            setattr(event, field.name, choice.choice((0, -1, 2**62)))


def _events(order_id: str) -> list[tuple[str, Message]]:
    items = [OrderItem(sku="NOTE-01", quantity=7)]
    # Under an id of its own the right total would make it an order like any other, which the books leave out.
    total = 1.0 if order_id.startswith(FORGED) else 62.65
    return [
        ("created", OrderCreated(order_id=order_id, customer_id=FORGED, items=items, total_amount=total)),
        ("reserved", OrderReserved(order_id=order_id, customer_id=FORGED, items=items, currency="NOPE")),
        ("paid", OrderPaid(order_id=order_id, charge_id=FORGED)),
        ("declined", OrderDeclined(order_id=order_id, code=FORGED, reason=FORGED)),
        ("confirmed", OrderConfirmed(order_id=order_id, charge_id=FORGED)),
        ("rejected", OrderRejected(order_id=order_id, reason=FORGED)),
        ("cancelled", OrderCancelled(order_id=order_id, reason=FORGED)),
        ("cancel_requested", OrderCancelRequested(order_id=order_id, by="operator", reason=FORGED)),
        ("refund_requested", OrderRefundRequested(order_id=order_id, refund=FORGED, amount_minor=100)),
        ("refunded", OrderRefunded(order_id=order_id, refund=FORGED, refund_id=FORGED, amount_minor=100)),
        ("return_requested", OrderReturnRequested(order_id=order_id, reason=FORGED)),
        ("returned", OrderReturned(order_id=order_id, reason=FORGED)),
        ("charged_back", OrderChargedBack(order_id=order_id, chargeback_id=FORGED, amount_minor=100)),
        ("failed", OrderFailed(order_id=order_id, step="pay", error=FORGED, message_id=FORGED)),
    ]
