"""Another language's real client places orders: it publishes an event and knows nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.support.polling import eventually
from tests.support.processes import REPOSITORY
from tests.support.skips import needs_node
from tests.web.stack import Stack

SOURCE = Path(__file__).parent / "node"

pytestmark = needs_node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node program with its packages, installed outside of the repository."""
    directory = tmp_path_factory.mktemp("node") / "producer"
    shutil.copytree(SOURCE, directory, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(
        ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=directory,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    return directory


def publish(node: Path, stack: Stack, order: dict[str, object]) -> dict[str, object]:
    finished = subprocess.run(
        ["node", "publish_order.js", os.fspath(REPOSITORY / "proto"), json.dumps(order)],
        cwd=node,
        env={**os.environ, "NATS_URL": stack.nats.url},
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    stored: dict[str, object] = json.loads(finished.stdout)
    return stored


def test_an_event_from_node_becomes_a_confirmed_order(node: Path, service: Stack) -> None:
    """An OrderCreated with fields 1 to 4 and no header is confirmed, paid once, and shown by the API."""
    order_id = f"node-{uuid.uuid4()}"
    stored = publish(
        node,
        service,
        {
            "order_id": order_id,
            "customer_id": "c-node",
            "items": [{"sku": "MUG-01", "quantity": 2}, {"sku": "NOTE-01", "quantity": 1}],
            "total_amount": 34.75,
        },
    )
    assert stored["stream"] == "ORDERS"
    eventually(lambda: service.get(f"/api/orders/{order_id}").status_code == 200)
    order = service.final(order_id)
    assert order["status"] == "confirmed"
    assert order["total_amount"] == 34.75
    assert [entry["event"] for entry in order["history"]] == ["created", "reserved", "paid", "confirmed"]


def test_the_same_event_twice_is_one_order(node: Path, service: Stack) -> None:
    """A producer that repeats itself, which without a message id nothing notices earlier, charges once."""
    order = {
        "order_id": f"node-{uuid.uuid4()}",
        "customer_id": "c-node",
        "items": [{"sku": "BAG-01", "quantity": 1}],
        "total_amount": 19.99,
    }
    first, second = publish(node, service, order), publish(node, service, order)
    assert first["sequence"] != second["sequence"]
    eventually(lambda: service.get(f"/api/orders/{order['order_id']}").status_code == 200)
    final = service.final(str(order["order_id"]))
    assert final["status"] == "confirmed"
    assert len(final["history"]) == 4


def test_a_wrong_total_from_node_is_rejected(node: Path, service: Stack) -> None:
    """A total that the prices do not add up to ends the order, with the sum that is right as the reason."""
    order_id = f"node-{uuid.uuid4()}"
    publish(
        node,
        service,
        {
            "order_id": order_id,
            "customer_id": "c-node",
            "items": [{"sku": "MUG-01", "quantity": 1}],
            "total_amount": 1.00,
        },
    )
    eventually(lambda: service.get(f"/api/orders/{order_id}").status_code == 200)
    order = service.final(order_id)
    assert order["status"] == "rejected"
    assert "12.90 EUR" in order["reason"]
