"""Runs the service under load through one fault after another, measures each, and checks the books at the end."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dramatiq.errors import BrokerError
from nats.errors import Error as NatsError

from dramatiq_jetstream import JetStreamBroker
from tests.chaos.acts import Acts
from tests.chaos.afterwards import look_back
from tests.chaos.books import FINAL, Books, Sources, is_forged, read_books, read_stock
from tests.chaos.checker import accepted_orders, back_in_all_books, check, given_back
from tests.chaos.checks.figures import figures_agree
from tests.chaos.checks.webhooks import DELIVERED_OR_FAILED
from tests.chaos.client import Load, Log
from tests.chaos.faults import Fault
from tests.chaos.fleet import Fleet, Topology
from tests.chaos.hooks import Hooks
from tests.chaos.keeper import Keeper
from tests.chaos.merchant import Merchant, Shelf
from tests.chaos.network import Network
from tests.chaos.people import People
from tests.chaos.stranger import Stranger
from tests.chaos.tape import Tape
from tests.chaos.verdict import Verdict
from tests.chaos.visitors import UNHEARD, Visitors

#: An operator looks at a dead letter before replaying it; so much later, in milliseconds.
_LOOKED_AT = 1_500

Say = Callable[[str], None]


@dataclass
class Measured:
    """One fault as it went; seconds. `None`: did not happen within the time allowed."""

    fault: str
    topology: str
    lasted: float
    accepted: int = 0
    lost: int = 0
    repeated: int = 0
    dead_letters: int = 0
    accepted_again: float | None = None
    recovered: float | None = None
    restarts: int = 0
    began: float = 0.0
    ended: float = 0.0


@dataclass
class Result:
    """One topology's run."""

    topology: str
    seed: int
    measured: list[Measured] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    accepted: int = 0
    runs: int = 0
    repeated: int = 0
    repeats_by_actor: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    network: bool = False
    beside: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        return all(verdict.kept for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Trial:
    """One topology under load."""

    def __init__(self, fleet: Fleet, log: Log, tape: Tape, *, settle: float, say: Say) -> None:
        self._fleet = fleet
        self._log = log
        self._tape = tape
        self._settle = settle
        self._say = say
        self._seen = 0
        self._final: dict[str, float] = {}
        self._broker = JetStreamBroker(url=fleet.nats_url, declare=False)
        self.replayed = 0

    def close(self) -> None:
        self._broker.close()

    def warm_up(self) -> None:
        """Wait until orders are accepted and finished, so that the first fault meets a service at work."""
        assert self.wait(lambda: len(self._final) >= 5), "no orders were finished before the first fault"

    def measure(self, fault: Fault, choice: random.Random) -> Measured:
        """Go through one fault and wait until everything that was accepted before its end is finished."""
        restarts, replayed = self._fleet.restarts, self.replayed
        began = time.time()
        fault.inject(self._fleet, choice)
        ended = time.time()
        measured = Measured(fault.name, self._fleet.topology, ended - began, began=began, ended=ended)
        due = self._log.accepted_before(ended)
        if self.wait(lambda: all(order in self._final for order in due)):
            measured.recovered = max(0.0, max((self._final[order] for order in due), default=ended) - ended)
        self.wait(lambda: self._log.accepted_after(ended) is not None)
        again = self._log.accepted_after(ended)
        measured.accepted_again = None if again is None else again - ended
        measured.accepted = sum(1 for order in due if self._log.accepted[order] >= began)
        measured.dead_letters = self.replayed - replayed
        measured.restarts = self._fleet.restarts - restarts
        return measured

    def settle(self, books: Callable[[], Books], meanwhile: Callable[[], object]) -> Books:
        """Wait until nothing is on its way any more, or the time allowed is over; returns the books then.

        Parameters:
          meanwhile: What an operator does again and again.
        """
        found: list[Books] = []

        def settled() -> bool:
            meanwhile()
            found[:] = [books()]
            now = found[0]
            finished = {event.order_id for event in now.events if event.name in FINAL}
            created = {event.order_id for event in now.events if event.name == "created"}
            return (
                not now.dead
                and not sum(now.queues.values())
                and accepted_orders(now) | created <= finished
                # The gateway tells of a chargeback until it was taken.
                and len(now.chargebacks) == sum(event.name == "charged_back" for event in now.events)
                # A charge that came after its order was cancelled is found later.
                and given_back(now).kept
                and back_in_all_books(now).kept
                and all(one["state"] in DELIVERED_OR_FAILED for one in now.webhooks.log)
                and figures_agree(now).kept
            )

        self.wait(settled)
        return found[0] if found else books()

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is so, for the time allowed; an operator looks after dead letters meanwhile."""
        deadline = time.monotonic() + self._settle
        while True:
            try:
                self._look()
                if condition():
                    return True
            except (NatsError, BrokerError, OSError) as error:
                # The servers may still be electing a leader.
                self._say(f"    (cannot look yet: {error!r})")
            if time.monotonic() > deadline:
                return False
            time.sleep(0.4)

    def _look(self) -> None:
        """Read the new events, and replay dead letters as an operator would."""
        for event in self._tape.events(self._seen):
            self._seen += 1
            if event.name in FINAL:
                self._final.setdefault(event.order_id, event.at)
        letters = self._broker.dead_letters
        for letter in letters.list(limit=200):
            if is_forged(letter.data) or (letter.actor == "ship_order" and "UnusableEvent" in letter.error):
                letters.drop(
                    letter
                )  # it stands for no order of ours, or another service shipped what was cancelled
            elif letter.time < time.time() * 1000 - _LOOKED_AT and letters.replay(letter):
                self.replayed += 1


def run(
    topology: Topology,
    schedule: Iterable[Fault],
    *,
    directory: Path,
    seed: int,
    rate: float,
    settle: float,
    say: Say,
    network: Network | None = None,
    modules: Sequence[str] = (),
    web: str = "web",
    processes: int = 1,
    patient: bool | None = None,
) -> Result:
    """Run one topology through a schedule of faults and check its books.

    Parameters:
      patient: Whether orders wait for a gateway that is away; None: on a cluster, so that both are tried.
    """
    waits = topology == "cluster" if patient is None else patient
    choice = random.Random(seed)
    result = Result(topology, seed, network=network is not None)
    visits, acts = directory / "visits.jsonl", directory / "acts.jsonl"
    log, shelf = Log(directory / "client.jsonl"), Shelf()
    started = time.monotonic()
    with Fleet(
        directory,
        topology,
        network=network,
        modules=modules,
        web=web,
        processes=processes,
        patient=waits,
    ) as fleet:
        say(f"  {topology}: the service is up after {time.monotonic() - started:.0f} s")
        sources = Sources(
            *(fleet.nats_url, fleet.gateway_url, directory, fleet.archive, read_stock(fleet.nats_url)), waits
        )
        hooks = Hooks(fleet.url, fleet.receiver_url, directory / "hooks.jsonl")
        with ExitStack() as around:
            tape = around.enter_context(Tape(fleet.nats_url))
            trial = Trial(fleet, log, tape, settle=settle, say=say)
            around.callback(trial.close)
            with (
                Load(fleet.url, fleet.key, fleet.nats_url, log, shelf, rate=rate, seed=seed),
                Stranger(fleet.nats_url, log, seed=seed),
                ExitStack() as beside,
            ):
                trial.warm_up()
                _subscribe(hooks, fleet)
                beside.enter_context(Visitors(fleet.url, fleet.prying_key, log, visits, seed=seed))
                keeper = Keeper(fleet.operate, fleet.gateway_url, tape, seed=seed)
                acting = [
                    beside.enter_context(one)
                    for one in (
                        Acts(
                            *(fleet.url, fleet.operator_key, fleet.nats_url, fleet.gateway_url),
                            *(log, acts, fleet.restock),
                            seed=seed,
                        ),
                        Merchant(fleet.url, fleet.operator_key, shelf, acts, seed=seed),
                        People(
                            *(fleet.url, fleet.key_of, fleet.unheard_key, hooks, fleet.operate),
                            *(log, directory / "erased.jsonl"),
                            seed=seed,
                        ),
                        keeper,
                    )
                ]
                # All at once, not one after the other.
                beside.callback(lambda: [one.stop() for one in acting])
                for fault in schedule:
                    measured = trial.measure(fault, random.Random(choice.randrange(2**32)))
                    result.measured.append(measured)
                    say(
                        f"  {topology}: {fault.name} lasted {measured.lasted:.1f} s, accepted again after "
                        f"{_seconds(measured.accepted_again)}, recovered in {_seconds(measured.recovered)}, "
                        f"{measured.dead_letters} dead letters replayed"
                    )
                trial.wait(lambda: all(one.all_done() for one in acting))
            books = trial.settle(lambda: read_books(sources, tape.stored()), keeper.bring_back)
            books = look_back(fleet, books)
        result.verdicts = check(books)
        result.beside = {
            "erased": sum(1 for person in books.erased if person["certificate"]),
            "archived": books.whereabouts.orders,
            "told": len({one["headers"].get("webhook-id") for one in books.webhooks.received}),
            "prices": sum(act["kind"] == "price" and act["accepted"] for act in books.acts),
        }
        _attribute(result, books, fleet.journal)
    log.close()
    return result


def _subscribe(hooks: Hooks, fleet: Fleet) -> None:
    """Ask for webhooks: an operator for what is rarer and for what is frequent, and one whose receiver is not there."""
    rarer = ("rejected", "cancelled", "refunded", "charged_back", "shipped", "returned")
    assert hooks.make("rarer", fleet.operator_key, [f"order.{name}" for name in rarer])
    assert hooks.make("confirmed", fleet.operator_key, ["order.confirmed"])
    assert hooks.make("unheard", fleet.unheard_key, (), UNHEARD)


def _attribute(result: Result, books: Books, journal: Path) -> None:
    """Count for each fault what was lost and what ran again, between its begin and that of the next."""
    runs = [json.loads(line) for line in journal.read_text().splitlines()]
    seen: set[tuple[Any, ...]] = set()
    repeats: list[tuple[float, str]] = []
    for at, _pid, actor, message_id, retries, replays in runs:
        key = (actor, message_id, retries, replays)
        if key in seen:
            repeats.append((at, actor))
        seen.add(key)
    finished = {event.order_id for event in books.events if event.name in FINAL}
    for number, measured in enumerate(result.measured):
        until = result.measured[number + 1].began if number + 1 < len(result.measured) else float("inf")
        measured.repeated = sum(1 for at, _ in repeats if measured.began <= at < until)
        measured.lost = sum(
            1
            for entry in books.log
            if entry["accepted"]
            and measured.began <= entry["at"] < until
            and entry["order_id"] not in finished
        )
    result.accepted = len(accepted_orders(books))
    result.runs = len(runs)
    result.repeated = len(repeats)
    result.repeats_by_actor = dict(Counter(actor for _, actor in repeats))
    result.answers = dict(Counter(str(e["answer"]).split(" as ")[0].split("(")[0] for e in books.log))


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"
