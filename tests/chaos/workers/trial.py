"""Workers of one `fleet work` under load are killed at random, one at a time, and every attempt is accounted for.

Or the fleet is reloaded, or recycles its workers: then nothing may be repeated, and the fleet is always complete.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import Process, children, supervised_workers

__all__ = ["RELOAD", "WAYS", "Result", "run"]

PROGRAM = "tests.chaos.workers.program"

#: How a worker dies: of a signal, or of an actor of that name.
WAYS = ("SIGKILL", "SIGSEGV", "leave", "crash", "hoard")

#: The fleet replaces all its workers; nothing dies.
RELOAD = "reload"

#: How long fewer workers must serve to be counted.
MOMENT_SECONDS = 1.0

#: So long that what is not handed on is noticed.
ACK_WAIT_MS = 120_000


@dataclass
class Result:
    """What was seen.

    Attributes:
      repeats: Attempts of messages that had ended, in a process that was killed before its ack was out.
      waits: For each attempt that a kill cut off, seconds until the message's next one began.
      gap: The longest time, in seconds, in which no attempt began or ended.
      delays: For each message, seconds until it began for the first time.
      fewest: The fewest workers that served at once, of `workers`.
      memory: Resident bytes of the supervisor after the first tenth of the kills, and at the end.
    """

    kills: dict[str, int]
    workers: int
    sent: int
    lost: list[str]
    repeats: int
    unexplained: int
    waits: list[float]
    delays: list[float]
    gap: float
    fewest: int
    memory: tuple[int, int]
    descriptors: tuple[int, int]

    def lines(self) -> Iterator[str]:
        how = ", ".join(f"{way} {count}" for way, count in sorted(self.kills.items()))
        yield f"{sum(self.kills.values())} kills ({how}), {self.sent} messages"
        yield f"lost: {len(self.lost)}; repeated after the end: {self.repeats}, without a kill: {self.unexplained}"
        yield f"from a kill to the next attempt: {_in_words(self.waits)}"
        yield f"from send to the first attempt: {_in_words(self.delays)}"
        yield f"the longest time in which no attempt began or ended: {self.gap * 1000:.0f} ms"
        yield f"fewest workers that served: {self.fewest} of {self.workers}"
        megabytes = ", then ".join(f"{each / 1e6:.1f} MB" for each in self.memory)
        yield f"supervisor: {megabytes}; descriptors {self.descriptors[0]}, then {self.descriptors[1]}"


def _in_words(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    return (
        f"median {ordered[len(ordered) // 2] * 1000:.0f} ms, 99 % {ordered[int(len(ordered) * 0.99)] * 1000:.0f} ms, "
        f"most {ordered[-1] * 1000:.0f} ms ({len(ordered)})"
    )


class _Load:
    """Sends messages at a steady rate, from a thread."""

    def __init__(self, broker: JetStreamBroker, rate: float) -> None:
        self._broker = broker
        self._rate = rate
        self._stop = threading.Event()
        self.sent: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        choice = random.Random(1)
        while not self._stop.wait(1 / self._rate):
            self.send("work", "default", choice.randint(1, 60))

    def send(self, actor: str, queue: str, *arguments: int) -> str:
        key = f"{actor}-{len(self.sent)}"
        self.sent[key] = time.monotonic_ns()
        self._broker.enqueue(Message(queue, actor, (key, *arguments), {}, {}))
        return key

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()


class _Fewest:
    """The fewest workers that served, other than for a moment: on a busy machine one may miss a sign of the server."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._fewer_since: float | None = None
        self._most_of_it = 0

    def look(self, serving: int) -> None:
        now = time.monotonic()
        if serving >= self.workers:
            self._fewer_since = None
            return
        if self._fewer_since is None:
            self._fewer_since, self._most_of_it = now, serving
        self._most_of_it = max(self._most_of_it, serving)
        if now - self._fewer_since >= MOMENT_SECONDS:
            self.workers, self._fewer_since = self._most_of_it, None


def _metric(port: int, name: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(rf"^fleet_{name} (\d+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _missing(workers: Process, before: set[int]) -> set[int]:
    return before - set(children(workers.pid))


def _memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def run(
    directory: Path,
    *,
    kills: int,
    seconds: float,
    seed: int,
    processes: int = 2,
    threads: int = 8,
    rate: float = 60.0,
    ways: Sequence[str] = WAYS,
    arguments: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Kill workers one at a time, each when the fleet is complete again, over at least `seconds`.

    Parameters:
      ways: How they die; `RELOAD` for a reload in their place.
      arguments: Further ones for `fleet work`.
    """
    choice = random.Random(seed)
    runs = directory / "runs"
    runs.touch()
    port = free_port()
    with NatsServer(directory / "nats") as server:
        workers = supervised_workers(
            PROGRAM,
            log=directory / "workers.log",
            processes=processes,
            threads=threads,
            arguments=["--http", f"127.0.0.1:{port}", *arguments],
            env={"CHAOS_RUNS": str(runs), "CHAOS_URL": server.url, "CHAOS_ACK_WAIT": str(ACK_WAIT_MS)},
        )
        broker = JetStreamBroker(server.url, ack_wait=ACK_WAIT_MS, max_deliveries=50, middleware=[])
        for queue in ("default", "deadly"):
            broker.declare_queue(queue)
        load = _Load(broker, rate)
        try:
            with workers:
                return _kill(workers, broker, load, runs, port, choice, ways, kills, seconds, processes, say)
        finally:
            broker.close()


def _kill(
    workers: Process,
    broker: JetStreamBroker,
    load: _Load,
    runs: Path,
    port: int,
    choice: random.Random,
    ways: Sequence[str],
    kills: int,
    seconds: float,
    processes: int,
    say: Callable[[str], None],
) -> Result:
    def complete() -> bool:
        try:
            return _metric(port, "workers") == processes
        except OSError:
            return False

    eventually(complete, timeout=60)
    done: dict[str, int] = {}
    left: list[str] = []
    fewest = _Fewest(processes)
    killed: list[tuple[int, int]] = []
    pause = seconds / kills
    memory = descriptors = 0
    with load.running():
        for number in range(kills):
            if number == max(1, kills // 10):
                memory, descriptors = _memory(workers.pid), _descriptors(workers.pid)
            started = time.monotonic()
            before = set(children(workers.pid))
            victim = None
            time.sleep(choice.uniform(0.0, 0.05))
            if not left:
                left += choice.sample(ways, len(ways))
            way = left.pop()
            done[way] = done.get(way, 0) + 1
            if way == RELOAD:
                os.kill(workers.pid, signal.SIGHUP)
                while before & set(children(workers.pid)):
                    fewest.look(_metric(port, "workers"))
                continue
            if way.startswith("SIG"):
                victim = choice.choice(sorted(before))
                killed.append((victim, time.monotonic_ns()))
                os.kill(victim, getattr(signal, way))
            else:
                load.send(way, "deadly")
            # First something must have died, then the fleet must be complete.
            dead = eventually(partial(_missing, workers, before), timeout=60, interval=0.005)
            gone = time.monotonic_ns()
            killed += [(pid, gone) for pid in dead if pid != victim]
            while not complete():
                fewest.look(_metric(port, "workers"))
            if number % 20 == 19:
                say(f"{number + 1} kills, {len(load.sent)} messages")
            time.sleep(max(0.0, pause - (time.monotonic() - started)))
    for queue in ("default", "deadly"):
        broker.join(queue, timeout=60_000)
    after = _memory(workers.pid), _descriptors(workers.pid)
    return _account(
        runs, load, done, killed, processes, fewest.workers, (memory, after[0]), (descriptors, after[1])
    )


def _account(
    runs: Path,
    load: _Load,
    kills: dict[str, int],
    killed: list[tuple[int, int]],
    processes: int,
    fewest: int,
    memory: tuple[int, int],
    descriptors: tuple[int, int],
) -> Result:
    lives: dict[str, list[tuple[str, int, int]]] = {}
    moments = []
    for line in runs.read_text().splitlines():
        what, key, pid, when = line.split()
        lives.setdefault(key, []).append((what, int(pid), int(when)))
        moments.append(int(when))
    waits, delays = [], []
    repeats = unexplained = 0
    for key, life in lives.items():
        attempts = [(pid, when) for what, pid, when in life if what == "began"]
        ended = {pid for what, pid, _ in life if what == "ended"}
        delays.append((attempts[0][1] - load.sent[key]) / 1e9)
        for (pid, began), (_, again) in pairwise(attempts):
            # The system gives numbers of processes again within minutes; and one may run on while it is being killed.
            deaths = [when for each, when in killed if each == pid and when > began - MOMENT_SECONDS * 1e9]
            if not deaths:
                unexplained += 1
            elif pid in ended:
                repeats += 1
            else:
                waits.append((again - min(deaths)) / 1e9)
    lost = [key for key in load.sent if "ended" not in {what for what, _, _ in lives.get(key, [])}]
    gap = max((later - earlier for earlier, later in pairwise(sorted(moments))), default=0) / 1e9
    return Result(
        kills,
        processes,
        len(load.sent),
        lost,
        repeats,
        unexplained,
        waits,
        delays,
        gap,
        fewest,
        memory,
        descriptors,
    )
