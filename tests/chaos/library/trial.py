"""Runs the library under load through one fault after another, measures each, and checks the books at the end."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dramatiq.errors import BrokerError
from nats.errors import Error as NatsError

from dramatiq_jetstream import JetStreamBroker, results
from tests.chaos.checker import Verdict
from tests.chaos.fleet import Topology
from tests.chaos.library.books import (
    Books,
    Journal,
    Log,
    Period,
    Server,
    Size,
    read_server,
    results_of,
    sizes,
)
from tests.chaos.library.checker import check, unfinished
from tests.chaos.library.faults import Fault
from tests.chaos.library.fleet import LibraryFleet
from tests.chaos.library.settings import OPTIONS

Say = Callable[[str], None]

#: How many threads a busy process has; what it has then is what it may keep.
GROWN_UP = 8

#: How long a producer may take to end, in seconds.
PATIENCE_SECONDS = 60.0


@dataclass
class Measured:
    """One fault as it went; seconds. `recovered` is None when that did not happen within the time allowed."""

    fault: str
    topology: str
    lasted: float
    stored: int = 0
    recovered: float | None = None
    restarts: int = 0
    repeated: int = 0


@dataclass
class Result:
    """One topology's run."""

    topology: str
    seed: int
    measured: list[Measured] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    calls: int = 0
    runs: int = 0
    repeated: int = 0

    @property
    def kept(self) -> bool:
        return all(verdict.kept for verdict in self.verdicts)

    @property
    def broken(self) -> set[str]:
        """The promises that were not kept."""
        return {verdict.promise for verdict in self.verdicts if not verdict.kept}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Trial:
    """One topology under load."""

    def __init__(self, fleet: LibraryFleet, *, settle: float, say: Say) -> None:
        self._fleet = fleet
        self._settle = settle
        self._say = say
        self._log = Log(fleet.log)
        self._journal = Journal(fleet.journal)
        self._server = Server([], [], frozenset(), {})
        self._first: dict[int, Size] = {}
        self._complaints: list[str] = []
        self._results: set[str] = set()
        self._letters: dict[tuple[str, ...], dict[str, str]] = {}
        self.periods: list[Period] = []
        self._began = time.time()

    def warm_up(self) -> None:
        """Wait until everything is at work, so that the first fault meets it so."""
        done = self._wait(lambda: len({run.actor for run in self._journal.runs}) > 8)
        assert done, (
            f"too little was done before the first fault: {Counter(r.actor for r in self._journal.runs)}"
        )
        self._began = time.time()

    def measure(self, fault: Fault, choice: random.Random) -> Measured:
        """Go through one fault and wait until all that was stored before its end is done."""
        if fault.destroys:
            self._read_results()
        restarts = self._fleet.restarts
        began = time.time()
        fault.inject(self._fleet, choice)
        ended = time.time()
        self.periods.append(Period(fault.name, began, ended, fault.repeats, fault.destroys))
        measured = Measured(fault.name, self._fleet.topology, ended - began)
        recovered = self._wait(lambda: not unfinished(self._books(), ended))
        measured.recovered = time.time() - ended if recovered else None
        books = self._books()
        measured.stored = sum(
            told == "stored"
            for call in books.calls
            if began <= (call.told_at or 0) < ended
            for told in call.told.values()
        )
        measured.restarts = self._fleet.restarts - restarts
        if not recovered:
            self._complain_of(unfinished(books, ended), f"{self._settle:.0f} s after {fault.name}")
        return measured

    def settle(self) -> Books:
        """End the load, wait until all is done or the time allowed is over, and read everything."""
        self._fleet.stop_supervising()
        running = [producer for producer in self._fleet.producers if producer.running]
        for producer in running:
            producer.send_signal(signal.SIGTERM)
        for producer in running:
            try:
                producer.wait(PATIENCE_SECONDS)
            except AssertionError as error:
                self._complaints.append(f"a producer did not end: {error}")
        self._wait(lambda: not self._server.waiting and not unfinished(self._books()))
        # A supervisor starts what has died again by itself; it gets the time for that.
        self._wait(lambda: not self._fleet.unhealthy())
        # On a server that was just emptied nothing waits, until a worker stores the retry of what it ran then. So only
        # what waits for as long as is allowed is stuck.
        self._wait(lambda: not self._server.waiting)
        self._read_results()
        return self._books(final=True)

    def _pids(self) -> list[int]:
        fleet = self._fleet
        return [*fleet.worker_pids(), *(p.pid for p in (*fleet.fleets, *fleet.producers) if p.running)]

    def _books(self, *, final: bool = False) -> Books:
        server = self._server
        calls = self._log.read()
        last = sizes(self._first) if final else {}
        return Books(
            calls=calls,
            runs=self._journal.read(),
            letters=list(self._letters.values()),
            waiting=server.waiting,
            waiting_labels=server.waiting_labels,
            results=frozenset(self._results),
            consumers=server.consumers,
            unhealthy=[*self._complaints, *self._fleet.unhealthy()] if final else [],
            sizes={pid: (self._first[pid], size) for pid, size in last.items()},
            periods=self.periods,
            began=self._began,
            ended=time.time(),
        )

    def _read_results(self) -> None:
        broker = JetStreamBroker(self._fleet.nats_url, declare=False, middleware=[], **OPTIONS)
        try:
            wanted = [call for call in self._log.read() if not self._results.issuperset(call.labels)]
            self._results |= results_of(results.JetStreamBackend(broker), wanted)
        finally:
            broker.close()

    def _complain_of(self, labels: list[str], when: str) -> None:
        self._complaints.append(f"not done {when}: {', '.join(labels[:5])}")

    def _wait(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + self._settle
        while True:
            try:
                self._look()
                if condition():
                    return True
            except (NatsError, BrokerError, OSError) as error:
                self._say(f"    (cannot look yet: {error!r})")
            if time.monotonic() > deadline:
                return False
            time.sleep(0.4)

    def _look(self) -> None:
        self._server = read_server(self._fleet.nats_url)
        # A store that is destroyed takes its letters along.
        self._letters |= {tuple(letter.values()): letter for letter in self._server.letters}
        self._journal.read()
        for pid, size in sizes(self._pids()).items():
            # One that was just born has not grown up yet.
            if size.threads >= GROWN_UP:
                self._first.setdefault(pid, size)


def run(
    topology: Topology,
    schedule: Iterable[Fault],
    *,
    directory: Path,
    seed: int,
    rate: float,
    settle: float,
    say: Say,
    broken: tuple[str, ...] = (),
) -> Result:
    """Run one topology through a schedule of faults and check its books."""
    choice = random.Random(seed)
    result = Result(topology, seed)
    started = time.monotonic()
    with LibraryFleet(directory, topology, rate=rate, seed=seed, broken=broken) as fleet:
        say(f"  {topology}: the fleets are up after {time.monotonic() - started:.0f} s")
        trial = Trial(fleet, settle=settle, say=say)
        trial.warm_up()
        for fault in schedule:
            measured = trial.measure(fault, random.Random(choice.randrange(2**32)))
            result.measured.append(measured)
            recovered = "never" if measured.recovered is None else f"{measured.recovered:.1f} s"
            say(
                f"  {topology}: {fault.name} ({fault.title}) lasted {measured.lasted:.1f} s, {measured.stored} stored "
                f"meanwhile, recovered in {recovered}"
            )
        books = trial.settle()
        result.verdicts = check(books)
        _attribute(result, books)
        (directory / "periods.json").write_text(json.dumps([asdict(p) for p in books.periods]))
    return result


def _attribute(result: Result, books: Books) -> None:
    """Count what ran again, after each fault until the next."""
    seen: set[tuple[str, str, int]] = set()
    again: list[float] = []
    for run_ in books.runs:
        if run_.what == "began" and run_.actor != "tick":
            key = (run_.actor, run_.id, run_.retries)
            if key in seen:
                again.append(run_.at)
            seen.add(key)
    for number, measured in enumerate(result.measured):
        begin = books.periods[number].began
        end = books.periods[number + 1].began if number + 1 < len(result.measured) else float("inf")
        measured.repeated = sum(begin <= at < end for at in again)
    result.calls = len(books.calls)
    result.runs = sum(run_.what == "began" for run_ in books.runs)
    result.repeated = len(again)
