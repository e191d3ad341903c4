"""Celery on RabbitMQ (publisher confirms) and on Redis, late acks, a pool of threads."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders.contender import THREADS, WAIT_SECONDS, App, Contender, Tasks, delay_until, padding
from benchmarks.servers import RabbitServer, RedisServer, Server

QUEUE = "bench"


class Celery(Contender):
    environment = "celery"
    packages = ("celery[redis]",)
    fill_threads = THREADS

    def workers(self, python: str, processes: int, threads: int) -> list[list[str]]:
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
        common = [
            python,
            "-m",
            "celery",
            "-A",
            "benchmarks.worker:broker",
            "worker",
            "--queues",
            QUEUE,
            *quiet,
        ]
        pool = ["--pool", "threads", "--concurrency", str(threads)]
        # Names must differ between all workers of a broker, also between fleets.
        return [[*common, *pool, "--hostname", f"{uuid.uuid4().hex}@localhost"] for _ in range(processes)]

    def backend(self) -> str:
        raise NotImplementedError

    def broker_url(self) -> str:
        raise NotImplementedError

    def app(self) -> App:
        return CeleryApp(self)


class CeleryRabbitmq(Celery):
    name = "celery-rabbitmq"
    title = "Celery / RabbitMQ"
    durability = "classic durable queue, persistent messages, publisher confirms; late acks"
    note = "two workers with 8 threads each; results: rpc"
    distributions = ("celery", "kombu", "amqp")

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return [RabbitServer(store / "rabbitmq")]

    def server_versions(self) -> dict[str, str]:
        return {RabbitServer.name: RabbitServer.version()}

    def unavailable(self) -> str | None:
        return RabbitServer.missing()

    def broker_url(self) -> str:
        return os.environ[RabbitServer.variable].split("?")[0].replace("%2f", "/")

    def backend(self) -> str:
        return "rpc://"


class CeleryRedis(Celery):
    distributions = ("celery", "kombu", "redis")
    note = "two workers with 8 threads each; results: Redis"

    def __init__(self, fsync: str) -> None:
        self.fsync = fsync
        self.name = f"celery-redis-{fsync}"
        self.title = f"Celery / Redis ({fsync})"
        self.durability = f"appendonly, appendfsync {fsync}; late acks"

    def servers(self, store: Path, measurement: str) -> list[Server]:
        return [RedisServer(store / "redis", self.fsync)]

    def server_versions(self) -> dict[str, str]:
        return {RedisServer.name: RedisServer.version()}

    def unavailable(self) -> str | None:
        return RedisServer.missing()

    def broker_url(self) -> str:
        return os.environ[RedisServer.variable]

    def backend(self) -> str:
        return os.environ[RedisServer.variable]


class CeleryApp(App):
    def __init__(self, contender: Celery) -> None:
        import celery

        tasks = Tasks()
        self.padding = padding()
        results = os.environ.get("BENCH_MEASUREMENT") == "roundtrip"
        self.broker = celery.Celery("bench", broker=contender.broker_url())
        self.broker.conf.update(
            task_acks_late=True,
            task_ignore_result=not results,
            task_default_queue=QUEUE,
            broker_connection_retry_on_startup=True,
        )
        if results:
            self.broker.conf.result_backend = contender.backend()
        if isinstance(contender, CeleryRabbitmq):
            self.broker.conf.broker_transport_options = {"confirm_publish": True}

        # Celery reads the parameters from a function's source name, so these cannot be lambdas.
        @self.broker.task(name="noop")
        def noop(index: int, padding: str = "") -> None:
            tasks.noop(index)

        @self.broker.task(name="hold")
        def hold(index: int) -> None:
            tasks.hold(index)

        @self.broker.task(name="answer")
        def answer(index: int) -> int:
            return tasks.answer(index)

        self.noop, self.hold, self.answer = noop, hold, answer

    def enqueue(self, index: int = -1) -> None:
        self.noop.delay(index, *self.padding)

    def enqueue_batch(self, indices: Sequence[int]) -> None:
        with self.broker.producer_or_acquire() as producer:
            for index in indices:
                self.noop.apply_async((index, *self.padding), producer=producer)

    def enqueue_delayed(self, indices: Sequence[int], due_ns: int) -> None:
        for index in indices:
            self.noop.apply_async((index,), countdown=delay_until(due_ns) / 1000)

    def enqueue_hold(self, index: int) -> None:
        self.hold.delay(index)

    def ask(self, index: int) -> int:
        answer: int = self.answer.delay(index).get(timeout=WAIT_SECONDS)
        return answer

    def close(self) -> None:
        self.broker.close()
