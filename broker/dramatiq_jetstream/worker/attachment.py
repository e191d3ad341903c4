"""Replaces parts of Dramatiq's `Worker`, and returns its unstarted messages to the server.

A worker that stops or is held up has messages in its work queue that no thread has started. They go back to the server
at once, for other workers to take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dramatiq.broker import MessageProxy
from dramatiq.common import iter_queue
from dramatiq.worker import Worker

from .attempts import Attempts
from .consumer import JetStreamConsumer
from .delivery import MOMENT_SECONDS, Delivery
from .follow_ups import FollowUps
from .limits import Limits
from .message import JetStreamMessage
from .recorder import Recorder
from .rerouting import Rerouter
from .suspects import Suspects
from .tally import Tally
from .vitals import Vitals
from .work_queue import WorkQueue

__all__ = ["Attachment"]


@dataclass
class _Item:
    """What Dramatiq's threads take from the work queue."""

    priority: int
    message: JetStreamMessage


class Attachment:
    """The worker of this process, if there is one.

    Attributes:
      tallies: How the attempts of each of its threads ended.
      is_quiet: Whether this process takes no more messages.
    """

    def __init__(
        self,
        rerouter: Rerouter,
        follow_ups: FollowUps,
        suspects: Suspects,
        recorder: Recorder,
        limits: Callable[[Callable[[JetStreamMessage], None]], Limits],
        vitals: Vitals,
    ) -> None:
        self._rerouter = rerouter
        self._follow_ups = follow_ups
        self._suspects = suspects
        self._recorder = recorder
        self._vitals = vitals
        self.limits = limits(self._put_back)
        self._worker: Worker | None = None
        self._is_stopping = False
        self.tallies: list[Tally] = []
        self._attempts: list[Attempts] = []
        self.is_quiet = False

    def detach(self) -> None:
        """Drop the worker: in the child of a fork, the parent's has no threads."""
        self._worker = None
        self.tallies = []
        self._attempts = []
        self.limits.reset()
        self._vitals.watch(None)

    def attach(self, worker: Any) -> None:
        """Give a booting worker our work queue, before it makes the threads that use it."""
        self._worker = worker
        self._is_stopping = False
        worker.work_queue = WorkQueue()
        self._vitals.watch(worker)

    def replace_attempts(self, worker_thread: Any) -> None:
        """Run messages our way; called on the thread itself before its first one."""
        tally = Tally()
        self.tallies.append(tally)
        attempts = Attempts(
            worker_thread,
            self._follow_ups,
            self._rerouter,
            self._suspects,
            self._recorder,
            self.limits,
            tally,
        )
        worker_thread.process_message = attempts.process_message
        self._attempts.append(attempts)

    @staticmethod
    def pass_over_delayed(consumer_thread: Any) -> None:
        """Look for delayed messages only where there are some; called on the thread itself before its first message.

        After each message a consumer thread of Dramatiq's asks its queue for them, and catches the exception that says
        that it is empty. Here it always is, because the server keeps what is delayed. Without this, a message that
        does nothing costs a worker 4 % more CPU.
        """
        handle = consumer_thread.handle_delayed_messages

        def handle_if_any() -> None:
            if consumer_thread.delay_queue.queue:
                handle()

        consumer_thread.handle_delayed_messages = handle_if_any

    def running(self) -> list[tuple[MessageProxy, float]]:
        """The messages that run now, and the time since; on the presence thread."""
        for attempts in list(self._attempts):
            if not attempts.is_alive and attempts.running is None:
                self._attempts.remove(attempts)
        return [running for attempts in self._attempts if (running := attempts.running) is not None]

    def be_quiet(self, worker: Worker | None = None) -> None:
        """Take no more messages while this process lives, not even with consumers that are opened later."""
        self.is_quiet = True
        if worker is not None:
            self.stop_consuming(worker)

    def stop_consuming(self, worker: Worker) -> None:
        """Return a stopping worker's unstarted messages at once, however long its running actors take."""
        threads = worker.consumers.values()
        consumers = [t.consumer for t in threads if isinstance(t.consumer, JetStreamConsumer)]
        for consumer in consumers:
            consumer.stop_pulling()
        self._worker = worker
        self._is_stopping = True
        self.limits.requeue_held()
        for consumer in consumers:
            self.return_unstarted(consumer.queue_name, 0)

    def _put_back(self, message: JetStreamMessage) -> None:
        """Have a message that was held begin once more."""
        if self._worker is None or self._is_stopping:
            self._rerouter.requeue(message._delivery)
        else:
            priority = self._worker.broker.get_actor(message.actor_name).priority
            work_queue: Any = self._worker.work_queue  # ours, see `attach`
            work_queue.put(_Item(priority, message))

    def is_held_up(self) -> bool:
        """Whether all threads of the worker are busy, and none has begun a message for a moment."""
        worker = self._worker
        if worker is None or not worker.workers:
            return False
        begun = [since for _, since in self.running()]
        return len(begun) >= len(worker.workers) and time.time() - max(begun) >= MOMENT_SECONDS

    def waiting(self, queue_name: str) -> list[Delivery]:
        """The deliveries of a queue that wait for a thread, as far as another thread can see them."""
        work_queue: Any = None if self._worker is None else self._worker.work_queue
        if work_queue is None:
            return []
        messages = [item.message for item in work_queue.waiting()]
        return [
            message._delivery
            for message in messages
            if isinstance(message, JetStreamMessage) and message.queue_name == queue_name
        ]

    def return_unstarted(self, queue_name: str, keep: int, only_waiting: bool = False) -> None:
        """Return unstarted messages of a queue to the server, keeping at most `keep`.

        Parameters:
          only_waiting: Return only those that have waited for a moment.
        """
        if self._worker is None:
            return
        work_queue = self._worker.work_queue
        for item in list(iter_queue(work_queue)):
            message = item.message
            ours = (
                isinstance(message, JetStreamMessage)
                and message.queue_name == queue_name
                and (message._delivery.may_go_back or not only_waiting)
            )
            if ours and keep <= 0:
                self._rerouter.requeue(message._delivery)
            else:
                keep -= ours
                work_queue.put(item)
            work_queue.task_done()
