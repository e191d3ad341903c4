"""Sentry's integration for Dramatiq works on this broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# In a process of its own, because Sentry changes Dramatiq for good.
PROGRAM = """
import json, sys, threading
import sentry_sdk
from sentry_sdk.integrations.dramatiq import DramatiqIntegration
from sentry_sdk.transport import Transport

events, told = [], threading.Event()


class Kept(Transport):
    def capture_envelope(self, envelope):
        event = envelope.get_event()
        if event is not None:
            events.append(event)
            told.set()


sentry_sdk.init(
    dsn="http://key@127.0.0.1:9/1",
    transport=Kept,
    default_integrations=False,
    integrations=[DramatiqIntegration()],
)

import dramatiq
from dramatiq_jetstream import JetStreamBroker

broker = JetStreamBroker(sys.argv[1], namespace=sys.argv[2])
dramatiq.set_broker(broker)


@dramatiq.actor(max_retries=0)
def charge(order):
    raise ZeroDivisionError("no money")


message = charge.send(7)
worker = dramatiq.Worker(broker, worker_threads=1)
worker.start()
told.wait(60)
worker.stop()
broker.close()
event = events[0]
print(json.dumps({
    "error": event["exception"]["values"][-1]["type"],
    "transaction": event["transaction"],
    "id": event["contexts"]["dramatiq"]["data"]["message_id"] == message.message_id,
}))
"""


def test_a_failing_actor_is_reported_to_sentry(nats_url: str, namespace: str, tmp_path: Path) -> None:
    """The event names the error, the actor and the message."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, nats_url, namespace],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("SENTRY")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"error": "ZeroDivisionError", "transaction": "charge", "id": True}
