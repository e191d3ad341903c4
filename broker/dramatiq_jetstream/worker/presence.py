"""Publishes what this worker process is and runs, so that people can see a running fleet.

A thread writes one small record to the bucket `workers`: every `INTERVAL_SECONDS`, and within a second of a change. The
record lives three intervals, so a process that was killed is gone by itself; one that stops removes its own. Nothing
waits for a record, and the next one makes up for a lost one.

What a worker thread runs, it notes itself (see `attempts`). If the process dies, its record expires.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from dramatiq.broker import MessageProxy
from dramatiq.errors import BrokerError
from dramatiq.worker import Worker

from dramatiq_jetstream.kv import Bucket

from .activity import Activity
from .arguments import Describe, shown_arguments
from .attachment import Attachment
from .current import said_of

__all__ = ["INTERVAL_SECONDS", "Presence"]

#: How often an idle worker renews its record, which lives three times as long.
INTERVAL_SECONDS = 5.0

#: How often a record is written at most.
BATCH_SECONDS = 1.0

#: Running messages that a record has at most, and characters of one's id.
MAX_RUNNING = 200
MAX_ID = 200

_VERSION = version("dramatiq-jetstream")

logger = logging.getLogger(__name__)


class Presence:
    """The presence of one worker process.

    Parameters:
      bucket: Returns the bucket `workers`.
      attachment: Knows what the worker of this process runs and has run.
      describe: Makes the text of a message's arguments.
      program_version: Returns what the program says of its version.
    """

    def __init__(
        self,
        bucket: Callable[[], Bucket],
        attachment: Attachment,
        activity: Activity,
        describe: Describe,
        program_version: Callable[[], str],
    ) -> None:
        self._bucket = bucket
        self._attachment = attachment
        self._activity = activity
        self._describe_arguments = describe
        self._program_version = program_version
        self.reset()

    def reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork."""
        self._stop: threading.Event | None = None
        self._key = ""

    def begin(self, worker: Worker) -> None:
        """Publish this process from now on; called when its worker has booted."""
        self._key = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._stop = threading.Event()
        arguments = (worker, self._stop, int(time.time() * 1000))
        threading.Thread(target=self._keep, args=arguments, name="presence", daemon=True).start()

    def end(self, worker: Worker) -> None:
        """Remove the record; called when the worker has shut down."""
        if self._stop is None:
            return
        self._stop.set()
        if not self._bucket().connection.is_connected:
            return  # the record will expire, and a worker that stops waits for no server
        try:
            self._activity.send(now=True)
            self._bucket().delete(self._key)
        except BrokerError as error:
            logger.debug("The record of this worker was not removed and will expire: %s", error)

    # The presence thread

    def _keep(self, worker: Worker, stop: threading.Event, since: int) -> None:
        written, last, warned, idle = 0.0, "", False, 0
        while not stop.wait(BATCH_SECONDS):
            try:
                self._activity.send()
                record = self._record(worker, since)
                changed = json.dumps([record["running"], record["done"]])
                if changed == last and time.monotonic() - written < INTERVAL_SECONDS:
                    continue
                idle = idle + 1 if changed == last else 0
                self._bucket().note(
                    self._key,
                    json.dumps(record).encode(),
                    ttl=int(3_000 * INTERVAL_SECONDS),
                    unanswered=bool(idle % 2),  # an idle process is to cost the server little
                )
                written, last = time.monotonic(), changed
            except Exception as error:  # noqa: BLE001 - people see less; no message may suffer
                if not warned:
                    warned = True
                    logger.warning("The presence of this worker cannot be stored: %s", error)
                stop.wait(INTERVAL_SECONDS)

    def _record(self, worker: Worker, since: int) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": _VERSION,
            "program_version": str(self._program_version())[:MAX_ID],
            "since": since,
            "at": int(time.time() * 1000),
            "queues": sorted(worker.consumers),
            "threads": len(worker.workers),
            "running": [self._describe(*each) for each in self._attachment.running()[:MAX_RUNNING]],
            "done": self._activity.done,
            "failed": self._activity.failed,
            "rss": _resident(usage.ru_maxrss),
            "cpu": round(usage.ru_utime + usage.ru_stime, 1),
        }

    def _describe(self, message: MessageProxy, since: float) -> dict[str, Any]:
        retries = message.options.get("retries", 0)
        described: dict[str, Any] = {
            "message_id": message.message_id[:MAX_ID],
            "actor": message.actor_name,
            "queue": message.queue_name,
            "attempt": retries + 1 if isinstance(retries, int) else 1,
            "deliveries": getattr(message, "delivery_count", 1),
            "since": int(since * 1000),
            "arguments": shown_arguments(message, self._describe_arguments),
        }
        said = said_of(message)
        if said is not None:
            described["progress"] = said
        return described


def _resident(peak: int) -> int:
    """Resident memory in bytes; where the system does not say, the highest it has been."""
    try:
        with open("/proc/self/statm") as statm:  # noqa: PTH123 - each second, in every worker
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return peak if sys.platform == "darwin" else peak * 1024
