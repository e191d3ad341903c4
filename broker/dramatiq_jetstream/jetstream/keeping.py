"""Keeps what a running program needs on its server, each stream by itself.

A *job* is something that a stream needs: its declaration, a consumer, the schedules of a queue. It is tried until it
succeeds, in a thread that its stream has while there are jobs for it. So a stream that cannot be declared or reached
holds up no other one, neither at boot nor later, and no thread of Dramatiq's waits for any of them.

Jobs come from two sides. A reader finds that a stream or consumer is missing (see `worker/sources`). And a stream that
began a new life is *renewed*: every module that keeps something in it, such as schedules, puts it back.

If the process dies, the next one begins with the same jobs. All of them are safe to repeat.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from dramatiq.errors import BrokerError

from dramatiq_jetstream.wire.connection import Connection

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)

#: Seconds between two tries of a job.
RETRY_SECONDS = 2.0


class _StreamJobs:
    """The jobs of one stream that have not succeeded yet, by what they are for."""

    def __init__(self) -> None:
        self.jobs: dict[str, Callable[[], object]] = {}
        self.added = threading.Event()


class Keeper:
    """The jobs of one connection. Any thread may call it; nothing here waits."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._renewals: dict[str, Callable[[str], None]] = {}
        self._reset()
        connection.on_fork(self._reset)

    def _reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork, where the parent's threads are not ours."""
        self._lock = threading.Lock()
        self._streams: dict[str, _StreamJobs] = {}
        self._complaints: dict[str, str] = {}

    def do(self, stream: str, what: str, job: Callable[[], object]) -> None:
        """Call `job` in the stream's thread until it raises no error; it takes the place of one with the same name.

        Parameters:
          what: Names the job to people, as in "the consumer worker of shop_q_mail".
        """
        with self._lock:
            jobs = self._streams.get(stream)
            if jobs is not None:
                jobs.jobs[what] = job
                jobs.added.set()
                return
            jobs = self._streams[stream] = _StreamJobs()
            jobs.jobs[what] = job
        threading.Thread(
            target=self._run, args=(stream, jobs), name=f"dramatiq-jetstream-keeper-{stream}", daemon=True
        ).start()

    @property
    def is_idle(self) -> bool:
        """Whether every job has succeeded."""
        return not self._streams

    def on_renewed(self, what: str, restore: Callable[[str], None]) -> None:
        """Call `restore(stream)`, as a job with that name, for each stream that began a new life."""
        self._renewals[what] = restore

    def renewed(self, stream: str) -> None:
        """Report that a stream may have lost its content: it was created again, or its server has another store."""
        for what, restore in list(self._renewals.items()):
            self.do(stream, f"{what} of {stream}", partial(restore, stream))

    def _run(self, stream: str, jobs: _StreamJobs) -> None:
        while True:
            jobs.added.clear()
            for what, job in list(jobs.jobs.items()):
                if self._succeeds(what, job):
                    with self._lock:
                        if jobs.jobs.get(what) is job:
                            del jobs.jobs[what]
            with self._lock:
                if not jobs.jobs or self._connection.is_closed:
                    del self._streams[stream]
                    return
            jobs.added.wait(RETRY_SECONDS)

    def _succeeds(self, what: str, job: Callable[[], object]) -> bool:
        try:
            job()
        except BrokerError as error:
            # The connection itself logs an outage.
            if self._connection.is_connected and self._complaints.get(what) != str(error):
                self._complaints[what] = str(error)
                logger.error(
                    "%s: %s Trying again; everything else goes on.", what[0].upper() + what[1:], error
                )
            return False
        except Exception:
            if self._complaints.get(what) != "":
                self._complaints[what] = ""
                logger.exception("%s: an unexpected error. Trying again; everything else goes on.", what)
            return False
        if self._complaints.pop(what, None) is not None:
            logger.info("%s: in order again.", what[0].upper() + what[1:])
        return True
