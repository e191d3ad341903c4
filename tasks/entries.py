"""Every entry that the bucket of the stock has of one order, for what takes orders away as a whole and back again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .ports import Bucket, Entry

#: The keys of an order are `<kind>.<order id>`. A kind that is missing here would be left behind, or in the archive.
KINDS: Final = ("claim", "order", "cancel", "failed", "refund", "restored")


def claim_key(order_id: str) -> str:
    """Return the key of the claim on an order's id."""
    return f"claim.{order_id}"


def record_key(order_id: str) -> str:
    """Return the key of the record of an order."""
    return f"order.{order_id}"


def entries_of(bucket: Bucket, order_id: str, since: tuple[str, int] | None = None) -> Mapping[str, Entry]:
    """Return the entries of an order by key.

    Parameters:
      since: A key and a revision of it that was written: they are at least as new.
    """
    keys = [f"{kind}.{order_id}" for kind in KINDS]
    if since is not None:
        return bucket.get_many(keys, since=since)
    known = next((found for key in keys[:2] if (found := bucket.get(key)) is not None), None)
    if known is None:
        return {key: found for key in keys if (found := bucket.get(key)) is not None}
    # As one server has them at one moment, which is not behind what is known.
    return bucket.get_many(keys, since=(known.key, known.revision))
