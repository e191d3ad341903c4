"""The program that worker processes of the tests run: `dramatiq tests.broker.fleet_app`.

Everything comes from the environment (see `tests/broker/fleet.py`), and every run of an actor is a line in a file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dramatiq

from dramatiq_jetstream import JetStreamBroker

RUNS = Path(os.environ["FLEET_RUNS"])
GATES = RUNS.parent

broker = JetStreamBroker(**json.loads(os.environ["FLEET_BROKER"]))
dramatiq.set_broker(broker)


def note(*words: object) -> None:
    # One short write in append mode is not torn by another process.
    with RUNS.open("a") as runs:
        runs.write(" ".join(map(str, words)) + "\n")


@dramatiq.actor(max_retries=0)
def mark(name: str) -> None:
    note("ran", name)


@dramatiq.actor(max_retries=0)
def hold(name: str) -> None:
    """Runs until the test opens its gate."""
    note("began", name, os.getpid())
    while not (GATES / f"{name}.open").exists():
        time.sleep(0.02)
    note("ended", name, os.getpid())


@dramatiq.actor(max_retries=0, concurrency=1, key="customer")
def serve(customer: str, name: str) -> None:
    """Has the only turn of its customer until the test opens its gate."""
    hold.fn(name)


@dramatiq.actor(max_retries=0, rate="4/s")
def rated(name: str) -> None:
    note("ran", name)


@dramatiq.actor(max_retries=0)
def die(name: str) -> None:
    """Takes its process along, as a segmentation fault or the OOM killer does."""
    note("died", name)
    time.sleep(0.5)  # Dramatiq's master waits for ever for a process that dies while it boots
    os._exit(9)


@dramatiq.actor(max_retries=0)
def die_once(name: str) -> None:
    """Takes its process along the first time, as one does that is killed for want of memory."""
    if not (GATES / f"{name}.open").exists():
        (GATES / f"{name}.open").touch()
        note("died", name)
        time.sleep(0.5)
        os._exit(9)
    note("survived", name)


@dramatiq.actor(max_retries=0)
def end_worker_thread(name: str) -> None:
    """Ends the thread that runs it, once it is done."""
    note("ran", name)

    def leave(timeout: float) -> None:
        raise SystemExit

    thread: Any = threading.current_thread()
    thread.work_queue = SimpleNamespace(get=leave, task_done=thread.work_queue.task_done)


@dramatiq.actor(max_retries=0)
def end_consumer_thread(name: str) -> None:
    """Ends the thread that takes the messages of the default queue."""
    note("ran", name)

    def leave() -> None:
        raise SystemExit

    thread: Any = threading.current_thread()
    thread.consumers["default"].handle_delayed_messages = leave


@dramatiq.actor(queue_name="other", max_retries=0)
def other(name: str) -> None:
    note("other", name)


@dramatiq.actor(max_retries=0)
def orphan(name: str) -> None:
    """Leaves a process behind whose parent has ended."""
    left = subprocess.run(
        ["sh", "-c", "sleep 0.2 >&- & echo $!"], stdout=subprocess.PIPE, text=True, check=True
    )
    note("left", left.stdout.strip())


@dramatiq.actor(max_retries=0, time_limit=500, hard_time_limit=1_500)
def block(name: str) -> None:
    """Ignores its time limit: no exception strikes a thread that sleeps."""
    note("began", name, os.getpid())
    time.sleep(3_600)


@dramatiq.actor(max_retries=1, min_backoff=50, max_backoff=100, hard_time_limit=1_500)
def backtrack(name: str) -> None:
    """Stays in C code, and lets no other thread of its process run."""
    note("began", name, os.getpid())
    re.match(r"(a+)+$", "a" * 64 + "b")


@dramatiq.actor(max_retries=3, min_backoff=50, max_backoff=100)
def flaky(name: str) -> None:
    note("tried", name)
    if not (GATES / f"{name}.open").exists():
        raise RuntimeError("not yet")
