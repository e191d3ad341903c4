"""Gives messages back that wait here behind long ones while other workers ask for some.

A process fetches more messages than it has threads. If all its threads run long messages, those behind them wait,
perhaps beside idle threads of other processes. So when no message has started here for `MOMENT_SECONDS` and all threads
are busy, the server is asked whether others wait at the consumer. If they do, what has waited here for as long goes
back to its queue, and this process asks for nothing more from that queue until one of its threads is free.

If everybody is busy, nothing moves: a process that gave back does not ask, so it is not waited for by the next one.
The question is asked once a second at most, and half as often each time that no one waits. What other busy processes
had asked for before can still take a message, so it is given back at most `MOST_RETURNS` times. It was not started, so
that this is no reason to suspect it (see `suspects`), and the server delivers it before newer ones.

If the process dies, everything that it held is delivered again. This belongs to the loop thread; the consumer thread
does the giving back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from dramatiq.errors import BrokerError

from dramatiq_jetstream.wire.connection import Connection

from .attachment import Attachment
from .consumer import JetStreamConsumer
from .durables import Durable, Durables

__all__ = ["GivingBack"]

#: Seconds between two questions to the server about a queue, at first and at most.
ASK_SECONDS = 1.0
LONGEST_ASK_SECONDS = 16.0

logger = logging.getLogger(__name__)


class GivingBack:
    """Looks whether this process holds messages up that others could run.

    Parameters:
      consumers: Returns the consumers that are open.
    """

    def __init__(
        self,
        connection: Connection,
        durables: Durables,
        attachment: Attachment,
        consumers: Callable[[], Sequence[JetStreamConsumer]],
    ) -> None:
        self._durables = durables
        self._attachment = attachment
        self._consumers = consumers
        self.reset()
        connection.on_tick(self._look)

    def reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork."""
        self._asks: dict[
            JetStreamConsumer, tuple[float, float]
        ] = {}  # when to ask next, and the pause after that
        self._task: asyncio.Task[None] | None = None

    def _look(self) -> None:
        if not self._attachment.is_held_up():
            if self._asks:
                self._asks.clear()
                for consumer in self._consumers():
                    consumer.ask_again()
            return
        if self._task is not None and not self._task.done():
            return
        now = time.monotonic()
        for consumer in self._consumers():
            due, pause = self._asks.get(consumer, (0.0, ASK_SECONDS))
            if consumer.stopping or now < due:
                continue
            waiting = [*consumer.waiting(), *self._attachment.waiting(consumer.queue_name)]
            durables = {delivery.source.durable for delivery in waiting if delivery.may_go_back}
            if durables:
                self._asks[consumer] = now + pause, min(2 * pause, LONGEST_ASK_SECONDS)
                self._task = asyncio.ensure_future(self._ask(consumer, durables))
                return

    async def _ask(self, consumer: JetStreamConsumer, durables: set[Durable]) -> None:
        """Give back what waits if others ask for messages of one of the durables."""
        try:
            for durable in durables:
                others = await self._durables.requests(durable) - consumer.requests(durable)
                if others > 0 and self._attachment.is_held_up():
                    self._asks[consumer] = time.monotonic() + ASK_SECONDS, ASK_SECONDS
                    consumer.give_back()
                    return
        except BrokerError as error:
            logger.debug("Whether others wait for messages is not known: %s", error)
