"""`group`: Dramatiq's, with its messages enqueued together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from dramatiq.broker import Broker
from dramatiq.composition import group as dramatiq_group
from dramatiq.composition import pipeline
from dramatiq.message import Message

from dramatiq_jetstream.errors import ConnectionClosed, ConnectionFailed, InvalidOption, StoreTimeout

__all__ = ["group"]

#: What says that the server cannot be reached, after the whole time for it.
_OUTAGES = (ConnectionClosed, ConnectionFailed, StoreTimeout)


class _Collector:
    """Stands in for a broker while a group runs, and keeps what it would have enqueued."""

    def __init__(self, broker: Any) -> None:
        self.broker = broker
        self.collected: list[tuple[Message[Any], int | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.broker, name)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        self.collected.append((message, delay))
        return message

    def enqueue_many(self, messages: Iterable[Message[Any]], *, delay: int | None = None) -> None:
        """Take the messages of a group inside the group."""
        for message in messages:
            self.enqueue(message, delay=delay)


def _check_ids(members: Iterable[Any]) -> None:
    """Members are counted by their message's id, so two with the same would be one."""
    last = [getattr(member, "messages", [member])[-1] for member in members]
    ids = Counter(message.message_id for message in last if isinstance(message, Message))
    if shared := [message_id for message_id, count in ids.items() if count > 1]:
        raise InvalidOption(
            f"Two members of the group have the message id {shared[0]!r}, so its callback would never come: make each "
            "with actor.message() instead of copying one."
        )


class group(dramatiq_group):  # noqa: N801 - the name that Dramatiq gives it
    """A `dramatiq.group` that enqueues its messages together when its broker can, as a `JetStreamBroker` does.

    Parameters:
      children: Messages, pipelines and groups.
      broker: None takes Dramatiq's global broker.

    Examples:
      >>> from dramatiq_jetstream import group
      >>> charges = group(charge.message("c-42", amount) for amount in (1, 2, 3)).run()
      >>> sorted(charges.get_results(block=True, timeout=30_000))
      [1, 2, 3]
    """

    def __init__(
        self, children: Iterable[Message[Any] | pipeline | dramatiq_group], *, broker: Broker | None = None
    ) -> None:
        super().__init__(children, broker=broker)  # type: ignore[no-untyped-call]

    def run(self, *, delay: int | None = None) -> group:
        """Enqueue all members.

        Parameters:
          delay: Milliseconds until they run; None for at once.

        Raises:
          As `JetStreamBroker.enqueue_many`; InvalidOption when the group has callbacks and two members share an id.
            Members with different delays are stored apart: an outage ends the run, and the error then names only
            those that it met.
        """
        broker = self.broker
        if self.completion_callbacks:
            _check_ids(self.children)
        if not hasattr(broker, "enqueue_many"):
            super().run(delay=delay)  # type: ignore[no-untyped-call]
            return self
        collector = _Collector(broker)
        nested = [child for child in self.children if hasattr(child, "broker")]
        owners = [child.broker for child in nested]
        try:
            self.broker = collector
            for child in nested:
                if child.broker is broker:
                    child.broker = collector
            super().run(delay=delay)  # type: ignore[no-untyped-call]
        finally:
            self.broker = broker
            for child, owner in zip(nested, owners, strict=True):
                child.broker = owner
        failures: list[Exception] = []
        for wanted in {delay for _, delay in collector.collected}:
            try:
                broker.enqueue_many([m for m, delay in collector.collected if delay == wanted], delay=wanted)
            except _OUTAGES as error:  # the members with other delays would wait for the server as long
                failures.append(error)
                break
            except Exception as error:  # noqa: BLE001 - the other members are enqueued first
                failures.append(error)
        if failures:
            raise failures[0]
        return self
