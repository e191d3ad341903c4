"""Arguments that pydantic checks when they are sent and when they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

import dramatiq
import pytest
from dramatiq.middleware import AsyncIO
from pydantic import BaseModel, Field

from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.pydantic import InvalidArguments, ValidatedActor
from dramatiq_jetstream.testing import StubBroker, stub


class Order(BaseModel):
    """What the actors here are about."""

    id: int
    total: Decimal


got: list[Any] = []


def charge(order: Order, at: datetime, times: Annotated[int, Field(gt=0)] = 1, note=None) -> None:  # type: ignore[no-untyped-def]
    """Keep what arrives."""
    got.append((order, at, times, note))


async def later(order: Order) -> int:
    """Return what is next in a pipeline."""
    return order.id


@pytest.fixture
def stubbed() -> Iterator[StubBroker]:
    got.clear()
    before = dramatiq.broker.global_broker
    dramatiq.broker.global_broker = None
    with stub() as broker:
        yield broker
    dramatiq.broker.global_broker = before


def _declare(fn: Any, **options: Any) -> ValidatedActor[..., Any]:
    actor: Any = dramatiq.actor(fn, actor_class=ValidatedActor, **options)  # type: ignore[call-overload]
    assert isinstance(actor, ValidatedActor)
    return actor


def test_models_arrive_as_models(stubbed: StubBroker) -> None:
    """What is sent is JSON; what the actor gets is what its annotations say."""
    actor, order, at = _declare(charge), Order(id=7, total=Decimal("9.90")), datetime(2026, 1, 2, tzinfo=UTC)
    message = actor.send(order, at=at, note={"any": "thing"})
    assert message.args == ({"id": 7, "total": "9.90"}, "2026-01-02T00:00:00Z")
    asyncio.run(actor.asend({"id": "8", "total": 1}, "2026-01-02T00:00:00Z", times=2))
    stubbed.run()
    assert got == [(order, at, 1, {"any": "thing"}), (Order(id=8, total=Decimal(1)), at, 2, None)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (({"id": "x"}, "now"), r"order\.id: .*; order\.total: Field required; at: "),
        (({"id": 1, "total": 1}, 0, -1), "times: Input should be greater than 0"),
        ((), "missing a required argument: 'order'"),
        ((1, 2, 3, 4, 5), "too many positional arguments"),
    ],
)
def test_what_does_not_fit_raises_in_the_sender(
    stubbed: StubBroker, arguments: tuple[Any, ...], complaint: str
) -> None:
    """The error names the actor and every argument, and nothing is enqueued."""
    actor = _declare(charge)
    with pytest.raises(InvalidArguments, match=f"charge: .*{complaint}"):
        actor.send(*arguments)
    stubbed.assert_not_enqueued(actor)
    with pytest.raises(InvalidArguments):
        actor(*arguments)


def test_what_does_not_fit_at_the_worker_is_a_dead_letter_at_once(stubbed: StubBroker) -> None:
    """A message of an older program is not tried again; errors that the actor throws on purpose stay its own."""
    actor = _declare(charge, throws=KeyError)
    assert actor.options["throws"] == (KeyError, InvalidArguments)
    stubbed.enqueue(dramatiq.Message("default", "charge", ({"id": 1}, "2026-01-02"), {}, {}))
    with pytest.raises(InvalidArguments, match="total"):
        stubbed.run()
    assert stubbed.enqueued() == []


def test_a_pipeline_adds_an_argument(stubbed: StubBroker) -> None:
    """A step may lack the argument that the step before returns; a coroutine is an actor too."""
    stubbed.add_middleware(AsyncIO())
    first = _declare(later)
    second = _declare(lambda number: got.append(number), actor_name="second")
    (first.message(Order(id=5, total=Decimal(1))) | second.message()).run()
    stubbed.run()
    assert got == [5]


def test_arguments_without_names_are_refused(stubbed: StubBroker) -> None:
    """At the declaration, with the reason."""
    with pytest.raises(InvalidOption, match=r"\*args"):
        _declare(lambda *args: None, actor_name="any")
