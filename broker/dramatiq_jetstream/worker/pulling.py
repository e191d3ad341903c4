"""Pull requests: asking the sources of a queue for as many messages as there is room for.

Everything here runs on the loop thread. A request stands for 30 s with heartbeats, so that an arriving
message is delivered at once. Requests do not survive a reconnect or a new leader: they are made again after a
reconnect, and when heartbeats stop.

Where there are several sources, a lower rank is asked only when the ranks above have nothing. The server says
so: a *probe* is a request that does not wait, and when it was answered with "no messages" a standing request for
one message takes its place; as long as that is unfilled there is nothing. One message, because requests cannot be
taken back: what stands at every source may arrive at once, beyond what there is room for.

There is room for the prefetch, and for a little more while messages are short: as many as were settled in
the last 25 ms. That lookahead saves a round trip for each message, and is nothing where a message takes
longer than that. When messages suddenly take longer, what is held beyond the prefetch is given back after
half a second, for other workers to take.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dramatiq_jetstream.wire.connection import Connection, Msg, Subscription

from .delivery import Delivery, Source
from .durables import Durable
from .ledger import Ledger

__all__ = ["Puller"]

#: A pull request stands this long, and says every so often that it does; seconds.
PULL_EXPIRES = 30
HEARTBEAT = 2

#: Pull requests of one source at a time; a message that fills a small one must not wait for the next.
MAX_PULLS = 4

#: After so many ticks with more in hand than there is room for, the surplus is given back.
SURPLUS_TICKS = 5

#: The lookahead is what was settled in a quarter of a tick (0.1 s), and at most this many messages.
MAX_LOOKAHEAD = 256

_NANOSECONDS = 1_000_000_000


@dataclass(eq=False)
class _Pull:
    number: int
    left: int
    probe: bool


@dataclass(eq=False)
class _Feed:
    """The pull requests of one source."""

    source: Source
    inbox: str
    subscription: Subscription | None = None
    pulls: list[_Pull] = field(default_factory=list)
    heard: float = 0.0
    drained: bool = False

    @property
    def outstanding(self) -> int:
        return sum(pull.left for pull in self.pulls)

    @property
    def empty(self) -> bool:
        """Whether the source has nothing: it was drained, and the request that stands since is unfilled."""
        return any(not pull.probe for pull in self.pulls)


class Puller:
    """Keeps messages coming from several sources, highest rank first.

    Parameters:
      prefetch: How many messages may be here at once, those that are worked on included.
      lookahead: Whether more may come while messages are short.
      deliver: Gets what arrived in one turn of the loop.
      surplus: Called when more is in hand than can be worked off soon.
    """

    def __init__(
        self,
        connection: Connection,
        ledger: Ledger,
        sources: list[Source],
        *,
        prefetch: int,
        lookahead: bool,
        deliver: Callable[[list[Delivery]], None],
        surplus: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._prefetch = prefetch
        self.lookahead = lookahead
        self._deliver = deliver
        self._surplus = surplus
        self._surplus_ticks = 0
        self._stopping = False
        self._in_hand = 0
        self._settled = 0
        self.window = prefetch
        self._numbers = itertools.count(1)
        self._replenishing = False
        self._arrived: list[Delivery] = []
        self._feeds = [_Feed(source, connection.new_inbox()) for source in sources]
        ranks = sorted({source.rank for source in sources})
        self._ranks = [[feed for feed in self._feeds if feed.source.rank == rank] for rank in ranks]
        for feed in self._feeds:
            feed.subscription = connection.subscribe(f"{feed.inbox}.*", self._receiver(feed))
        ledger.durables.listen()
        connection.on_tick(self._tick)
        connection.on_fork(self._forsake)
        ledger.durables.on_certain(self._certain)
        connection.post(self._replenish)

    # From any thread

    def stop(self) -> None:
        """Ask for nothing more; what is still on its way is delivered, to be given back."""
        self._stopping = True
        for feed in self._feeds:
            if feed.subscription is not None:
                feed.subscription.withdraw()

    def close(self) -> None:
        self.stop()
        self._connection.forget(self._forsake)
        self._forsake()

    def _forsake(self) -> None:
        """Want nothing any more; also in the child of a fork, where these are the parent's messages."""
        self._stopping = True
        self._ledger.durables.forget(self._certain)
        self._connection.forget(self._tick)
        for feed in self._feeds:
            if feed.subscription is not None:
                feed.subscription.close()

    # On the loop thread

    def released(self, *, done: bool) -> None:
        """A delivery of ours was settled, because it is done or was given back: there is room for another."""
        self._in_hand -= 1
        self._settled += done
        if self.window - self._in_hand >= self._worth_asking:
            self._replenish_soon()

    @property
    def _worth_asking(self) -> int:
        """How many to ask for at least, under load: a message that comes alone costs three threads a wake-up.

        A tick later any free place is used.
        """
        return max(1, self.window // 4)

    def _replenish_soon(self) -> None:
        # Many are settled in one turn of the loop; one look at what to ask for is enough.
        if not self._replenishing:
            self._replenishing = True
            self._connection.soon(self._replenish_under_load)

    def _replenish_under_load(self) -> None:
        self._replenish(self._worth_asking)

    def _receiver(self, feed: _Feed) -> Callable[[Msg], None]:
        def receive(message: Msg) -> None:
            feed.heard = time.monotonic()
            if message.reply.startswith("$JS.ACK."):
                self._receive(feed, message)
            elif "Status" in message.headers:
                self._answered(feed, message, message.headers)

        return receive

    def _receive(self, feed: _Feed, message: Msg) -> None:
        delivery = Delivery(message, feed.source, self)
        if feed.pulls:
            pull = feed.pulls[0]
            pull.left -= 1
            if pull.left <= 0:
                del feed.pulls[0]
                if len(self._feeds) > 1:
                    feed.drained = delivery.pending == 0
                    self._replenish_soon()
        if not self._ledger.receive(delivery):
            return
        self._in_hand += 1
        if self._stopping:
            self._deliver([delivery])  # before the fence that a closing consumer waits for is answered
            return
        self._arrived.append(delivery)
        if len(self._arrived) == 1:
            self._connection.soon(self._pass_on)

    def _pass_on(self) -> None:
        arrived, self._arrived = self._arrived, []
        self._deliver(arrived)

    def _answered(self, feed: _Feed, message: Msg, headers: dict[str, str]) -> None:
        status = headers["Status"]
        if status == "100":  # a heartbeat
            return
        number = int(message.subject.rpartition(".")[2])
        feed.pulls = [pull for pull in feed.pulls if pull.number != number]
        # 404 answers a probe that took all there was, 408 a request that stood its time.
        feed.drained = status in ("404", "408")
        if not feed.drained:
            # Deleted, no leader now, a new leader, too many requests: it may be another consumer by now.
            self._ledger.durables.doubt(feed.source.durable)
        elif not self._stopping:
            self._replenish()

    def _replenish(self, least: int = 1) -> None:
        """Ask for as many messages as there is room for, highest rank first; a single source for `least` or more."""
        self._replenishing = False
        free = self.window - self._in_hand
        if (
            free <= 0
            or self._stopping
            or any(self._ledger.settlements.is_behind(feed.source.durable) for feed in self._feeds)
        ):
            for feed in self._feeds:
                feed.drained = False  # as time passes without a standing request
            return
        if len(self._feeds) == 1:
            (feed,) = self._feeds
            unasked = free - feed.outstanding
            if unasked >= least and feed.source.durable.certain:
                self._pull(feed, unasked, probe=False)
            return
        free -= sum(pull.left for feed in self._feeds for pull in feed.pulls if pull.probe)
        for rank in self._ranks:
            # Another source never waits for one that cannot be read now.
            feeds = [feed for feed in rank if feed.source.durable.certain]
            unknown = [feed for feed in feeds if not feed.pulls and not feed.drained]
            for position, feed in enumerate(unknown):
                batch = min(free, max(1, free // (len(unknown) - position)))
                self._pull(feed, batch, probe=True)
                free -= max(0, batch)
            for feed in feeds:
                if feed.drained and not feed.pulls:
                    self._pull(feed, 1, probe=False)
            rank.append(rank.pop(0))  # where there is room for few, another one comes first next time
            if not all(feed.empty for feed in feeds):
                return  # what they answer brings us here again

    def _pull(self, feed: _Feed, batch: int, *, probe: bool) -> None:
        if batch <= 0 or len(feed.pulls) >= MAX_PULLS:
            return
        if not feed.pulls:
            feed.heard = time.monotonic()
        feed.drained = False
        pull = _Pull(next(self._numbers), batch, probe)
        feed.pulls.append(pull)
        body: dict[str, object] = {"batch": batch}
        if probe:
            body["no_wait"] = True
        else:
            body.update(expires=PULL_EXPIRES * _NANOSECONDS, idle_heartbeat=HEARTBEAT * _NANOSECONDS)
        self._connection.write(
            self._connection.api_subject(
                f"CONSUMER.MSG.NEXT.{feed.source.stream}.{feed.source.durable.name}"
            ),
            json.dumps(body).encode(),
            f"{feed.inbox}.{pull.number}",
        )

    def _certain(self, durable: Durable, same: bool) -> None:
        """Requests do not survive what put the durable in doubt."""
        for feed in self._feeds:
            if feed.source.durable is durable:
                feed.pulls.clear()
                feed.drained = False
                self._replenish()

    def _tick(self) -> None:
        now = time.monotonic()
        for feed in self._feeds:
            if feed.pulls and now - feed.heard > 2.5 * HEARTBEAT:
                feed.pulls.clear()  # nothing knows of our requests any more: a new leader, or a restart
                self._ledger.durables.doubt(feed.source.durable)
        if self.lookahead:
            self.window = self._prefetch + min(self._settled // 4, MAX_LOOKAHEAD)
        self._settled = 0
        self._surplus_ticks = self._surplus_ticks + 1 if self._in_hand > self.window else 0
        if self._surplus_ticks == SURPLUS_TICKS:
            self._surplus_ticks = 0
            self._surplus()
        if self._connection.is_open:
            self._replenish()
