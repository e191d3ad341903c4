"""The faults of the library's chaos: each is begun, lasts, and is ended again.

`repeats` says that docs/guarantees.md allows what runs meanwhile to run again, `destroys` that what was stored before
its end may be lost or come back.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError

from tests.chaos.at_once import at_once
from tests.chaos.fleet import pick, send
from tests.chaos.library.books import connected
from tests.chaos.library.checker import QUIET
from tests.chaos.library.fleet import LibraryFleet
from tests.chaos.library.settings import ACK_WAIT, EVENTS, NAMESPACE, NEW, OLD
from tests.support.proxy import Proxy

Inject = Callable[[LibraryFleet, random.Random], None]

BOTH = frozenset({"single", "cluster"})
CLUSTER = frozenset({"cluster"})

_STREAMS = (f"{NAMESPACE}_q_first", f"{NAMESPACE}_q_second", f"{NAMESPACE}_q_ticks", EVENTS)


@dataclass(frozen=True)
class Fault:
    """A fault: `inject` returns when it has ended. `title` says what it is in the table."""

    name: str
    title: str
    inject: Inject
    topologies: frozenset[str] = BOTH
    repeats: bool = False
    destroys: bool = False


def _nothing(fleet: LibraryFleet, choice: random.Random) -> None:
    time.sleep(6)


# Processes


def _kill_worker(fleet: LibraryFleet, choice: random.Random) -> None:
    pid = pick(fleet.worker_pids(), choice)
    if pid is not None:
        send(pid, signal.SIGKILL)


def _kill_supervisor(fleet: LibraryFleet, choice: random.Random) -> None:
    running = [workers for workers in fleet.fleets if workers.running]
    if running:
        send(choice.choice(running).pid, signal.SIGKILL)


def _kill_producer(fleet: LibraryFleet, choice: random.Random) -> None:
    running = [producer for producer in fleet.producers if producer.running]
    if running:
        send(choice.choice(running).pid, signal.SIGKILL)


def _stop_worker(fleet: LibraryFleet, choice: random.Random) -> None:
    pid = pick(fleet.worker_pids(), choice)
    if pid is not None:
        send(pid, signal.SIGSTOP)
        try:
            time.sleep(ACK_WAIT / 1000 + 2)
        finally:
            send(pid, signal.SIGCONT)


def _reload(fleet: LibraryFleet, choice: random.Random) -> None:
    running = [workers for workers in fleet.fleets if workers.running]
    if running:
        send(choice.choice(running).pid, signal.SIGHUP)
        time.sleep(choice.uniform(1, 3))


def _restart(fleet: LibraryFleet, choice: random.Random) -> None:
    """SIGTERM; the harness starts the fleet again as a platform would."""
    running = [workers for workers in fleet.fleets if workers.running]
    if running:
        send(choice.choice(running).pid, signal.SIGTERM)
        time.sleep(choice.uniform(1, 3))


def _roll(fleet: LibraryFleet, choice: random.Random) -> None:
    """One fleet is set back to the older version and forward again, while the other one runs the newer all along."""
    rolling = fleet.fleets[0]
    for version in (OLD, NEW):
        fleet.release(rolling, version)
        time.sleep(choice.uniform(4, 7))


def _set_clock(fleet: LibraryFleet, choice: random.Random) -> None:
    """The clock of one client jumps, and jumps back."""
    clock = fleet.clock(choice.choice([*fleet.links]))
    clock.write_text(str(choice.choice((-1, 1)) * choice.uniform(1, 20)))
    time.sleep(choice.uniform(3, 8))
    clock.write_text("0")


# Servers


def _kill_node(fleet: LibraryFleet, choice: random.Random) -> None:
    with fleet.store_lock:
        fleet.kill_node(choice.choice(fleet.nodes), down=choice.uniform(0.2, 3.0))


def _kill_leader(fleet: LibraryFleet, choice: random.Random) -> None:
    with fleet.store_lock:
        fleet.kill_node(fleet.leader(choice.choice(_STREAMS)), down=choice.uniform(1.0, 3.0))


def _kill_node_for_long(fleet: LibraryFleet, choice: random.Random) -> None:
    with fleet.store_lock, fleet.down(*fleet.nodes):
        time.sleep(ACK_WAIT / 1000 + choice.uniform(0, 3))


def _freeze(seconds: tuple[float, float]) -> Inject:
    def inject(fleet: LibraryFleet, choice: random.Random) -> None:
        with fleet.store_lock:
            node = fleet.leader(choice.choice(_STREAMS))
            node.suspend()
            try:
                time.sleep(choice.uniform(*seconds))
            finally:
                node.resume()

    return inject


def _move_leaders(fleet: LibraryFleet, choice: random.Random) -> None:
    async def step_down(js: JetStreamContext) -> None:
        for stream in _STREAMS:
            await js._nc.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}", b"", timeout=5)
            consumers = await js.consumers_info(stream)
            for info in consumers:
                subject = f"$JS.API.CONSUMER.LEADER.STEPDOWN.{stream}.{info.name}"
                await js._nc.request(subject, b"", timeout=5)

    with fleet.store_lock:
        connected(fleet.nats_url, step_down)


def _empty_store(fleet: LibraryFleet, choice: random.Random) -> None:
    with fleet.store_lock, fleet.down(*fleet.nodes):
        fleet.restore_store(None)


def _restore_store(fleet: LibraryFleet, choice: random.Random) -> None:
    with fleet.store_lock:
        with fleet.down(*fleet.nodes):
            copy = fleet.copy_store()
        time.sleep(choice.uniform(3, 6))
        with fleet.down(*fleet.nodes):
            fleet.restore_store(copy)


def _fill_store(fleet: LibraryFleet, choice: random.Random) -> None:
    """The server has less room than it uses: everything that would be stored is refused."""
    with fleet.store_lock:
        for room in (1, None):
            with fleet.down(*fleet.nodes):
                for node in fleet.nodes:
                    node.max_file_store = room
            if room is not None:
                time.sleep(choice.uniform(2, 5))


def _delete_stream(fleet: LibraryFleet, choice: random.Random) -> None:
    stream = choice.choice(_STREAMS[:2])

    async def delete(js: JetStreamContext) -> None:
        await js.delete_stream(stream)

    with fleet.store_lock:
        connected(fleet.nats_url, delete)
        time.sleep(choice.uniform(0.5, 2))


def _delete_consumers(fleet: LibraryFleet, choice: random.Random) -> None:
    stream = choice.choice(_STREAMS)

    async def delete(js: JetStreamContext) -> None:
        for info in await js.consumers_info(stream):
            # An event's consumer that is made again begins with new events, so that one stays.
            if stream != EVENTS:
                await js.delete_consumer(stream, info.name)

    with fleet.store_lock:
        connected(fleet.nats_url, delete)
        time.sleep(choice.uniform(0.5, 2))


def _delete_dead_letters(fleet: LibraryFleet, choice: random.Random) -> None:
    """The stream of dead letters takes nothing for a while."""

    async def limit(js: JetStreamContext) -> None:
        info = await js.stream_info(f"{NAMESPACE}_dead")
        before = info.config.max_msg_size
        config = info.config
        config.max_msg_size = 1
        await js.update_stream(config)
        try:
            time.sleep(choice.uniform(2, 5))  # noqa: ASYNC251 - nothing else runs in this loop
        finally:
            config.max_msg_size = before
            await js.update_stream(config)

    with fleet.store_lock:
        try:
            connected(fleet.nats_url, limit)
        except NotFoundError:
            return


# Links and logins


def _cut(fleet: LibraryFleet, choice: random.Random) -> None:
    for link in fleet.all_links:
        link.cut()


def _lose(seconds: tuple[float, float]) -> Inject:
    return _links(Proxy.lose, Proxy.restore, seconds)


def _links(
    begin: Callable[[Proxy], object], end: Callable[[Proxy], object], seconds: tuple[float, float]
) -> Inject:
    """The links of one client, drawn by lot, or of all."""

    def inject(fleet: LibraryFleet, choice: random.Random) -> None:
        clients = choice.choice([[client] for client in fleet.links] + [list(fleet.links)])
        links = [link for client in clients for link in fleet.links[client]]
        for link in links:
            begin(link)
        try:
            time.sleep(choice.uniform(*seconds))
        finally:
            for link in links:
                end(link)

    return inject


def _deafen(link: Proxy) -> None:
    link.deaf = True


def _mute(link: Proxy) -> None:
    link.mute = True


def _slow_down(link: Proxy) -> None:
    link.rate = 20_000


def _speed_up(link: Proxy) -> None:
    link.rate = None


def _rotate(fleet: LibraryFleet, choice: random.Random) -> None:
    """The key is rotated: the file is half written for a moment, and the old key is refused from then on."""
    with fleet.store_lock:
        fresh = type(fleet.keys[0])()
        fleet.keys = [fresh, fleet.keys[0]]
        fleet.admit(fleet.keys)
        fleet.nkey.write_text(fresh.seed[:20])
        for link in fleet.all_links:
            link.cut()
        time.sleep(choice.uniform(0.2, 2))
        fleet.nkey.write_text(fresh.seed)
        fleet.keys = [fresh]
        fleet.admit(fleet.keys)
        time.sleep(choice.uniform(0.2, 1))


def _refuse(fleet: LibraryFleet, choice: random.Random) -> None:
    """The clients' login is refused, and admitted again."""
    with fleet.store_lock:
        fleet.admit([])
        try:
            time.sleep(choice.uniform(1, 4))
        finally:
            fleet.admit(fleet.keys)


_SHORT = (0.5, 4.0)
_LONG = (ACK_WAIT / 1000 + 1, ACK_WAIT / 1000 + 4)

FAULTS: tuple[Fault, ...] = (
    Fault(QUIET, "no fault, for 6 s", _nothing),
    Fault("worker-killed", "kill -9 of a worker process", _kill_worker, repeats=True),
    Fault("supervisor-killed", "kill -9 of a supervisor", _kill_supervisor, repeats=True),
    Fault("producer-killed", "kill -9 of a producer", _kill_producer),
    Fault("worker-stopped", "worker suspended for longer than ack_wait", _stop_worker, repeats=True),
    Fault("fleet-reloaded", "fleet reloaded (HUP)", _reload),
    Fault("fleet-restarted", "fleet stopped (TERM) and started", _restart),
    Fault("version-rolled", "older version of the program beside the newer", _roll),
    Fault("clock-set", "clock of a client wrong by up to 20 s", _set_clock),
    Fault("nats-killed", "kill -9 of a nats-server, restarted", _kill_node, repeats=True),
    Fault("leader-killed", "kill -9 of a leader, restarted", _kill_leader, CLUSTER, repeats=True),
    Fault(
        "nats-killed-long",
        "kill -9 of all servers, for longer than ack_wait",
        _kill_node_for_long,
        repeats=True,
    ),
    Fault("leader-frozen", "leader frozen for a moment", _freeze(_SHORT)),
    Fault("leader-frozen-long", "leader frozen for longer than ack_wait", _freeze(_LONG), repeats=True),
    Fault("leaders-moved", "all leaders moved", _move_leaders, CLUSTER),
    Fault("links-cut", "all connections broken", _cut),
    Fault("links-lost", "connections broken and refused", _lose(_SHORT)),
    Fault(
        "links-lost-long",
        "connections broken and refused for longer than ack_wait",
        _lose(_LONG),
        repeats=True,
    ),
    Fault("links-deaf", "half-open: clients hear nothing", _links(_deafen, Proxy.restore, _SHORT)),
    Fault("links-mute", "half-open: servers hear nothing", _links(_mute, Proxy.restore, _SHORT)),
    Fault("links-held", "links that pass nothing on", _links(Proxy.hold, Proxy.release, _SHORT)),
    Fault(
        "links-stranded",
        "connections that pass nothing on any more",
        _links(Proxy.strand, lambda _: None, _LONG),
        repeats=True,
    ),
    Fault("links-slow", "links of 20 kB/s", _links(_slow_down, _speed_up, (3.0, 6.0))),
    Fault("login-rotated", "key rotated, its file half written", _rotate),
    Fault("login-refused", "login refused, and admitted again", _refuse),
    Fault("dead-letters-refused", "no dead letter can be stored", _delete_dead_letters),
    Fault("store-full", "server without room", _fill_store, repeats=True),
    Fault("consumers-deleted", "consumers deleted", _delete_consumers, repeats=True),
    Fault("stream-deleted", "a queue's stream deleted", _delete_stream, destroys=True),
    Fault("store-emptied", "server comes back empty", _empty_store, destroys=True),
    Fault("store-restored", "server comes back with an older copy", _restore_store, destroys=True),
)

BY_NAME = {fault.name: fault for fault in FAULTS}


def possible(topology: str, names: Iterable[str] | None = None) -> list[Fault]:
    """Return the faults that can be had with a topology, of those named."""
    chosen = FAULTS if names is None else [BY_NAME[name] for name in names]
    return [fault for fault in chosen if topology in fault.topologies]


def mixed(among: list[Fault], choice: random.Random, count: int = 3) -> Fault:
    """Return a fault that is several at once."""
    drawn = choice.sample(among, min(count, len(among)))

    def inject(fleet: LibraryFleet, choice: random.Random) -> None:
        at_once({fault.name: partial(fault.inject, fleet) for fault in drawn}, choice, 180)

    return Fault(
        "mixed",
        f"at once: {', '.join(fault.name for fault in drawn)}",
        inject,
        # Two short outages, one after the other, may be a long one.
        repeats=True,
        destroys=any(fault.destroys for fault in drawn),
    )
