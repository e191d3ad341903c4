"""What a test may expect of an order that the service has carried to its end."""

from __future__ import annotations

from typing import Any


def check_whole(order: dict[str, Any]) -> None:
    """Check that the read model has the whole history: events are added to it in any order, the last one first, too."""
    events = {entry["event"]: entry for entry in order["history"]}
    before: set[str] = set()
    if "confirmed" in events:
        before = {"created", "reserved", "paid"}
    elif "rejected" in events:
        declined = events["rejected"].get("detail", {}).get("code") == "payment_declined"
        before = {"created", "reserved", "declined"} if declined else {"created"}
    assert before <= events.keys(), f"not all of its history is there yet: {order}"
