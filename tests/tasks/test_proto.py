"""The committed protobuf code is what the .proto files say, and old producers' bytes are understood."""

from __future__ import annotations

import subprocess
import sys

from orders.v1.events_pb2 import OrderCreated
from tests.support.processes import REPOSITORY


def test_generated_code_is_current() -> None:
    """`python proto/generate.py --check` finds no difference."""
    check = subprocess.run(
        [sys.executable, "proto/generate.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


def test_field_numbers_of_the_contract() -> None:
    """Bytes that a producer of the old contract writes by hand decode into the fields they mean."""
    item = b"\x0a\x06MUG-01" + b"\x10\x02"
    body = b"\x0a\x03o-1" + b"\x12\x03c-1" + b"\x1a" + bytes([len(item)]) + item
    body += b"\x21" + b"\xcd\xcc\xcc\xcc\xcc\xcc\x39\x40"  # 25.8 as a double
    event = OrderCreated.FromString(body)
    assert (event.order_id, event.customer_id, event.total_amount) == ("o-1", "c-1", 25.8)
    assert [(item.sku, item.quantity) for item in event.items] == [("MUG-01", 2)]
