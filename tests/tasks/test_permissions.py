"""The permissions of the documents are enough for each role of the order service, and no more."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import nats
import pytest
from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeout

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing.server import NatsServer
from orders.v1.events_pb2 import OrderShipped
from tests.support.polling import eventually
from tests.support.processes import REPOSITORY
from tests.tasks.producer import Producer, created
from tests.tasks.test_strangers import FORGED, forged
from tests.web.stack import Stack
from tests.web.test_webhooks import STEPS, Receiver

T = TypeVar("T")

ROLES = ("service", "operator", "ordering", "shipping")


def configuration() -> str:
    """Return the permissions of the operators' document, with a user for programs that place orders."""
    document = (REPOSITORY / "docs" / "operations.md").read_text()
    block = document[document.index("SERVICE_PERMISSIONS") :].partition("```")[0]
    programs = (REPOSITORY / "tasks" / "permissions.conf").read_text()
    users = "".join(f"  {user}\n" for user in re.findall(r"\{ user: .*", programs))
    config = programs + block.replace("  users = [\n", f"  users = [\n{users}")
    for role in ROLES:
        config = config.replace(f"${role.upper()}_PASSWORD", f'"{role}-secret"')
    return config


def url(server: NatsServer, role: str) -> str:
    return server.url.replace("nats://", f"nats://{role}:{role}-secret@")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The service with its own account on a server that an operator has prepared."""
    directory = tmp_path_factory.mktemp("guarded")
    with NatsServer(directory / "nats", sync="2m", config=configuration()) as server:
        for _ in range(2):
            prepared = subprocess.run(
                [Path(sys.executable).parent / "fleet", "setup", "tasks"],
                cwd=REPOSITORY,
                env={**os.environ, "NATS_URL": url(server, "operator")},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert prepared.returncode == 0, prepared.stdout + prepared.stderr
        env = {"WEBHOOK_NETWORKS": "127.0.0.0/8", "NATS_URL": url(server, "service"), "DECLARE": "0"}
        with Stack(directory, nats=server, env=env) as shop:
            yield shop


@pytest.fixture(scope="module")
def operator(guarded: Stack) -> Iterator[Producer]:
    broker = JetStreamBroker(url(guarded.nats, "operator"))
    yield Producer(broker, guarded)
    broker.close()


def as_program(
    server: NatsServer, work: Callable[[Client, list[str]], Awaitable[T]], role: str = "ordering"
) -> T:
    """Run something as a program that places or ships orders; it is given the client, and the errors that came."""

    async def run() -> T:
        errors: list[str] = []

        async def note(error: Exception) -> None:
            errors.append(str(error))

        client = await nats.connect(
            url(server, role), inbox_prefix=f"_INBOX_{role}".encode(), error_cb=note, allow_reconnect=False
        )
        try:
            return await work(client, errors)
        finally:
            await client.close()

    return asyncio.run(run())


def test_the_service_needs_nothing_more(guarded: Stack) -> None:
    """Orders by API and pages, declined and confirmed, with an account that may create nothing."""
    assert guarded.final(guarded.order()["order_id"])["status"] == "confirmed"
    assert guarded.final(guarded.order(payment_token="tok_declined")["order_id"])["status"] == "rejected"
    for path in ("/", "/orders", "/api/orders", "/api/products"):
        assert guarded.get(path).status_code == 200


def test_webhooks_need_nothing_more(guarded: Stack) -> None:
    """Deliveries that wait in line for their turn, too."""
    receiver = Receiver()
    receiver.open.clear()
    made = guarded.post("/api/webhooks", json={"url": receiver.url})
    assert made.status_code == 201, made.text
    order_id = guarded.order()["order_id"]
    # Two run at a time, so that the others stand in line.
    eventually(lambda: len(receiver.requests) >= 2, timeout=60)
    assert guarded.final(order_id, timeout=60)["status"] == "confirmed"
    receiver.open.set()
    eventually(lambda: receiver.types(made.json()["secret"], order_id) == STEPS, timeout=60)
    assert guarded.session.delete(f"{guarded.url}/api/webhooks/{made.json()['id']}").status_code == 204
    assert "may not publish" not in guarded.workers.output
    receiver.close()


def test_a_program_that_places_orders(guarded: Stack, operator: Producer) -> None:
    """It publishes ORDER.created with a plain client, and is told that it is stored."""
    event = created(("NOTE-01", 2))

    async def place(client: Client, _errors: list[str]) -> int:
        return (await client.jetstream().publish("ORDER.created", event.SerializeToString())).seq

    assert as_program(guarded.nats, place) > 0
    eventually(lambda: operator.status(event.order_id) == "confirmed")


def test_a_program_that_ships_orders(guarded: Stack, operator: Producer) -> None:
    """It publishes ORDER.shipped with a plain client, and nothing else; what is not confirmed is not shipped."""
    confirmed = guarded.order()["order_id"]
    assert guarded.final(confirmed)["status"] == "confirmed"
    declined = guarded.order(payment_token="tok_declined")["order_id"]
    assert guarded.final(declined)["status"] == "rejected"

    async def ship(client: Client, errors: list[str]) -> list[str]:
        for order_id in (declined, confirmed):
            event = OrderShipped(order_id=order_id, carrier="DHL")
            await client.jetstream().publish("ORDER.shipped", event.SerializeToString())
        with pytest.raises(NatsTimeout):
            await client.jetstream().publish("ORDER.created", created().SerializeToString(), timeout=0.5)
        return errors

    errors = as_program(guarded.nats, ship, "shipping")
    assert any("permissions violation" in error.lower() for error in errors)
    eventually(lambda: operator.status(confirmed) == "shipped", timeout=60)
    letters = eventually(
        lambda: [one for one in operator.broker.dead_letters.list() if "only what is confirmed" in one.error],
        timeout=60,
    )
    assert declined in letters[0].error
    assert operator.status(declined) == "rejected"


@pytest.mark.parametrize("name", [*FORGED, "cancelled", "shipped", "created.x", "anything"])
def test_it_publishes_no_other_event(guarded: Stack, operator: Producer, name: str) -> None:
    """The server refuses it, and the stream does not have it."""
    order_id = f"refused-{name}"
    data = forged(name, order_id) if name in FORGED else order_id.encode()

    async def publish(client: Client, errors: list[str]) -> list[str]:
        with pytest.raises(NatsTimeout):
            await client.jetstream().publish(f"ORDER.{name}", data, timeout=0.5)
        return errors

    assert any("permissions violation" in error.lower() for error in as_program(guarded.nats, publish))
    assert operator.events(order_id) == []


@pytest.mark.parametrize(
    "subject",
    [
        "$JS.API.STREAM.PURGE.ORDERS",
        "$JS.API.STREAM.MSG.GET.ORDERS",
        "$JS.API.DIRECT.GET.ORDERS",
        "$KV.dramatiq-orders.x",
        "$KV.dramatiq-stock.level.MUG-01",
        "dramatiq.dead.orders.x",
        "dramatiq.q.orders.task",
    ],
)
def test_it_reaches_nothing_else(guarded: Stack, subject: str) -> None:
    """Neither streams nor buckets, queues nor dead letters."""

    async def ask(client: Client, errors: list[str]) -> list[str]:
        with pytest.raises(NatsTimeout):
            await client.request(subject, b"{}", timeout=0.5)
        return errors

    assert any("permissions violation" in error.lower() for error in as_program(guarded.nats, ask))


def test_it_hears_nothing(guarded: Stack) -> None:
    """It may subscribe to its own inbox alone."""

    async def listen(client: Client, errors: list[str]) -> list[str]:
        for subject in ("ORDER.>", ">", "_INBOX.>", "$KV.dramatiq-orders.>"):
            await client.subscribe(subject)
        await client.flush()
        await asyncio.sleep(1)  # a task of the client's own tells of errors
        return errors

    refused = as_program(guarded.nats, listen)
    assert ["permissions violation" in error.lower() for error in refused] == [True] * 4
