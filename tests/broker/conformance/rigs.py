"""What a test must see and do behind each broker: count what waits, add foreign bytes, lose a queue.

A rig holds one broker and speaks to its storage in the storage's own way, so that the tests need not.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pika
import redis
from dramatiq import Broker, MessageProxy, QueueJoinTimeout, Worker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import MAINTENANCE_SCALE, RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.common import dq_name, xq_name
from dramatiq.rate_limits import RateLimiterBackend
from dramatiq.rate_limits import backends as limits_backends
from dramatiq.results import ResultBackend
from dramatiq.results import backends as results_backends
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.polling import eventually


def nowhere(url: str) -> str:
    """Return `url` with a port on which nothing listens."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:1"))


class Rig(ABC):
    """One broker under test. `url` and `namespace` say where it keeps its messages."""

    broker: Broker

    def __init__(self, url: str, namespace: str, **options: Any) -> None:
        self.url = url
        self.namespace = namespace
        self.broker = self.make(url, **options)

    @abstractmethod
    def make(self, url: str | list[str], **options: Any) -> Broker:
        """Return a broker on this storage; called again, it is what another process would have."""

    @abstractmethod
    def drain(self, queue: str, worker: Worker, *, timeout: int = 10_000) -> None:
        """Wait until nothing of the queue is ready, delayed or in progress."""

    @abstractmethod
    def waiting(self, queue: str) -> int:
        """Count the messages that are ready and that no consumer holds."""

    @abstractmethod
    def delayed(self, queue: str) -> int:
        """Count the messages that are stored with a delay; those in a worker's memory do not count."""

    @abstractmethod
    def dead(self, queue: str) -> int:
        """Count the dead letters of the queue."""

    def expect(self, queue: str, **counts: int) -> None:
        """Wait until `waiting`, `delayed` and `dead` are as given: some servers count after they have answered."""

        def as_given() -> bool:
            seen = {name: getattr(self, name)(queue) for name in counts}
            assert seen == counts
            return True

        eventually(as_given, timeout=5, message=f"{counts} in {queue!r}")

    @abstractmethod
    def put(self, queue: str, body: bytes) -> None:
        """Store bytes as a ready message of the queue, as a program without Dramatiq would."""

    def results(self) -> ResultBackend:
        """The result backend that a program would use beside this broker."""
        return results_backends.StubBackend(namespace=self.namespace)

    def limits(self) -> RateLimiterBackend:
        """The rate limiter backend that a program would use beside this broker."""
        return limits_backends.StubBackend()

    def requeue(self, queue: str) -> None:  # noqa: B027 - most need nothing
        """Do what the storage needs to notice that a consumer is gone."""

    def expire_dead_letters(self, queue: str) -> None:  # noqa: B027 - most need nothing
        """Do what the storage needs to drop dead letters that are too old."""

    @contextmanager
    def another(self, *, url: str | list[str] | None = None, **options: Any) -> Iterator[Broker]:
        """Yield a second broker on the same storage, as another process would have it."""
        broker = self.make(url or self.url, **options)
        try:
            yield broker
        finally:
            broker.close()

    def unreachable(self) -> Broker:
        """Return a broker for an address where nothing answers, which gives up quickly."""
        return self.make(nowhere(self.url))

    def has_queue(self, queue: str) -> bool:
        """Tell whether the queue exists on the server."""
        raise NotImplementedError(f"{type(self).__name__} has no queues to look for.")

    def lose_queue(self, queue: str) -> None:
        """Delete the queue behind the broker's back."""
        raise NotImplementedError(f"{type(self).__name__} has no queues to lose.")

    def foreign(self, message: MessageProxy) -> MessageProxy:
        """Return a message that looks as if it came from this broker, but did not."""
        return MessageProxy(message.copy())

    def close(self) -> None:
        """Remove what the test stored, and close the broker."""
        self.broker.close()


class StubRig(Rig):
    """Dramatiq's in-memory broker: the reference for everything that needs no storage."""

    broker: StubBroker

    def make(self, url: str | list[str], **options: Any) -> StubBroker:
        return StubBroker(fail_fast_default=False, **options)

    def drain(self, queue: str, worker: Worker, *, timeout: int = 10_000) -> None:
        self.broker.join(queue, timeout=timeout)

    def waiting(self, queue: str) -> int:
        return self.broker.queues[queue].qsize()

    def delayed(self, queue: str) -> int:
        return self.broker.queues[dq_name(queue)].qsize()

    def dead(self, queue: str) -> int:
        # A message that died while it was delayed is filed under the delay queue.
        letters = self.broker.dead_letters_by_queue
        return len(letters[queue]) + len(letters[dq_name(queue)])

    def put(self, queue: str, body: bytes) -> None:
        self.broker.queues[queue].put(body)


class RedisRig(Rig):
    """Dramatiq's Redis broker."""

    broker: RedisBroker

    def make(self, url: str | list[str], **options: Any) -> RedisBroker:
        if "client" not in options:
            options["url"] = url
        return RedisBroker(namespace=self.namespace, **options)

    def drain(self, queue: str, worker: Worker, *, timeout: int = 10_000) -> None:
        self.broker.join(queue, interval=20, timeout=timeout)

    def waiting(self, queue: str) -> int:
        return int(self.broker.client.llen(f"{self.namespace}:{queue}"))

    def delayed(self, queue: str) -> int:
        return int(self.broker.client.llen(f"{self.namespace}:{dq_name(queue)}"))

    def dead(self, queue: str) -> int:
        return int(self.broker.client.zcard(f"{self.namespace}:{xq_name(queue)}"))

    def put(self, queue: str, body: bytes) -> None:
        # The broker settles by an id of its own inside the message, which a foreign one would have to bring.
        message = json.loads(body)
        message["options"]["redis_message_id"] = identity = str(uuid4())
        self.broker.do_enqueue(queue, identity, json.dumps(message).encode())

    def unreachable(self) -> RedisBroker:
        # The client's own retries would take seconds.
        url = nowhere(self.url)
        return self.make(url, client=redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)))

    def results(self) -> ResultBackend:
        return results_backends.RedisBackend(url=self.url, namespace=f"{self.namespace}:results")

    def limits(self) -> RateLimiterBackend:
        return limits_backends.RedisBackend(url=self.url)

    def requeue(self, queue: str) -> None:
        with self.another(heartbeat_timeout=0, maintenance_chance=MAINTENANCE_SCALE) as other:
            other.do_qsize(queue)

    def expire_dead_letters(self, queue: str) -> None:
        maintenance_chance, self.broker.maintenance_chance = self.broker.maintenance_chance, MAINTENANCE_SCALE
        try:
            self.broker.do_qsize(queue)
        finally:
            self.broker.maintenance_chance = maintenance_chance

    def foreign(self, message: MessageProxy) -> MessageProxy:
        return MessageProxy(message.copy(options={"redis_message_id": "not-a-message-of-this-consumer"}))

    def close(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            for key in client.scan_iter(match=f"{self.namespace}:*", count=1000):
                client.delete(key)
        self.broker.client.connection_pool.disconnect()
        super().close()


class RabbitmqRig(Rig):
    """Dramatiq's RabbitMQ broker, with confirms: without them a queue that is gone goes unnoticed."""

    broker: RabbitmqBroker

    def __init__(self, url: str, namespace: str, **options: Any) -> None:
        super().__init__(url, namespace, **options)
        self._admin = pika.BlockingConnection(pika.URLParameters(url))

    def make(self, url: str | list[str], **options: Any) -> RabbitmqBroker:
        return RabbitmqBroker(url=url, confirm_delivery=True, **options)

    def drain(self, queue: str, worker: Worker, *, timeout: int = 10_000) -> None:
        # The server counts what it has not sent, Dramatiq's consumer what it handed on, pika what is between.
        # What is on the wire at this moment is in none of them: hence several looks.
        deadline = time.monotonic() + timeout / 1000
        quiet = 0
        while quiet < 3:
            if time.monotonic() > deadline:
                raise QueueJoinTimeout(queue)
            held = sum(
                len(thread.consumer.known_tags) + thread.consumer.channel.get_waiting_message_count()
                for name, thread in worker.consumers.items()
                if name in (queue, dq_name(queue)) and thread.consumer is not None
            )
            quiet = quiet + 1 if held + self.waiting(queue) + self.delayed(queue) == 0 else 0
            time.sleep(0.015)

    def _count(self, name: str) -> int:
        # A passive declaration of a queue that is not there closes the channel.
        channel = self._admin.channel()
        try:
            count = int(channel.queue_declare(name, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker:
            return 0
        channel.close()
        return count

    def waiting(self, queue: str) -> int:
        return self._count(queue)

    def delayed(self, queue: str) -> int:
        return self._count(dq_name(queue))

    def dead(self, queue: str) -> int:
        return self._count(xq_name(queue))

    def put(self, queue: str, body: bytes) -> None:
        self.broker.declare_queue(queue, ensure=True)
        channel = self._admin.channel()
        channel.confirm_delivery()
        channel.basic_publish("", queue, body)
        channel.close()

    def has_queue(self, queue: str) -> bool:
        channel = self._admin.channel()
        try:
            channel.queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        channel.close()
        return True

    def lose_queue(self, queue: str) -> None:
        channel = self._admin.channel()
        channel.queue_delete(queue)
        channel.close()

    def foreign(self, message: MessageProxy) -> MessageProxy:
        copy = MessageProxy(message.copy())
        copy._tag = 4242  # type: ignore[attr-defined]
        return copy

    def close(self) -> None:
        channel = self._admin.channel()
        for queue in self.broker.get_declared_queues():
            for name in (queue, dq_name(queue), xq_name(queue)):
                channel.queue_delete(name)
        self._admin.close()
        super().close()
