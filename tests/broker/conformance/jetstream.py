"""What the suites need to know about our own implementations; imported only when those are tested."""

from __future__ import annotations

from typing import Any

from dramatiq import Worker
from dramatiq.rate_limits import RateLimiterBackend
from dramatiq.results import ResultBackend
from dramatiq_abort import EventBackend

from dramatiq_jetstream import JetStreamBroker
from tests.broker.conformance.rigs import Rig, nowhere


class JetStreamRig(Rig):
    """Our broker."""

    broker: JetStreamBroker

    def make(self, url: str | list[str], **options: Any) -> JetStreamBroker:
        # As other brokers do, make a dead letter at once of what no actor is for.
        return JetStreamBroker(url=url, namespace=self.namespace, **{"unknown_actor_grace": 0, **options})

    def drain(self, queue: str, worker: Worker, *, timeout: int = 10_000) -> None:
        self.broker.join(queue, interval=20, timeout=timeout)

    def waiting(self, queue: str) -> int:
        return self.broker.queue_stats(queue).ready

    def delayed(self, queue: str) -> int:
        return self.broker.queue_stats(queue).delayed

    def dead(self, queue: str) -> int:
        return self.broker.queue_stats(queue).dead

    def put(self, queue: str, body: bytes) -> None:
        # A stream is there only once the queue was used; the broker's own way to it is to consume.
        self.broker.consume(queue, timeout=1).close()
        self.broker.connection.publish(self.broker.names.task(queue), body)

    def results(self) -> ResultBackend:
        from dramatiq_jetstream.results import JetStreamBackend

        return JetStreamBackend(self.broker)

    def limits(self) -> RateLimiterBackend:
        from dramatiq_jetstream.rate_limits import JetStreamBackend

        return JetStreamBackend(self.broker)

    def unreachable(self) -> JetStreamBroker:
        return self.make(nowhere(self.url), enqueue_timeout=500)

    def has_queue(self, queue: str) -> bool:
        names = (
            self.broker.connection.api("STREAM.NAMES", {"subject": f"{self.namespace}.>"})["streams"] or []
        )
        return self.broker.names.queue_stream(queue) in names

    def lose_queue(self, queue: str) -> None:
        self.broker.connection.api(f"STREAM.DELETE.{self.broker.names.queue_stream(queue)}")

    def close(self) -> None:
        own = self.broker.connection.api("STREAM.NAMES", {"subject": f"{self.namespace}.>"})["streams"] or []
        buckets = self.broker.connection.api("STREAM.NAMES", {"subject": f"$KV.{self.namespace}-*.>"})[
            "streams"
        ]
        for stream in {*own, *(buckets or [])}:
            self.broker.connection.api(f"STREAM.DELETE.{stream}")
        super().close()


class PrioritiesRig(JetStreamRig):
    """Our broker with priorities."""

    def make(self, url: str | list[str], **options: Any) -> JetStreamBroker:
        return super().make(url, **{"max_priority": 3, **options})


def make_results(url: str, namespace: str, **options: Any) -> ResultBackend:
    from dramatiq_jetstream.results import JetStreamBackend

    return _with_own_broker(JetStreamBackend, url, namespace, {"namespace": namespace, **options})


def make_limits(url: str, namespace: str, **options: Any) -> RateLimiterBackend:
    from dramatiq_jetstream.rate_limits import JetStreamBackend

    return _with_own_broker(JetStreamBackend, url, namespace, options)


def make_aborts(url: str, namespace: str, **options: Any) -> EventBackend:
    from dramatiq_jetstream.abort import JetStreamBackend

    return _with_own_broker(JetStreamBackend, url, namespace, options)


def _with_own_broker(backend: type[Any], url: str, namespace: str, options: dict[str, Any]) -> Any:
    """Make a backend as another process would have it: with a broker of its own, closed with the backend."""
    broker = JetStreamBroker(url=url, namespace=namespace, middleware=[])

    class WithOwnBroker(backend):  # type: ignore[misc]
        def close(self) -> None:
            if hasattr(super(), "close"):
                super().close()
            broker.close()

    return WithOwnBroker(broker, **options)
