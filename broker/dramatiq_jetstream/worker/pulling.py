"""Asks the sources of a queue for as many messages as there is room for.

Where there are several sources, a lower rank is asked only when the ranks above have nothing. The server tells: a
*probe* is a request that does not wait. After its reply "no messages", a standing request for one message takes its
place, and while that is unfilled the source is empty. It is for one message only, because requests cannot be withdrawn:
the requests at all sources may be filled at once, beyond the room. A source that cannot be read now is skipped.

Requests do not survive what puts a durable in doubt (a reconnect, a new leader); they are made again when it is
certain. `fetching` makes the requests and reads the replies.

If the process dies, what arrived is delivered again. Everything here runs on the loop thread, except the constructor,
`stop` and `close`.
"""

from __future__ import annotations

from collections.abc import Callable

from dramatiq_jetstream.wire.connection import Connection, Msg

from .delivery import Delivery, Owner, Source
from .durables import Durable
from .fetching import Fetcher
from .in_flight import InFlight
from .room import Room
from .settlements import NAK

__all__ = ["Puller"]


class Puller:
    """Keeps messages coming from several sources, highest rank first.

    Parameters:
      room: Counts how many messages may be fetched.
      owner: Is told when a delivery is settled.
      deliver: Gets what arrived in one turn of the loop.
      surplus: Called when more is in hand than can run soon.
    """

    def __init__(
        self,
        connection: Connection,
        in_flight: InFlight,
        sources: list[Source],
        room: Room,
        *,
        owner: Owner,
        deliver: Callable[[list[Delivery]], None],
        surplus: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._in_flight = in_flight
        self._room = room
        self._owner = owner
        self._deliver = deliver
        self._surplus = surplus
        self._stopping = False
        self._replenishing = False
        self._arrived: list[Delivery] = []
        self._fetchers: list[Fetcher] = []
        self._ranks: list[list[Fetcher]] = []
        in_flight.durables.listen()
        connection.on_tick(self._tick)
        connection.on_fork(self._forsake)
        in_flight.durables.on_certain(self._certain)
        for source in sources:
            self.add(source)

    # From any thread

    def add(self, source: Source) -> None:
        """Read one more source."""
        durables = self._in_flight.durables
        fetcher = Fetcher(self._connection, durables, source, receive=self._receive, changed=self.ask_soon)
        self._connection.post(self._include, fetcher)

    def stop(self) -> None:
        """Ask for nothing more; messages still on their way are delivered, to be requeued."""
        self._stopping = True
        for fetcher in list(self._fetchers):
            fetcher.stop()

    def close(self) -> None:
        self.stop()
        self._connection.remove_callback(self._forsake)
        self._forsake()

    def _forsake(self) -> None:
        """Stop for good; also in the child of a fork, where these are the parent's messages."""
        self._stopping = True
        self._in_flight.durables.remove_callback(self._certain)
        self._connection.remove_callback(self._tick)
        for fetcher in list(self._fetchers):
            fetcher.close()

    # On the loop thread

    def requests(self, durable: Durable) -> int:
        """How many requests of this process stand at a durable."""
        fetchers = (each for each in self._fetchers if each.source.durable is durable)
        return sum(not pull.ended for each in fetchers for pull in each.pulls)

    def _include(self, fetcher: Fetcher) -> None:
        self._fetchers = [*self._fetchers, fetcher]
        fetcher.include()
        ranks = sorted({each.source.rank for each in self._fetchers})
        self._ranks = [[each for each in self._fetchers if each.source.rank == rank] for rank in ranks]
        if self._stopping:
            fetcher.close()
        else:
            self.ask_soon()

    def ask_soon(self) -> None:
        """Ask for more when this turn of the loop is over, in which many may be settled."""
        if not self._replenishing:
            self._replenishing = True
            self._connection.soon(self._replenish_under_load)

    def _replenish_under_load(self) -> None:
        self._replenish(self._room.worth_asking)

    def _receive(self, fetcher: Fetcher, message: Msg) -> None:
        delivery = Delivery(message, fetcher.source, self._owner)
        if len(self._fetchers) > 1 and not fetcher.pulls:
            fetcher.drained = delivery.pending == 0
            self.ask_soon()
        if not self._in_flight.receive(delivery):
            return
        self._room.arrived()
        if self._room.is_held_up and delivery.deliveries == 1:
            self._in_flight.settle(delivery, NAK)  # others are served next
            return
        if self._stopping:
            self._deliver([delivery])  # before the fence that a closing consumer waits for is answered
            return
        self._arrived.append(delivery)
        if len(self._arrived) == 1:
            self._connection.soon(self._pass_on)

    def _pass_on(self) -> None:
        arrived, self._arrived = self._arrived, []
        self._deliver(arrived)

    def _replenish(self, least: int = 1) -> None:
        """Ask for as many messages as there is room for, highest rank first; a single source for `least` or more."""
        self._replenishing = False
        free = self._room.free
        if (
            free <= 0
            or self._stopping
            or any(
                self._in_flight.settlements.is_behind(fetcher.source.durable) for fetcher in self._fetchers
            )
        ):
            for fetcher in self._fetchers:
                fetcher.drained = False  # as time passes without a standing request
            return
        if len(self._fetchers) == 1:
            self._ask_alone(self._fetchers[0], free, least)
            return
        free -= sum(pull.left for fetcher in self._fetchers for pull in fetcher.pulls if pull.probe)
        for rank in self._ranks:
            fetchers = [fetcher for fetcher in rank if fetcher.is_readable]
            unknown = [fetcher for fetcher in fetchers if not fetcher.pulls and not fetcher.drained]
            for position, fetcher in enumerate(unknown):
                free -= fetcher.ask(min(free, max(1, free // (len(unknown) - position))), probe=True)
            for fetcher in fetchers:
                if fetcher.drained and not fetcher.pulls:
                    fetcher.ask(1, probe=False)
            rank.append(rank.pop(0))  # where there is room for few, another one comes first next time
            if not all(fetcher.is_empty for fetcher in fetchers):
                return  # their replies bring us here again

    def _ask_alone(self, fetcher: Fetcher, free: int, least: int) -> None:
        unasked = free - fetcher.outstanding
        if unasked < least or not fetcher.is_readable:
            return
        while unasked > 0 and (asked := fetcher.ask(unasked, probe=False)):
            unasked -= asked

    def _certain(self, durable: Durable, same: bool) -> None:
        for fetcher in self._fetchers:
            if fetcher.source.durable is durable:
                fetcher.clear()
                self._replenish()

    def _tick(self) -> None:
        for fetcher in self._fetchers:
            fetcher.tick()
        if self._room.has_surplus():
            self._surplus()
        if self._connection.is_open:
            self._replenish()
