"""The floors that the broker and the service must reach, judged on the figures of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.run import Outcome

OURS = "jetstream"

#: Beside peers that may lose the last second on power loss, too.
OURS_1S = "jetstream-1s"

#: On three servers, and what it is compared with there.
OURS_R3, QUORUM = "jetstream-r3", "dramatiq-rabbitmq-quorum"


@dataclass(frozen=True)
class Value:
    """One median of a run, of the case that begins with `case`."""

    measurement: str
    contender: str
    figure: str
    case: str = ""

    def find(self, outcomes: Sequence[Outcome]) -> float | None:
        for outcome in outcomes:
            if outcome.measurement.name == self.measurement:
                rows = [row for row in outcome.rows if row.contender.name == self.contender]
                rows = [row for row in rows if row.case.startswith(self.case)]
                summary = rows[0].summary(self.figure) if rows else None
                return summary.median if summary else None
        return None


@dataclass(frozen=True)
class Floor:
    """`value`, divided by `beside` if there is one, is at least or at most `limit`."""

    what: str
    limit: float
    value: Value
    beside: Value | None = None
    at_most: bool = False
    unit: str = "×"

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g} {self.unit}"

    def judge(self, outcomes: Sequence[Outcome]) -> Verdict | None:
        """None where the run did not measure what the floor is about."""
        value = self.value.find(outcomes)
        beside = self.beside.find(outcomes) if self.beside else 1.0
        if value is None or not beside:
            return None
        measured = value / beside
        reached = measured <= self.limit if self.at_most else measured >= self.limit
        return Verdict(self, measured, reached)


@dataclass(frozen=True)
class Verdict:
    floor: Floor
    measured: float
    reached: bool

    @property
    def text(self) -> str:
        return f"{self.measured:.3g} {self.floor.unit}"


def _drain(contender: str) -> Value:
    return Value("drain", contender, "per_second")


def _enqueue(contender: str, case: str) -> Value:
    return Value("enqueue", contender, "per_second", case)


def _telemetry(contender: str, case: str) -> Value:
    return Value("telemetry", contender, "per_second", case)


def _sustained(contender: str, figure: str = "per_second") -> Value:
    return Value("sustained", contender, figure)


def _cluster(contender: str, case: str) -> Value:
    return Value("cluster", contender, "per_second", case)


FLOORS = (
    Floor("drain beside Dramatiq / RabbitMQ", 2.5, _drain(OURS), _drain("dramatiq-rabbitmq")),
    Floor(
        "the same with sync_interval 1s, which is less durable",
        2.5,
        _drain(OURS_1S),
        _drain("dramatiq-rabbitmq"),
    ),
    Floor(
        "drain until all acks are handled, beside Dramatiq / RabbitMQ",
        2.5,
        Value("drain", OURS, "settled_per_second"),
        _drain("dramatiq-rabbitmq"),
    ),
    Floor(
        "the same with sync_interval 1s, where acks are not synced",
        2.5,
        Value("drain", OURS_1S, "settled_per_second"),
        _drain("dramatiq-rabbitmq"),
    ),
    Floor(
        "drain beside Dramatiq / Redis, both every second",
        6,
        _drain(OURS_1S),
        _drain("dramatiq-redis-everysec"),
    ),
    Floor("drain beside Celery / RabbitMQ", 8, _drain(OURS), _drain("celery-rabbitmq")),
    Floor(
        "drain beside Celery / Redis, both every second", 8, _drain(OURS_1S), _drain("celery-redis-everysec")
    ),
    Floor("drain beside taskiq-nats", 1.5, _drain(OURS), _drain("taskiq-nats")),
    Floor("drain beside one StubBroker process", 0.8, _drain(OURS), _drain("stub")),
    Floor(
        "enqueue beside Dramatiq / RabbitMQ with confirms, one thread",
        2.5,
        _enqueue(OURS, "1 thread"),
        _enqueue("dramatiq-rabbitmq", "1 thread"),
    ),
    Floor(
        "the same with sync_interval 1s, which is less durable",
        2.5,
        _enqueue(OURS_1S, "1 thread"),
        _enqueue("dramatiq-rabbitmq", "1 thread"),
    ),
    Floor(
        "enqueue beside Dramatiq / Redis, eight threads, both every second",
        2,
        _enqueue(OURS_1S, "8 threads"),
        _enqueue("dramatiq-redis-everysec", "8 threads"),
    ),
    # 30,000 a second where awaited publishes of nats-py reach 6,000.
    Floor(
        "batch enqueue beside awaited nats-py",
        5,
        Value("batch", OURS, "per_second", "each"),
        _enqueue("nats-py", "1 thread"),
    ),
    Floor(
        "latency p50 beside Dramatiq / RabbitMQ",
        1,
        Value("latency", OURS, "p50_ms"),
        Value("latency", "dramatiq-rabbitmq", "p50_ms"),
        at_most=True,
    ),
    Floor(
        "drain with 1,000,000 waiting beside that with 10,000",
        0.9,
        Value("growth", OURS, "per_second", "1,000,000"),
        Value("growth", OURS, "per_second", "10,000"),
    ),
    Floor(
        "worker memory with 100,000 delayed",
        5,
        Value("delayed", OURS, "growth_mb", "100,000"),
        at_most=True,
        unit="MB",
    ),
    Floor(
        "drain instrumented, with traces that are not sampled, beside not instrumented",
        0.85,
        _telemetry(OURS, "not sampled"),
        _telemetry(OURS, "without"),
    ),
    Floor(
        "the same with sync_interval 1s, where there is less to wait for",
        0.85,
        _telemetry(OURS_1S, "not sampled"),
        _telemetry(OURS_1S, "without"),
    ),
    Floor(
        "orders accepted beside the empty Flask endpoint",
        0.4,
        Value("orders", "order-service", "accepted_per_second", "accept"),
        Value("orders", "flask-empty", "accepted_per_second", "accept"),
    ),
    Floor(
        "orders end to end", 250, Value("orders", "order-service", "confirmed_per_second", "burst"), unit="/s"
    ),
    Floor(
        "orders end to end beside Flask + Celery + RabbitMQ + PostgreSQL",
        2,
        Value("orders", "order-service", "confirmed_per_second", "burst"),
        Value("orders", "flask-celery-postgres", "confirmed_per_second", "burst"),
    ),
    Floor(
        "send and run at once beside Dramatiq / RabbitMQ",
        2,
        _sustained(OURS),
        _sustained("dramatiq-rabbitmq"),
    ),
    Floor(
        "send and run at once beside Dramatiq / Redis, both on every write",
        1.5,
        _sustained(OURS),
        _sustained("dramatiq-redis-always"),
    ),
    Floor(
        "send and run at once beside Dramatiq / Redis, both every second",
        1.5,
        _sustained(OURS_1S),
        _sustained("dramatiq-redis-everysec"),
    ),
    Floor(
        "p99 at half load beside Dramatiq / RabbitMQ",
        1,
        _sustained(OURS, "half_p99_ms"),
        _sustained("dramatiq-rabbitmq", "half_p99_ms"),
        at_most=True,
    ),
    Floor(
        "p99 at half load beside Dramatiq / Redis, both on every write",
        1,
        _sustained(OURS, "half_p99_ms"),
        _sustained("dramatiq-redis-always", "half_p99_ms"),
        at_most=True,
    ),
    Floor(
        "three servers: drain beside quorum queues",
        2,
        _cluster(OURS_R3, "drain"),
        _cluster(QUORUM, "drain"),
    ),
    Floor(
        "three servers: send and run at once beside quorum queues",
        2,
        _cluster(OURS_R3, "sustained"),
        _cluster(QUORUM, "sustained"),
    ),
    Floor(
        "messages of an idle process with 20 queues of 9 priorities",
        1,
        Value("idle", OURS, "messages_per_second", "20 queues"),
        at_most=True,
        unit="/s",
    ),
)


def judge(outcomes: Sequence[Outcome]) -> list[Verdict]:
    return [verdict for floor in FLOORS if (verdict := floor.judge(outcomes)) is not None]
