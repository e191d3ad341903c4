"""What in-progress signals cost: `python -m benchmarks.signals` holds 2,000 messages with several values of `ack_wait`.

Processor time of the worker and of the server while nothing else happens, less that of an `ack_wait` of an hour.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from pathlib import Path

from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer

HELD = 2_000
SECONDS = 12.0
ACK_WAITS_MS = (3_600_000, 30_000, 15_000, 5_000, 1_000)


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _measure(server: NatsServer, ack_wait: int) -> tuple[float, float]:
    """The shares of a processor that the worker and the server take."""
    broker = JetStreamBroker(server.url, namespace=f"w{ack_wait}", ack_wait=ack_wait, middleware=[])
    try:
        broker.declare_queue("q")
        broker.enqueue_many([Message("q", "a", (number,), {}, {}) for number in range(HELD)])
        consumer = broker.consume("q", prefetch=HELD, timeout=5_000)
        held = []
        while len(held) < HELD:
            held += filter(None, [next(consumer)])
        time.sleep(2)
        since, own, server_cpu = time.monotonic(), _own_cpu(), _cpu_of(server.pid)
        time.sleep(SECONDS)
        elapsed = time.monotonic() - since
        shares = (_own_cpu() - own) / elapsed, (_cpu_of(server.pid) - server_cpu) / elapsed
        consumer.close()
        return shares
    finally:
        broker.close()


def main() -> None:
    print("| `ack_wait` | signals/s | worker | server |\n| ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as directory, NatsServer(Path(directory)) as server:
        base = _measure(server, ACK_WAITS_MS[0])
        for ack_wait in ACK_WAITS_MS[1:]:
            worker, nats = (
                100 * (used - idle) for used, idle in zip(_measure(server, ack_wait), base, strict=True)
            )
            rate = HELD / (ack_wait / 3_000)
            print(f"| {ack_wait / 1000:g} s | {rate:,.0f} | {worker:.2f} % | {nats:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
