"""Workers that run inside a test, and a middleware that writes down what it is told."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from dramatiq import Broker, Worker
from dramatiq.middleware import Middleware

from tests.support.polling import eventually


@contextmanager
def running(
    broker: Broker,
    *,
    threads: int = 4,
    timeout: int = 50,
    queues: Collection[str] | None = None,
    prefetch: int | None = None,
) -> Iterator[Worker]:
    """Run a worker for the length of the block, and stop it gracefully at the end."""
    worker = Worker(
        broker, worker_timeout=timeout, worker_threads=threads, queues=set(queues) if queues else None
    )
    if prefetch is not None:
        worker.queue_prefetch = prefetch
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(timeout=20_000)


def consuming(worker: Worker, queue: str) -> bool:
    """Tell whether the worker's consumer of the queue has been made."""
    thread = worker.consumers.get(queue)
    return thread is not None and thread.consumer is not None


def pause_threads(worker: Worker) -> None:
    """Pause the threads that run actors; the consumers go on fetching."""
    for thread in worker.workers:
        thread.pause()
    for thread in worker.workers:
        assert thread.paused_event.wait(timeout=30), "a worker thread did not pause"


def resume_threads(worker: Worker) -> None:
    for thread in worker.workers:
        thread.resume()


class Recorder(Middleware):
    """Records every signal in the order in which it came, as (name, message id or queue or None)."""

    SIGNALS = frozenset(name for name in dir(Middleware) if name.startswith(("before_", "after_")))

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._signals: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in Recorder.SIGNALS:
            return super().__getattribute__(name)

        def record(broker: Broker, subject: Any = None, *rest: Any, **keywords: Any) -> None:
            with self._lock:
                self._signals.append((name, getattr(subject, "message_id", subject)))

        return record

    def of(self, subject: Any) -> list[str]:
        """Return the names of the signals about one message id, queue, or other subject."""
        with self._lock:
            return [name for name, about in self._signals if about == subject]

    def names(self) -> list[str]:
        with self._lock:
            return [name for name, _ in self._signals]

    def wait_for(self, name: str, subject: Any, *, count: int = 1) -> None:
        eventually(
            lambda: self.of(subject).count(name) >= count, message=f"{name} of {subject!r} ({count} times)"
        )
