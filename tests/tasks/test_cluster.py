"""The order service on three nodes, every stream and bucket on all three, while one node is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from dramatiq.errors import BrokerError

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsCluster
from tasks.catalogue import CATALOGUE
from tasks.events import subject_of
from tasks.ledger import Record
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, WORKER_READY, dramatiq_worker, python
from tests.tasks.producer import created


def test_orders_survive_the_loss_of_the_leader(tmp_path: Path) -> None:
    """kill -9 of the node that leads the stock amid a hundred orders: all become final, the books balance."""
    with NatsCluster(tmp_path / "nats", sync="2m") as cluster:
        lose_the_leader(cluster, tmp_path)


def lose_the_leader(cluster: NatsCluster, tmp_path: Path) -> None:
    port = free_port()
    env = {
        "NATS_URL": ",".join(cluster.urls),
        "REPLICAS": "3",
        "ACK_WAIT": "3000",
        "PAYMENT_URL": f"http://127.0.0.1:{port}",
        "RETRY_MIN_BACKOFF": "100",
        "RETRY_MAX_BACKOFF": "2000",
    }
    prepared = subprocess.run(
        [Path(sys.executable).parent / "fleet", "setup", "tasks"],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    with ExitStack() as running:
        running.enter_context(
            python(
                *("-m", "tasks.payments_stand_in", "--port", str(port)),
                *("--database", tmp_path / "payments.sqlite"),
                log=tmp_path / "gateway.log",
            )
        )
        workers = running.enter_context(dramatiq_worker("tasks", log=tmp_path / "workers.log", env=env))
        workers.wait_for_output(WORKER_READY, timeout=60)
        broker = JetStreamBroker(cluster.urls, replicas=3)
        running.callback(broker.close)
        stock = broker.bucket("stock")

        def publish(number: int) -> str:
            token = "tok_declined" if number % 5 == 0 else "tok_ok"
            event = created(("MUG-01", 1), ("TEE-01", 1), payment_token=token)

            def stored() -> bool:
                try:
                    return bool(broker.publish(subject_of(event), event, event_id=event.order_id))
                except BrokerError:
                    return False  # an election is on; with the same id it is stored once

            eventually(stored, timeout=60)
            return event.order_id

        def state(order_id: str) -> str | None:
            entry = stock.get(f"order.{order_id}")
            return None if entry is None else Record.decode(entry.value).state

        def is_in(order_id: str, final: str) -> bool:
            try:
                return state(order_id) == final
            except BrokerError:
                return False  # an election is on

        order_ids = [publish(number) for number in range(50)]
        eventually(lambda: any(state(order_id) for order_id in order_ids), timeout=60)
        killed = cluster.kill(cluster.leader_of("KV_dramatiq-stock"))
        order_ids += [publish(number) for number in range(50)]
        for number, order_id in enumerate(order_ids):
            final = "released" if number % 5 == 0 else "confirmed"
            eventually(partial(is_in, order_id, final), timeout=120)
        cluster.restart(killed)
        sold = sum(state(entry.key.removeprefix("order.")) == "confirmed" for entry in stock.items("order."))
        level = broker.bucket("stock").get("level.MUG-01")
        assert level is not None
        assert json.loads(level.value)["pieces"] == CATALOGUE["MUG-01"].initial_stock - sold
