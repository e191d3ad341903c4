"""`python -m benchmarks.idle_consumers`: what idle consumers cost the server, in messages and CPU.

Each process is a real worker with a connection of its own, here in one program so that a small machine can hold them.
It serves all queues at all priorities, so there are processes x queues x priorities standing requests. By default these
are 6 x 20 x 9 = 1,080.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import dramatiq

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer

#: How long all requests may take to stand, in seconds.
UP_SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle_consumers", description=__doc__)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--queues", type=int, default=20)
    parser.add_argument("--priorities", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long messages are counted")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(NatsServer(store, monitor_port=0))
        brokers = [
            JetStreamBroker(server.url, max_priority=options.priorities - 1 or None)
            for _ in range(options.processes)
        ]
        for broker in brokers:
            stack.callback(broker.close)
            for number in range(options.queues):
                dramatiq.actor(print, broker=broker, actor_name=f"actor{number}", queue_name=f"queue{number}")
            broker.setup()
            worker = dramatiq.Worker(broker, worker_threads=1)
            worker.start()
            stack.callback(worker.stop)
        consumers = options.processes * options.queues * options.priorities
        wait_for(server, brokers[0], options.queues, consumers)
        figures = measure(server, options.processes, options.seconds)
    if options.json:
        print(json.dumps(figures))
        return
    print(
        f"{consumers} idle consumers of {options.processes} processes: {figures['messages_per_second']:.2f} messages a "
        f"second for each process; CPU {figures['server_cpu']:.1%} of the server, "
        f"{figures['process_cpu']:.1%} of each process."
    )


def wait_for(server: NatsServer, broker: JetStreamBroker, queues: int, consumers: int) -> None:
    """Wait until all consumers have a request at the server."""
    deadline = time.monotonic() + UP_SECONDS
    while True:
        standing = 0
        for number in range(queues):
            stream = broker.names.queue_stream(f"queue{number}")
            found = broker.connection.api(f"CONSUMER.LIST.{stream}")["consumers"]
            standing += sum(info["num_waiting"] for info in found)
        if standing >= consumers:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"{standing} of {consumers} requests stand after {UP_SECONDS:.0f} s.")
        time.sleep(0.5)


def measure(server: NatsServer, processes: int, seconds: float) -> dict[str, float]:
    """Count messages and CPU for a while; returns those of each process, and the server's share of a core."""
    time.sleep(5.0)  # what starting leaves behind
    before, cpu, own = messages(server), server_cpu(server), resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    time.sleep(seconds)
    count, cpu, passed = messages(server) - before, server_cpu(server) - cpu, time.monotonic() - began
    now = resource.getrusage(resource.RUSAGE_SELF)
    used = now.ru_utime + now.ru_stime - own.ru_utime - own.ru_stime
    return {
        "messages_per_second": count / passed / processes,
        "server_cpu": cpu / passed,
        "process_cpu": used / passed / processes,
    }


def messages(server: NatsServer) -> int:
    """How many messages the server has received and sent."""
    counts = server.monitor("/varz")
    return int(counts["in_msgs"]) + int(counts["out_msgs"])


def server_cpu(server: NatsServer) -> float:
    """Seconds of CPU that the server has used."""
    fields = Path(f"/proc/{server.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
