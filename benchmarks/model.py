"""`python -m benchmarks.model`: the bounds of what was measured, and what the same costs carry on more machines.

Three things bound a rate. A stream has one leader, which writes with an fsync for each message, one after the other
(`sync_interval: always`). The processors are used by clients, servers and workers, so many microseconds a message. And
one client process runs one thread at a time. Messages of an atomic batch share four fsyncs, so what is counted of an
order is the most. Costs come from results: the time of an fsync is what an awaited enqueue
takes longer with `always` than with `1s`, CPU is each row's own, and the fsyncs of a message or an order are counted.

The first table divides each measured rate by the lowest of its bounds: near 1 the bound is met, far above 1 the model
is wrong, far below 1 something else is waited for. The second one applies the costs to other sizes.

Files are results of `python -m benchmarks`, all in `benchmarks/results` when none is given. Those of one kind of
processor and one day are taken together. What they do not have is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders.contender import PROCESSES, THREADS
from benchmarks.measurements import orders
from benchmarks.measurements.short_actor import TASK_SECONDS
from benchmarks.report import number

RESULTS = Path(__file__).parent / "results"

#: Which contender is synced on each message, and which one is the same otherwise.
ALWAYS, EVERY_SECOND = "jetstream", "jetstream-1s"
CLUSTER = "jetstream-r3"
SERVICE = "order-service"

#: fsyncs of a message in its stream: it is stored with one; thousands that are done share that of their purge.
STORE = 1

#: The further sizes that the second table is about: nodes, each with as many cores as the measured machine; streams.
SIZES = ((1, 1), (1, 30), (3, 1), (3, 30))

CPU = ("driver_cpu_us", "server_cpu_us", "worker_cpu_us")
COSTS = frozenset(CPU)
Figures = dict[str, float]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Bound:
    """What no rate exceeds, and why."""

    name: str
    per_second: float


@dataclass(frozen=True)
class Prediction:
    """A measured rate beside its bounds."""

    row: str
    bounds: tuple[Bound, ...]
    measured: float

    @property
    def bound(self) -> Bound:
        """The lowest."""
        return min(self.bounds, key=lambda bound: bound.per_second)

    @property
    def share(self) -> float:
        """How much of the lowest bound was measured."""
        return self.measured / self.bound.per_second


@dataclass
class Machine:
    """The rows that were measured on one kind of processor on one day."""

    processor: str
    cores: int
    day: str
    rows: dict[Key, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, results: dict[str, Any]) -> None:
        """Take the rows of one file; repetitions of a row that others have are added to theirs."""
        for measurement in results["measurements"]:
            for row in measurement["rows"]:
                key = (measurement["name"], row["contender"], row["case"])
                for name, figure in row["figures"].items():
                    self.rows.setdefault(key, {}).setdefault(name, []).extend(figure["values"])

    def figures(self, measurement: str, contender: str, case: str = "") -> Figures:
        """The medians of a row; empty when it was not measured."""
        values = self.rows.get((measurement, contender, case), {})
        return {name: statistics.median(each) for name, each in values.items()}

    @property
    def fsync_seconds(self) -> float | None:
        """How long one fsync takes, as one client that awaits each message sees it."""
        slow, fast = (
            self.figures("enqueue", contender, "1 thread").get("per_second")
            for contender in (ALWAYS, EVERY_SECOND)
        )
        return 1 / slow - 1 / fast if slow and fast and slow < fast else None

    def fsyncs(self, each: float, streams: int = 1) -> tuple[Bound, ...]:
        """The bound of streams that spend `each` fsyncs on a message or an order."""
        seconds = self.fsync_seconds
        if seconds is None or each <= 0:
            return ()
        return (Bound(f"{_some(each, 'fsync')}, {_some(streams, 'stream')}", streams / each / seconds),)

    def processors(self, microseconds: float, cores: int | None = None) -> tuple[Bound, ...]:
        """The bound of processors, by default of all of this machine."""
        cores = cores or self.cores
        return (
            (Bound(f"{number(microseconds)} µs of {cores} cores", cores * 1e6 / microseconds),)
            if microseconds
            else ()
        )


def load(files: Sequence[Path]) -> list[Machine]:
    """Read results, by the kind of processor that they were measured on, and the day."""
    machines: dict[tuple[str, int, str], Machine] = {}
    for file in files:
        results = json.loads(file.read_text())
        kind = (results["machine"]["processor"], results["machine"]["cores"], results["at"][:10])
        machines.setdefault(kind, Machine(*kind)).add(results)
    return list(machines.values())


# -- what was measured


def predictions(machine: Machine) -> list[Prediction]:
    """Every row that was measured and has a bound."""
    found = [*_messages(machine), *_clusters(machine), *_orders(machine)]
    return [prediction for prediction in found if prediction.bounds and prediction.measured]


def _messages(machine: Machine) -> Iterator[Prediction]:
    for contender in (ALWAYS, EVERY_SECOND):
        synced = 1 if contender == ALWAYS else 0
        sync = "always" if synced else "1s"
        enqueue = machine.figures("enqueue", contender, "8 threads")
        yield Prediction(
            f"enqueue, 8 threads, {sync}",
            (*machine.fsyncs(synced * STORE), *_cpu(machine, enqueue), *_one_client(enqueue)),
            enqueue.get("per_second", 0),
        )
        drain = machine.figures("drain", contender)
        yield Prediction(f"drain, {sync}", _cpu(machine, drain), drain.get("per_second", 0))
        yield Prediction(
            f"drain until settled, {sync}",
            _cpu(machine, drain),
            drain.get("settled_per_second", 0),
        )
        actor = machine.figures("actor", contender)
        threads = Bound(f"{PROCESSES * THREADS} threads of 5 ms", PROCESSES * THREADS / TASK_SECONDS)
        yield Prediction(
            f"tasks of 5 ms, {sync}", (threads, *_cpu(machine, actor)), actor.get("per_second", 0)
        )
        for measurement, case in (("sustained", ""), ("payload", "1 kB"), ("payload", "64 kB")):
            row = machine.figures(measurement, contender, case)
            yield Prediction(
                f"{case or 'send and run at once'}, {sync}",
                (*machine.fsyncs(synced * STORE), *_cpu(machine, row), *_one_client(row)),
                row.get("per_second", 0),
            )


def _clusters(machine: Machine) -> Iterator[Prediction]:
    """On three servers; a replicated stream shares the fsyncs of its log, so these have no bound of fsyncs here."""
    for contender, sync in ((CLUSTER, "always"), ("jetstream-1s-r3", "1s")):
        for case in ("enqueue, 8 threads", "drain", "sustained"):
            row = machine.figures("cluster", contender, case)
            yield Prediction(
                f"three replicas: {case}, {sync}",
                (*_cpu(machine, row), *_one_client(row)),
                row.get("per_second", 0),
            )


def _orders(machine: Machine) -> Iterator[Prediction]:
    for contender in (SERVICE, "flask-celery-postgres"):
        for case, rate in (
            (orders.ACCEPT, "accepted_per_second"),
            (orders.BURST, "confirmed_per_second"),
        ):
            row = machine.figures("orders", contender, case)
            yield Prediction(
                f"orders, {case}: {contender}",
                (*machine.fsyncs(row.get("busiest", 0)), *_cpu(machine, row)),
                row.get(rate, 0),
            )


def _cpu(machine: Machine, row: Figures) -> tuple[Bound, ...]:
    return machine.processors(sum(row.get(name, 0) for name in CPU))


def _one_client(row: Figures) -> tuple[Bound, ...]:
    used = row.get("driver_cpu_us")
    return (Bound(f"{number(used)} µs of one client process", 1e6 / used),) if used else ()


# -- what would be


@dataclass(frozen=True)
class Capacity:
    """What servers of a size carry, when clients and workers are on machines of their own."""

    what: str
    bounds: tuple[Bound, ...]
    elsewhere_us: float

    @property
    def bound(self) -> Bound:
        return min(self.bounds, key=lambda bound: bound.per_second)

    @property
    def cores_elsewhere(self) -> float:
        """The processors that clients, front ends and workers need for that."""
        return self.bound.per_second * self.elsewhere_us / 1e6


def capacities(machine: Machine) -> list[Capacity]:
    """What nodes like the measured machine carry that run nothing but nats-server, with `sync_interval: always`."""
    found = []
    alone, replicated = _costs(machine), machine.figures("cluster", CLUSTER, "sustained")
    for nodes, streams in SIZES if alone else ():
        row, what = alone, f"messages: {_size(nodes, streams)}"
        if nodes == 1:
            bounds = machine.fsyncs(STORE, streams)
        elif replicated.keys() >= COSTS:
            row = replicated
            bounds = (Bound(f"{streams} × one stream as measured", streams * row["per_second"]),)
        elif streams == 1:
            continue
        else:
            row = {**alone, "server_cpu_us": nodes * alone["server_cpu_us"]}
            bounds, what = (), f"{what} (estimate: each does what one does)"
        processors = machine.processors(row["server_cpu_us"], machine.cores * nodes)
        found.append(Capacity(what, (*bounds, *processors), row["worker_cpu_us"] + row["driver_cpu_us"]))
    order = machine.figures("orders", SERVICE, orders.BURST)
    if {"nats-server_cpu_us", "gunicorn_cpu_us", "worker_cpu_us"} <= order.keys():
        found.append(
            Capacity(
                "orders: one node",
                (
                    *machine.fsyncs(order.get("busiest", 0)),
                    *machine.processors(order["nats-server_cpu_us"]),
                ),
                order["gunicorn_cpu_us"] + order["worker_cpu_us"],
            )
        )
    return found


def _costs(machine: Machine) -> Figures:
    """The CPU of a message that is sent and run: of the sustained load, else of an enqueue and of a drain together."""
    row = machine.figures("sustained", ALWAYS)
    if row.keys() >= COSTS:
        return row
    sent, run = machine.figures("enqueue", ALWAYS, "8 threads"), machine.figures("drain", ALWAYS)
    parts = {name: sent.get(name, 0) + run.get(name, 0) for name in COSTS}
    return parts if all(parts.values()) else {}


def _size(nodes: int, streams: int) -> str:
    replicas = ", 3 replicas" if nodes > 1 else ""
    return f"{_some(nodes, 'node')}{replicas}, {_some(streams, 'stream')}"


def _some(count: float, what: str) -> str:
    return f"{number(count)} {what}{'' if count == 1 else 's'}"


# -- the command


def show(console: Console, machine: Machine) -> None:
    """Print both tables."""
    seconds = machine.fsync_seconds
    fsync = f"an fsync takes {seconds * 1e3:.3g} ms" if seconds else "the time of an fsync was not measured"
    console.print(f"\n[bold]{machine.day}, {machine.processor}, {machine.cores} cores; {fsync}[/bold]")
    table = Table("row", "lowest bound", "of", "measured", "share", title="Measured", title_justify="left")
    for prediction in predictions(machine):
        bound = prediction.bound
        table.add_row(
            prediction.row,
            number(bound.per_second),
            bound.name,
            number(prediction.measured),
            f"{prediction.share:.2f}",
        )
    console.print(table)
    sizes = capacities(machine)
    if not sizes:
        return
    table = Table(
        "servers alone", "a second", "bound by", "cores elsewhere", title="Carried", title_justify="left"
    )
    for capacity in sizes:
        bound = capacity.bound
        table.add_row(capacity.what, number(bound.per_second), bound.name, number(capacity.cores_elsewhere))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="results; by default those in benchmarks/results")
    files = parser.parse_args(arguments).files or sorted(RESULTS.rglob("results.json"))
    console = Console(width=None if sys.stdout.isatty() else 120)
    for machine in load(files):
        show(console, machine)


if __name__ == "__main__":
    main()
