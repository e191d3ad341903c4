"""The brokers on three servers, each message on at least two of them before its enqueue returns."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.clusters import nats_cluster, rabbit_cluster, redis_replicas
from benchmarks.contenders.dramatiq_app import QUEUE
from benchmarks.contenders.dramatiq_rabbitmq import DramatiqRabbitmq
from benchmarks.contenders.dramatiq_redis import DramatiqRedis
from benchmarks.contenders.jetstream import Jetstream
from benchmarks.servers import RabbitServer, RedisServer, Server

if TYPE_CHECKING:
    from dramatiq import Broker

#: How long a message may wait for its second copy, in milliseconds.
COPY_TIMEOUT_MS = 5_000


class JetstreamReplicated(Jetstream):
    only = ("cluster",)
    replicas = 3

    def __init__(self, sync: str) -> None:
        super().__init__(sync)
        self.name = f"{self.name}-r3"
        self.title = f"{self.title}, 3 replicas"
        self.durability = f"three nodes, three replicas, sync_interval {sync}"

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return nats_cluster(store, self.sync)

    def leader(self, servers: list[Server]) -> Server:
        """The node that leads the stream of the queue."""
        from dramatiq_jetstream import JetStreamBroker

        broker = JetStreamBroker(servers[0].url, declare=False, middleware=[])
        try:
            info = broker.connection.api(f"STREAM.INFO.{broker.names.queue_stream(QUEUE)}")
        finally:
            broker.close()
        return servers[int(info["cluster"]["leader"].removeprefix("n")) - 1]

    def wait_until_settled(self, urls: list[str], timeout: int) -> bool:
        return super().wait_until_settled(urls[0].split(","), timeout)


class RabbitmqQuorum(DramatiqRabbitmq):
    name = "dramatiq-rabbitmq-quorum"
    title = "Dramatiq / RabbitMQ, quorum queue"
    durability = "three nodes, quorum queue, publisher confirms"
    note = "the leader that is lost is the node that clients connect to, which has declared the queue"
    only = ("cluster",)

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return rabbit_cluster(store)

    def make_broker(self) -> Broker:
        from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL, RabbitmqBroker
        from dramatiq.common import xq_name

        kind = {"x-queue-type": "quorum"}

        class QuorumBroker(RabbitmqBroker):
            """All three of a queue's queues are replicated: another kind cannot be declared while its node is away."""

            def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
                return {**super()._build_queue_arguments(queue_name), **kind}

            def _declare_xq_queue(self, queue_name: str) -> Any:
                arguments = {"x-message-ttl": DEAD_MESSAGE_TTL, **kind}
                return self.channel.queue_declare(xq_name(queue_name), durable=True, arguments=arguments)

        return QuorumBroker(url=os.environ[RabbitServer.variable], confirm_delivery=True)

    def leader(self, servers: list[Server]) -> Server:
        """The first node: clients try it first, and a queue's leader is where it was declared."""
        return servers[0]


class RedisWait(DramatiqRedis):
    only = ("cluster",)

    def __init__(self, fsync: str) -> None:
        super().__init__(fsync)
        self.name = f"dramatiq-redis-{fsync}-wait"
        self.title = f"Dramatiq / Redis ({fsync}), 2 replicas and WAIT"
        self.durability = f"primary and two replicas, appendfsync {fsync}, WAIT 1 after each enqueue"
        self.note = "no failover: that needs Sentinel or Cluster, which Dramatiq's broker does not know"

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return redis_replicas(store, self.fsync)

    def make_broker(self) -> Broker:
        import redis
        from dramatiq.brokers.redis import RedisBroker

        url = os.environ[RedisServer.variable]

        class WaitingBroker(RedisBroker):
            """WAIT counts what its own connection wrote, so each thread has one connection for both."""

            own = threading.local()

            def do_enqueue(self, *arguments: Any) -> None:
                if not hasattr(self.own, "client"):
                    self.own.client = redis.Redis.from_url(url, single_connection_client=True)
                stored = [
                    "enqueue",
                    int(time.time() * 1000),
                    arguments[0],
                    self.broker_id,
                    self.heartbeat_timeout,
                    self.dead_message_ttl,
                    self._should_do_maintenance("enqueue"),
                    self._max_unpack_size(),
                    *arguments[1:],
                ]
                self.scripts["dispatch"](args=stored, keys=[self.namespace], client=self.own.client)
                if self.own.client.wait(1, COPY_TIMEOUT_MS) < 1:
                    raise RuntimeError(f"no replica had the message within {COPY_TIMEOUT_MS} ms")

        return WaitingBroker(url=url)
