"""A shop's eight tasks on Dramatiq and JetStream: the port of `shop_celery.py`, function by function.

Workers:  fleet work shop
Program:  python shop.py
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import dramatiq
from dramatiq import Message
from dramatiq.middleware import CurrentMessage, GroupCallbacks, TimeLimitExceeded
from dramatiq.results import Results
from dramatiq_abort import Abortable, abort

from dramatiq_jetstream import JetStreamBroker, group
from dramatiq_jetstream.abort import JetStreamBackend as Aborts
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.progress import Progress, progress, read_progress
from dramatiq_jetstream.rate_limits import JetStreamBackend as Limits
from dramatiq_jetstream.results import JetStreamBackend as ResultBackend

TICKED = Path("heartbeat")

broker = JetStreamBroker(namespace="shop")
broker.add_middleware(CurrentMessage())
broker.add_middleware(GroupCallbacks(Limits(broker)))
broker.add_middleware(Results(backend=ResultBackend(broker), store_results=True))
broker.add_middleware(Abortable(backend=Aborts(broker)))
broker.add_middleware(Progress())
broker.add_middleware(Periodic())
dramatiq.set_broker(broker)


@dramatiq.actor(max_retries=5, min_backoff=100)
def fetch(name):
    retries = CurrentMessage.get_current_message().options.get("retries", 0)
    if retries < 2:
        raise ConnectionError("not yet")
    return f"{name}, at attempt {retries + 1}"


@dramatiq.actor
def count(page):
    return len(page.split())


@dramatiq.actor
def total(members):
    """A callback gets no results, so it is given the messages, and asks for theirs."""
    return sum(Message(**member).get_result(block=True) for member in members)


@dramatiq.actor(queue_name="mail")
def remind(sent):
    return time.time() - sent > 0.9


@dramatiq.actor(every=1_000, max_age=1_000)
def heartbeat():
    TICKED.touch()


@dramatiq.actor(rate="20/s", concurrency=1, key="customer")
def charge(customer):
    began = time.time()
    time.sleep(0.05)
    return began, time.time()


@dramatiq.actor(time_limit=60_000)
def export(rows):
    for row in range(rows):
        progress(row, rows)
        time.sleep(0.05)


@dramatiq.actor(time_limit=3_000)
def crawl():
    try:
        for _ in range(600):
            time.sleep(0.1)  # a time limit strikes between two lines of Python
    except TimeLimitExceeded:
        return "what it had"


def main():
    print("retries:", fetch.send("a").get_result(block=True, timeout=60_000))
    chain = (fetch.message("b") | count.message()).run()
    print("chain:", chain.get_result(block=True, timeout=60_000))

    pages = ["one two", "three", "four five six"]
    counts = group(count.message(page) for page in pages)
    done = total.message([member.asdict() for member in counts.children])
    counts.add_completion_callback(done)
    counts.run()
    print("chord:", done.get_result(block=True, timeout=60_000))

    reminder = remind.send_with_options(args=(time.time(),), delay=1_000)
    print("countdown and routing:", reminder.get_result(block=True, timeout=60_000))

    while not TICKED.exists():
        time.sleep(0.05)
    print("beat: ticked")

    charges = [charge.send("c-1") for _ in range(5)]
    spans = sorted(one.get_result(block=True, timeout=60_000) for one in charges)
    apart = all(earlier[1] <= later[0] for earlier, later in pairwise(spans))
    print("rate limit and mutex:", "never two at once" if apart else "two at once")

    running = export.send(1000)
    while (seen := read_progress(running.message_id)) is None or seen.done < 2:
        time.sleep(0.05)
    print("progress:", int(seen.total))
    abort(running.message_id)
    while broker.status(running.message_id).state != "aborted":
        time.sleep(0.05)
    print("revoke: stopped")

    print("soft limit:", crawl.send().get_result(block=True, timeout=60_000))


if __name__ == "__main__":
    main()
