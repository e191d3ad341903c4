"""Dramatiq on Redis with an append only file, synced every second or on every write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contenders.dramatiq_app import DramatiqContender
from benchmarks.servers import RedisServer, Server

if TYPE_CHECKING:
    from dramatiq import Broker
    from dramatiq.results import ResultBackend


class DramatiqRedis(DramatiqContender):
    distributions = ("dramatiq", "redis")

    def __init__(self, fsync: str) -> None:
        self.fsync = fsync
        self.name = f"dramatiq-redis-{fsync}"
        self.title = f"Dramatiq / Redis ({fsync})"
        self.durability = f"appendonly, appendfsync {fsync}"
        if fsync == "always":
            self.left_out = dict.fromkeys(("delayed", "growth", "recovery"), "as with everysec")

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return [RedisServer(store / "redis", self.fsync)]

    def server_versions(self) -> dict[str, str]:
        return {RedisServer.name: RedisServer.version()}

    def unavailable(self) -> str | None:
        return RedisServer.missing()

    def make_broker(self) -> Broker:
        from dramatiq.brokers.redis import RedisBroker

        return RedisBroker(url=os.environ[RedisServer.variable])

    def make_results(self, broker: Broker) -> ResultBackend:
        from dramatiq.results.backends import RedisBackend

        return RedisBackend(url=os.environ[RedisServer.variable])
