"""The contenders, in the order of the report."""

from __future__ import annotations

from benchmarks.contenders.celery import CeleryRabbitmq, CeleryRedis
from benchmarks.contenders.contender import Contender
from benchmarks.contenders.dramatiq_rabbitmq import DramatiqRabbitmq
from benchmarks.contenders.dramatiq_redis import DramatiqRedis
from benchmarks.contenders.flask_celery_postgres import FlaskCeleryPostgres
from benchmarks.contenders.jetstream import Jetstream
from benchmarks.contenders.nats_bare import NatsBare
from benchmarks.contenders.nats_socket import NatsSocket
from benchmarks.contenders.order_service import FlaskEmpty, FlaskPublishing, OrderService
from benchmarks.contenders.replicated import JetstreamReplicated, RabbitmqQuorum, RedisWait
from benchmarks.contenders.stub import Stub
from benchmarks.contenders.taskiq_nats import TaskiqNats

CONTENDERS: tuple[Contender, ...] = (
    Jetstream("always"),
    Jetstream("1s"),
    DramatiqRabbitmq(),
    DramatiqRedis("everysec"),
    DramatiqRedis("always"),
    CeleryRabbitmq(),
    CeleryRedis("everysec"),
    TaskiqNats(),
    Stub(),
    NatsBare(),
    NatsSocket(),
    JetstreamReplicated("always"),
    JetstreamReplicated("1s"),
    RabbitmqQuorum(),
    RedisWait("everysec"),
    RedisWait("always"),
    OrderService(),
    FlaskCeleryPostgres(),
    FlaskPublishing(),
    FlaskEmpty(),
)


def find(name: str) -> Contender:
    for contender in CONTENDERS:
        if contender.name == name:
            return contender
    known = ", ".join(contender.name for contender in CONTENDERS)
    raise LookupError(f"there is no contender {name!r}; choose from {known}")
