"""The faults: each is begun, lasts, and is ended again; what it left behind is the service's to mend."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import nats
from nats.js.api import DiscardPolicy

from tests.chaos import network
from tests.chaos.at_once import at_once
from tests.chaos.fleet import ACK_WAIT, Fleet, pick, send

Inject = Callable[[Fleet, random.Random], None]

BOTH = frozenset({"single", "cluster"})
CLUSTER = frozenset({"cluster"})


@dataclass(frozen=True)
class Fault:
    """A fault: `inject` returns when it has ended. `title` says what it is in the table."""

    name: str
    title: str
    inject: Inject
    topologies: frozenset[str] = BOTH
    cuts: bool = False


def _kill_worker(fleet: Fleet, choice: random.Random) -> None:
    pid = pick(fleet.worker_pids(), choice)
    if pid is not None:
        send(pid, signal.SIGKILL)


def _kill_master(fleet: Fleet, choice: random.Random) -> None:
    running = [workers for workers in fleet.workers if workers.running]
    if running:
        send(choice.choice(running).pid, signal.SIGKILL)


def _kill_web(fleet: Fleet, choice: random.Random) -> None:
    from tests.support.processes import children

    for pid in children(fleet.web.pid):
        send(pid, signal.SIGKILL)


def _kill_node(fleet: Fleet, choice: random.Random) -> None:
    with fleet.store_lock:
        fleet.kill_node(choice.choice(fleet.nodes), down=choice.uniform(0.5, 2.0))


def _kill_leader(fleet: Fleet, choice: random.Random) -> None:
    with fleet.store_lock:
        fleet.kill_node(fleet.leader(), down=choice.uniform(1.0, 3.0))


def _stop_worker(fleet: Fleet, choice: random.Random) -> None:
    pid = pick(fleet.worker_pids(), choice)
    if pid is not None:
        send(pid, signal.SIGSTOP)
        try:
            time.sleep(ACK_WAIT / 1000 + 2)
        finally:
            send(pid, signal.SIGCONT)


def _isolate_leader(fleet: Fleet, choice: random.Random) -> None:
    with fleet.store_lock:
        fleet.isolate_node(fleet.leader().name, choice.uniform(6.0, 9.0))


def _isolate_service(fleet: Fleet, choice: random.Random) -> None:
    with fleet.store_lock:
        fleet.isolate_service(choice.uniform(5.0, 8.0))


def _gateway(seconds: float, **knobs: Any) -> Inject:
    def inject(fleet: Fleet, choice: random.Random) -> None:
        fleet.knobs(**knobs)
        try:
            time.sleep(seconds)
        finally:
            fleet.knobs(**{name: type(value)() for name, value in knobs.items()})

    return inject


def _fill_store(fleet: Fleet, choice: random.Random) -> None:
    # Not while a server is down: the limits have to be set, and above all to be lifted again.
    with fleet.store_lock:
        asyncio.run(_fill(fleet.nats_url, 5.0))


async def _fill(url: str, seconds: float) -> None:
    client = await nats.connect(url.split(","), connect_timeout=5)
    js = client.jetstream(timeout=30)
    limited = []
    try:
        for stream in ("ORDERS", "KV_dramatiq-stock"):
            info = await js.stream_info(stream)
            before = (info.config.max_bytes, info.config.discard)
            config = info.config
            config.max_bytes = info.state.bytes + 1
            config.discard = DiscardPolicy.NEW
            limited.append((config, before))
            await js.update_stream(config)
        await asyncio.sleep(seconds)
    finally:
        for config, (max_bytes, discard) in limited:
            config.max_bytes, config.discard = max_bytes, discard
            await js.update_stream(config)
        await client.close()


FAULTS: tuple[Fault, ...] = (
    Fault("worker-killed", "kill -9 of a worker process", _kill_worker),
    Fault("master-killed", "kill -9 of a supervisor", _kill_master),
    Fault("web-killed", "kill -9 of gunicorn's workers", _kill_web),
    Fault("nats-killed", "kill -9 of a nats-server, restarted", _kill_node),
    Fault("leader-killed", "kill -9 of the leader, restarted", _kill_leader, CLUSTER),
    Fault("worker-stopped", "worker suspended for longer than ack_wait", _stop_worker),
    Fault("nodes-parted", "leader cut off from the other nodes", _isolate_leader, CLUSTER, cuts=True),
    Fault("service-parted", "service cut off from all nodes", _isolate_service, CLUSTER, cuts=True),
    Fault("gateway-slow", "gateway slow", _gateway(5.0, latency_ms=700, latency_jitter_ms=600)),
    Fault("gateway-hanging", "gateway hanging", _gateway(6.0, latency_ms=10_000)),
    Fault("gateway-refusing", "gateway refusing", _gateway(6.0, refuse=True)),
    Fault(
        "gateway-after-charge",
        "gateway failing after it has charged",
        _gateway(5.0, failure_after_charge_rate=0.4, hang_after_charge_rate=0.2),
    ),
    Fault("store-full", "event stream and stock bucket full", _fill_store),
)

BY_NAME = {fault.name: fault for fault in FAULTS}


def possible(topology: str, names: Iterable[str] | None = None, *, cuts: bool | None = None) -> list[Fault]:
    """Return the faults that can be had with a topology on this machine, of those named."""
    may_cut = network.available() is None if cuts is None else cuts
    chosen = FAULTS if names is None else [BY_NAME[name] for name in names]
    return [fault for fault in chosen if topology in fault.topologies and (may_cut or not fault.cuts)]


def mixed(among: list[Fault], count: int = 4) -> Fault:
    """Return a fault that is several at once, drawn again each time."""

    def inject(fleet: Fleet, choice: random.Random) -> None:
        drawn = choice.sample(among, min(count, len(among)))
        at_once({fault.name: partial(fault.inject, fleet) for fault in drawn}, choice, 120)

    topologies = frozenset.intersection(*(fault.topologies for fault in among))
    return Fault("mixed", f"{count} of these at once", inject, topologies)
