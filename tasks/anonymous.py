"""What remains of an order when its customer is erased: what was bought, for how much, and what happened when.

Who ordered goes, and so does everything that people wrote: reasons, errors, the names of those who asked, the number
of a parcel, the reference of a payment token. The gateway's ids of charges and refunds stay: the books need them.

Each function takes a stored value and returns the anonymous one; of an anonymous value it returns the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from google.protobuf.message import DecodeError

from .claims import Claim
from .events import decode
from .ledger import Record

#: The fields of an event and of a fact in the read model that may say something about a person.
TEXTS: Final = ("customer_id", "payment_token", "reason", "error", "tracking", "name")


def claim(value: bytes) -> bytes:
    """Return the claim on an id without who claimed it."""
    known = Claim.decode(value)
    return value if known.is_archived else known.anonymous.encode()


def record(value: bytes) -> bytes:
    """Return the record of an order in the ledger without its customer."""
    known = Record.decode(value)
    return replace(
        known,
        customer_id="",
        payment_token="",
        reason="",
        tracking="",
        refunds=tuple(replace(one, reason="") for one in known.refunds),
        chargebacks=tuple(replace(one, reason="") for one in known.chargebacks),
    ).encode()


def cancel_request(value: bytes) -> bytes:
    """Return the note of who wanted an order cancelled, without name and reason."""
    at, by, *_ = json.loads(value)
    return json.dumps([at, by, "", ""]).encode()


def failures(value: bytes) -> bytes:
    """Return the note of which steps were given up, without the errors."""
    return json.dumps(
        {step: [at, "", message_id] for step, (at, _, message_id) in json.loads(value).items()}
    ).encode()


#: What makes an entry of the bucket of the stock anonymous, by the kind of its key.
ENTRIES: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "claim": claim,
    "order": record,
    "cancel": cancel_request,
    "failed": failures,
}


def entry(key: str, value: bytes) -> bytes:
    """Return an entry of the bucket of the stock as it remains."""
    change = ENTRIES.get(key.partition(".")[0])
    return value if change is None else change(value)


def shown_order(value: bytes) -> bytes:
    """Return an order's record in the read model without its customer."""
    stored: dict[str, Any] = json.loads(value)
    stored.pop("trace_id", None)
    if "customer_id" in stored:
        stored["customer_id"] = ""
    events = {
        key: {name: "" if name in TEXTS else said for name, said in fact.items()}
        for key, fact in stored["events"].items()
    }
    return json.dumps({**stored, "events": events}, separators=(",", ":")).encode()


def event(subject: str, data: bytes) -> bytes:
    """Return an event without its customer; one that cannot be read loses its bytes."""
    try:
        known = decode(subject, data)
    except DecodeError:
        return b""
    if known is None:
        return b""
    for name in TEXTS:
        if name in known.DESCRIPTOR.fields_by_name:
            known.ClearField(name)
    # Another program may say more than this one knows of.
    known.DiscardUnknownFields()
    return known.SerializeToString(deterministic=True)
