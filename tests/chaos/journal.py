"""Writes down every run of an actor, so that repeated runs can be counted: `fleet work tasks tests.chaos.journal`.

One line for each run, appended in one write: time, process, actor, message id, and what tells a retry or a
replay of the message from a repetition.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import dramatiq

from dramatiq_jetstream.dead_letters import HISTORY_OPTION

_file = os.open(os.environ["CHAOS_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


class Journal(dramatiq.Middleware):
    """Appends to the journal when an actor is about to run."""

    def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        attempt = [message.options.get("retries", 0), len(message.options.get(HISTORY_OPTION) or ())]
        line: list[Any] = [time.time(), os.getpid(), message.actor_name, message.message_id, *attempt]
        os.write(_file, json.dumps(line).encode() + b"\n")


dramatiq.get_broker().add_middleware(Journal())
