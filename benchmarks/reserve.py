"""How many orders a second reserve stock: `python -m benchmarks.reserve`.

A nats-server that syncs before it acknowledges, and 1, 2 and 4 processes with 10 threads each, which open orders of
one piece for some seconds: of 8 products in turn, and of 1. To compare two versions, run it in both, in turn, often.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer
from tasks.ledger import PricedItem, Record
from tasks.stock import Stock

THREADS = 10


def _reserve(url: str, process: int, products: int, seconds: float, ready: Any, counts: Any) -> None:
    broker = JetStreamBroker(url)
    bucket = broker.bucket("stock")
    stock = Stock(
        bucket, {f"P-{number}": 10**9 for number in range(products)}, lambda: time.time_ns() // 10**6
    )
    stock.available()
    bucket.watch("level", stock.heard)
    ready.wait()
    end = time.monotonic() + seconds

    def work(thread: int) -> int:
        done = 0
        while time.monotonic() < end:
            line = PricedItem(f"P-{(thread + done) % products}", 1, 100)
            stock.open(f"o-{process}-{thread}-{done}", Record("held", {"held": 1}, lines=(line,)))
            done += 1
        return done

    with ThreadPoolExecutor(THREADS) as pool:
        counts.put(sum(pool.map(work, range(THREADS))))
    broker.close()


def measure(processes: int, products: int, seconds: float) -> float:
    """Return the orders reserved in a second."""
    context = multiprocessing.get_context("spawn")
    with NatsServer() as server:
        ready, counts = context.Barrier(processes), context.Queue()
        running = [
            context.Process(target=_reserve, args=(server.url, number, products, seconds, ready, counts))
            for number in range(processes)
        ]
        for one in running:
            one.start()
        total = sum(counts.get(timeout=seconds + 120) for _ in running)
        for one in running:
            one.join()
    return total / seconds


def main() -> None:
    """Measure every case once."""
    parser = argparse.ArgumentParser(description="How many orders a second reserve stock.")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each case; 5 by default")
    seconds = parser.parse_args().seconds
    for products in (8, 1):
        for processes in (1, 2, 4):
            rate = measure(processes, products, seconds)
            print(f"{products} products, {processes} processes: {rate:.0f} orders/s", flush=True)


if __name__ == "__main__":
    main()
