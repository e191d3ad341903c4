"""What the suites need to know about our own implementations; imported only when those are tested."""

from __future__ import annotations

from typing import Any

from dramatiq import Worker
from dramatiq.rate_limits import RateLimiterBackend
from dramatiq.results import ResultBackend
from dramatiq_abort import EventBackend

from dramatiq_jetstream import JetStreamBroker
from tests.broker.conformance.implementations import NOT_YET
from tests.broker.conformance.rigs import Rig, nowhere


class JetStreamRig(Rig):
    """Our broker."""

    broker: JetStreamBroker

    def make(self, url: str | list[str], **options: Any) -> JetStreamBroker:
        return JetStreamBroker(url=url, namespace=self.namespace, **options)

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
        if "results/jetstream" in NOT_YET:
            return super().results()
        from dramatiq_jetstream.results import JetStreamBackend

        return JetStreamBackend(self.broker)

    def limits(self) -> RateLimiterBackend:
        if "limits/jetstream" in NOT_YET:
            return super().limits()
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


class _OwnBroker:
    """Gives a backend a broker of its own, so that the suite can close both through the backend."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._broker_of_test: JetStreamBroker = args[0]

    def close(self) -> None:
        self._broker_of_test.close()


def make_results(url: str, namespace: str, **options: Any) -> ResultBackend:
    from dramatiq_jetstream.results import JetStreamBackend

    class Backend(_OwnBroker, JetStreamBackend):  # type: ignore[misc]
        pass

    broker = JetStreamBroker(url=url, namespace=namespace, middleware=[])
    return Backend(broker, namespace=namespace, **options)


def make_limits(url: str, namespace: str, **options: Any) -> RateLimiterBackend:
    from dramatiq_jetstream.rate_limits import JetStreamBackend

    class Backend(_OwnBroker, JetStreamBackend):  # type: ignore[misc]
        pass

    return Backend(JetStreamBroker(url=url, namespace=namespace, middleware=[]), **options)


def make_aborts(url: str, namespace: str, **options: Any) -> EventBackend:
    from dramatiq_jetstream.abort import JetStreamBackend

    class Backend(_OwnBroker, JetStreamBackend):  # type: ignore[misc]
        pass

    return Backend(JetStreamBroker(url=url, namespace=namespace, middleware=[]), **options)
