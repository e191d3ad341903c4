"""Reads what there is: the producers' log, the journal of the runs, dead letters, what waits, and results.

With plain nats-py, and without the code that is under test; only the names on the wire are shared, and what results are
called.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import nats
from dramatiq import Message
from dramatiq.results import ResultBackend
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError

from tests.chaos.library.settings import EVENTS, NAMESPACE, QUEUES

T = TypeVar("T")

#: How many messages of a stream are looked at, when something is stuck.
_MOST = 2_000


@dataclass(frozen=True)
class Call:
    """What a producer asked for, and what it was told.

    Attributes:
      labels: What it asked for; `actors` and `ids` of the same messages, none for an event.
      told: For each label *stored*, *not stored* or *unknown*; empty when the producer died in the call.
      key: The unique key. `callback`: the label of a group's.
      asked_at, told_at: Seconds since 1970; `seconds` is what the call took by a clock that is not set.
      error: What was raised; `surprise` says that it is no error of the library.
    """

    name: str
    kind: str
    asked_at: float
    labels: tuple[str, ...] = ()
    actors: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    told: dict[str, str] = field(default_factory=dict)
    told_at: float | None = None
    seconds: float = 0.0
    key: str | None = None
    callback: str | None = None
    error: str = ""
    surprise: bool = False

    @property
    def stored(self) -> bool:
        """Whether all that it asked for is stored."""
        return bool(self.told) and set(self.told.values()) == {"stored"}


@dataclass(frozen=True)
class Run:
    """One line of the journal: a message began, ended, failed or was skipped."""

    at: float
    pid: int
    what: str
    actor: str
    label: str
    id: str
    retries: int = 0
    stored: int = 0
    error: str = ""


@dataclass(frozen=True)
class Size:
    """What a process has: resident bytes, threads, open files."""

    memory: int
    threads: int
    files: int


@dataclass(frozen=True)
class Period:
    """A fault's time, seconds since 1970; see `Fault` for the rest."""

    fault: str
    began: float
    ended: float
    repeats: bool = False
    destroys: bool = False


@dataclass(frozen=True)
class Books:
    """Everything that the checker looks at.

    Attributes:
      letters: Label and actor of each dead letter, with its reason and error.
      waiting: What waits in the queues and at the consumers, in words; `waiting_labels` those of its messages.
      results: Those labels of `answer` of which a result is there, or was before a fault destroyed the store.
      consumers: The names of the consumers of each stream.
      unhealthy: What the supervisors' probes and the producer's end complain about.
      sizes: Of each process that lived throughout, at first and at last.
      settled: Whether all was done within the time allowed.
    """

    calls: list[Call]
    runs: list[Run]
    letters: list[dict[str, str]]
    waiting: list[str] = field(default_factory=list)
    waiting_labels: frozenset[str] = frozenset()
    results: frozenset[str] = frozenset()
    consumers: dict[str, list[str]] = field(default_factory=dict)
    unhealthy: list[str] = field(default_factory=list)
    sizes: dict[int, tuple[Size, Size]] = field(default_factory=dict)
    periods: list[Period] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


class Lines:
    """A file of JSON lines that grows; each look reads what is new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Log:
    """The calls, as the lines of the producers' log tell of them."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._calls: dict[str, dict[str, Any]] = {}

    def read(self) -> list[Call]:
        for line in self._lines.new():
            name, at = line.pop("call"), line.pop("at")
            call = self._calls.setdefault(name, {"name": name})
            call.update(line)
            call["told_at" if "told" in line else "asked_at"] = at
        return [
            Call(**{name: tuple(value) if isinstance(value, list) else value for name, value in call.items()})
            for call in self._calls.values()
        ]


class Journal:
    """The runs, as the workers wrote them down."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self.runs: list[Run] = []

    def read(self) -> list[Run]:
        self.runs += [Run(**line) for line in self._lines.new()]
        return self.runs


def sizes(pids: Iterable[int]) -> dict[int, Size]:
    """Measure processes; those that have ended are left out."""
    found = {}
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            found[pid] = Size(int(values["VmRSS"].split()[0]) * 1024, int(values["Threads"]), files)
        except (OSError, KeyError):
            continue
    return found


def results_of(backend: ResultBackend, calls: Iterable[Call]) -> frozenset[str]:
    """Return those labels of `answer` that have a result."""
    found = set()
    for call in calls:
        for label, actor, message_id in zip(call.labels, call.actors, call.ids, strict=False):
            if actor != "answer":
                continue
            message: Message[Any] = Message("first", actor, (), {}, {}, message_id=message_id)
            try:
                if backend.get_result(message) == label:
                    found.add(label)
            except Exception:  # noqa: BLE001, S112 - then it is not there, and that is what is asked
                continue
    return frozenset(found)


@dataclass(frozen=True)
class Server:
    """What the servers have."""

    letters: list[dict[str, str]]
    waiting: list[str]
    waiting_labels: frozenset[str]
    consumers: dict[str, list[str]]


def read_server(url: str) -> Server:
    """Read dead letters, what waits, and consumers."""
    return connected(url, _server)


def connected(url: str, work: Callable[[JetStreamContext], Coroutine[Any, Any, T]]) -> T:
    """Do something with a connection of the harness's own."""

    async def ignore(_error: Exception) -> None:
        pass

    async def run() -> T:
        client = await nats.connect(url.split(","), connect_timeout=5, allow_reconnect=False, error_cb=ignore)
        try:
            async with asyncio.timeout(60):
                return await work(client.jetstream(timeout=10))
        finally:
            await client.close()

    return asyncio.run(run())


async def _server(js: JetStreamContext) -> Server:
    waiting: list[str] = []
    labels: set[str] = set()
    consumers: defaultdict[str, list[str]] = defaultdict(list)
    for queue in QUEUES:
        stream = f"{NAMESPACE}_q_{queue}"
        stored = [m for m in await _messages(js, stream) if ".cron." not in m["subject"]]
        if queue == "ticks":
            # One that was due just now is no backlog.
            stored = stored if len(stored) > 3 else []
        labels |= {m["label"] for m in stored}
        waiting += [f"{m['actor']} {m['label']} in {queue}, on {m['subject']}" for m in stored]
        await _consumers(js, stream, consumers)
    for info in await _consumers(js, EVENTS, consumers):
        if unsettled := (info.num_pending or 0) + (info.num_ack_pending or 0):
            waiting.append(f"{unsettled} events for {info.name}")
    letters = [
        {"label": m["label"], "actor": m["actor"], "reason": m["reason"], "error": m["error"]}
        for m in await _messages(js, f"{NAMESPACE}_dead")
    ]
    return Server(letters, waiting, frozenset(labels), dict(consumers))


async def _consumers(js: JetStreamContext, stream: str, into: dict[str, list[str]]) -> list[Any]:
    try:
        found = await js.consumers_info(stream)
    except NotFoundError:
        return []
    into[stream] = sorted(info.name for info in found)
    return found


async def _messages(js: JetStreamContext, stream: str) -> list[dict[str, str]]:
    """Read the first messages of a stream one by one, which takes nothing and needs no consumer."""
    found: list[dict[str, str]] = []
    sequence = 1
    while len(found) < _MOST:
        try:
            stored = await js.get_msg(stream, subject=">", seq=sequence, next=True)
        except NotFoundError:
            break
        sequence = (stored.seq or 0) + 1
        headers = stored.headers or {}
        try:
            message = Message.decode(stored.data or b"")
            label, actor = str(message.args[0]) if message.args else message.actor_name, message.actor_name
        except Exception:  # noqa: BLE001 - an event is no message
            label, actor = (stored.data or b"").decode(errors="replace"), ""
        found.append(
            {
                "subject": stored.subject or "",
                "label": label,
                "actor": headers.get("Dramatiq-Dead-Actor", actor),
                "reason": headers.get("Dramatiq-Dead-Reason", ""),
                "error": headers.get("Dramatiq-Dead-Error", "")[:200],
            }
        )
    return found
