"""The process that enqueues and keeps the clock, in the contender's own environment.

Run by the harness as `python -m benchmarks.driver OPERATION --messages N …`; the contender, the servers' urls and
the tally come through the environment. Prints one line of JSON: the figures of the operation, its own CPU time
and its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from benchmarks import contenders, orders_client
from benchmarks.contenders.contender import App
from benchmarks.pace import Pace
from benchmarks.tally import Tally

Figures = dict[str, float]
RETRY_SECONDS = 60.0


def clocked(work: Callable[[], None], messages: int) -> Figures:
    cpu = time.process_time()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "per_second": messages / seconds, "driver_cpu": time.process_time() - cpu}


def enqueue(app: App, options: argparse.Namespace) -> Figures:
    app.enqueue()  # connects, declares
    return clocked(lambda: app.enqueue_each(options.messages, options.threads), options.messages)


def batch(app: App, options: argparse.Namespace) -> Figures:
    app.enqueue_batch([-1])
    store = app.enqueue_atomic_batch if options.atomic else app.enqueue_batch
    return clocked(lambda: store(range(options.messages)), options.messages)


def in_shares(enqueue: Callable[[Sequence[int]], None], indices: range) -> None:
    """Enqueue from as many threads as the contender fills its queue with."""
    threads = contenders.find(os.environ["BENCH_CONTENDER"]).fill_threads
    if threads == 1:
        enqueue(indices)
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(enqueue, indices[start::threads]) for start in range(threads)]:
            future.result()


def fill(app: App, options: argparse.Namespace) -> Figures:
    """Only fills the queue: the fastest way there is, nothing is measured."""
    fill_with = app.enqueue_atomic_batch if options.atomic else app.enqueue_batch
    in_shares(fill_with, range(options.messages))
    return {}


def delayed(app: App, options: argparse.Namespace) -> Figures:
    work = range(options.first, options.first + options.messages)
    return clocked(
        lambda: in_shares(lambda part: app.enqueue_delayed(part, options.due_ns), work), options.messages
    )


def probe(app: App, options: argparse.Namespace) -> Figures:
    """Enqueues one message at a time; writes when each call began into `sent`, for the harness to compare."""
    sent = []
    for index in range(options.messages):
        time.sleep(options.gap)
        sent.append(time.monotonic_ns())
        app.enqueue(index)
    (tally_directory() / "sent").write_text(json.dumps(sent))
    return {}


def sustain(app: App, options: argparse.Namespace) -> Figures:
    """Keeps sending for some seconds; says how much was sent and run meanwhile, and when it began (`paced`)."""
    app.enqueue()
    tally = Tally(tally_directory())
    cpu, before = time.process_time(), tally.read().messages
    pace = Pace(options.rate, options.seconds, options.first)
    app.pump(pace.take, options.threads, retry=options.retry)
    seconds = time.monotonic() - pace.start
    run = tally.read().messages - before
    (tally_directory() / "paced").write_text(json.dumps({"start": pace.start, "given": pace.given}))
    return {"seconds": seconds, "sent": pace.given, "run": run, "driver_cpu": time.process_time() - cpu}


def roundtrip(app: App, options: argparse.Namespace) -> Figures:
    for _ in range(5):
        app.ask(0)
    took = []
    for index in range(options.messages):
        began = time.perf_counter()
        if app.ask(index) != index:
            raise RuntimeError("a result does not belong to its message")
        took.append(time.perf_counter() - began)
    (tally_directory() / "took").write_text(json.dumps(took))
    return {}


def hold(app: App, options: argparse.Namespace) -> Figures:
    app.enqueue_hold(0)
    return {}


def first_after_restart(app: App, options: argparse.Namespace) -> Figures:
    """Connected, waits for the file `go`, then tries until a message is stored."""
    app.enqueue(0)
    directory = tally_directory()
    (directory / "prepared").touch()
    deadline = time.monotonic() + RETRY_SECONDS
    while not (directory / "go").exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the server was not restarted")
        time.sleep(0.005)
    attempts = 0
    while True:
        attempts += 1
        try:
            app.enqueue(1)
            return {"attempts": attempts, "stored_ns": time.monotonic_ns()}
        except Exception:  # whatever the library raises while its server comes back
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def local_drain(app: App, options: argparse.Namespace) -> Figures:
    """Fills and drains in this process, for contenders that have no other."""
    app.enqueue_batch(range(options.messages))
    tally = Tally(tally_directory())
    cpu = time.process_time()
    app.start_worker()
    deadline = time.monotonic() + 300
    while tally.read().messages < options.messages:
        if time.monotonic() > deadline:
            raise RuntimeError("the messages were not run within 300 s")
        time.sleep(0.02)
    return {"worker_cpu": time.process_time() - cpu}


def post(app: App, options: argparse.Namespace) -> Figures:
    took: list[float] = []
    url, count = app.web_url, options.messages  # type: ignore[attr-defined]
    figures = clocked(
        lambda: took.extend(orders_client.post(url, count, options.threads, options.rate)), count
    )
    (tally_directory() / "took").write_text(json.dumps(took))
    return figures


def confirmed(app: App, options: argparse.Namespace) -> Figures:
    times = app.wait_confirmed(options.messages, 300)  # type: ignore[attr-defined]
    (tally_directory() / "orders").write_text(json.dumps(sorted(times)))
    return {}


OPERATIONS: dict[str, Callable[[App, argparse.Namespace], Figures]] = {
    "enqueue": enqueue,
    "batch": batch,
    "fill": fill,
    "delayed": delayed,
    "probe": probe,
    "sustain": sustain,
    "roundtrip": roundtrip,
    "hold": hold,
    "first_after_restart": first_after_restart,
    "local_drain": local_drain,
    "post": post,
    "confirmed": confirmed,
}


def tally_directory() -> Path:
    return Path(os.environ["BENCH_TALLY"])


def versions(names: list[str]) -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operation", choices=[*OPERATIONS, "versions"])
    parser.add_argument("--messages", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--due-ns", type=int, default=0)
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--atomic", action="store_true")
    parser.add_argument("--with-worker", action="store_true")
    parser.add_argument("--names", default="")
    options = parser.parse_args()
    if options.operation == "versions":
        print(json.dumps(versions([name for name in options.names.split(",") if name])))
        return
    app = contenders.find(os.environ["BENCH_CONTENDER"]).app()
    app.start()
    if options.with_worker:
        app.start_worker()
    figures = OPERATIONS[options.operation](app, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**figures, "driver_peak_rss": peak}), flush=True)
    app.close()


if __name__ == "__main__":
    main()
