"""Dramatiq on RabbitMQ: durable queues, persistent messages, publisher confirms."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contenders.dramatiq_app import DramatiqContender
from benchmarks.servers import RabbitServer, RedisServer, Server

if TYPE_CHECKING:
    from dramatiq import Broker
    from dramatiq.results import ResultBackend


class DramatiqRabbitmq(DramatiqContender):
    name = "dramatiq-rabbitmq"
    title = "Dramatiq / RabbitMQ"
    durability = "classic durable queue, persistent messages, publisher confirms"
    note = "results: Dramatiq's Redis backend, as there is none on RabbitMQ"
    distributions = ("dramatiq", "pika")

    def servers(self, store: Path, measurement: str) -> list[Server]:
        servers: list[Server] = [RabbitServer(store / "rabbitmq")]
        if measurement == "roundtrip":
            servers.append(RedisServer(store / "redis"))
        return servers

    def server_versions(self) -> dict[str, str]:
        return {RabbitServer.name: RabbitServer.version()}

    def unavailable(self) -> str | None:
        return RabbitServer.missing()

    def make_broker(self) -> Broker:
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        return RabbitmqBroker(url=os.environ[RabbitServer.variable], confirm_delivery=True)

    def make_results(self, broker: Broker) -> ResultBackend:
        from dramatiq.results.backends import RedisBackend

        return RedisBackend(url=os.environ[RedisServer.variable])
