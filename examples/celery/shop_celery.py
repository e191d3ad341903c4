"""A shop's eight tasks on Celery and Redis. `shop.py` is the same on Dramatiq and JetStream, function by function.

Workers:  celery -A shop_celery worker --beat --queues celery,mail
Program:  python shop_celery.py
"""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import redis
from celery import Celery, chain, chord
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
TICKED = Path("heartbeat")

app = Celery("shop_celery", broker=REDIS, backend=REDIS)
app.conf.update(
    task_acks_late=True,  # Celery's default loses what a killed worker ran
    task_routes={"shop_celery.remind": {"queue": "mail"}},
    beat_schedule={"heartbeat": {"task": "shop_celery.heartbeat", "schedule": 1.0}},
    worker_concurrency=4,
)
store = redis.Redis.from_url(REDIS)


@app.task(bind=True, autoretry_for=(ConnectionError,), retry_backoff=0.1, max_retries=5)
def fetch(self, name):
    if self.request.retries < 2:
        raise ConnectionError("not yet")
    return f"{name}, at attempt {self.request.retries + 1}"


@app.task
def count(page):
    return len(page.split())


@app.task
def total(counts):
    return sum(counts)


@app.task
def remind(sent):
    return time.time() - sent > 0.9


@app.task
def heartbeat():
    TICKED.touch()


@app.task(rate_limit="20/s")  # for each worker process
def charge(customer):
    with store.lock(f"charge:{customer}", timeout=30):
        began = time.time()
        time.sleep(0.05)
        return began, time.time()


@app.task(bind=True, soft_time_limit=60)
def export(self, rows):
    for row in range(rows):
        self.update_state(state="PROGRESS", meta={"done": row, "total": rows})
        time.sleep(0.05)


@app.task(soft_time_limit=3)
def crawl():
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        return "what it had"


def main():
    print("retries:", fetch.delay("a").get(timeout=60))
    print("chain:", chain(fetch.s("b"), count.s())().get(timeout=60))
    pages = ["one two", "three", "four five six"]
    print("chord:", chord([count.s(page) for page in pages])(total.s()).get(timeout=60))
    print("countdown and routing:", remind.apply_async((time.time(),), countdown=1).get(timeout=60))

    while not TICKED.exists():
        time.sleep(0.05)
    print("beat: ticked")

    charges = [charge.delay("c-1") for _ in range(5)]
    spans = sorted(one.get(timeout=60) for one in charges)
    apart = all(earlier[1] <= later[0] for earlier, later in pairwise(spans))
    print("rate limit and mutex:", "never two at once" if apart else "two at once")

    running = export.delay(1000)
    while running.state != "PROGRESS" or running.info["done"] < 2:
        time.sleep(0.05)
    print("progress:", running.info["total"])
    running.revoke(terminate=True)
    try:
        running.get(timeout=60)
    except TaskRevokedError:
        print("revoke: stopped")

    print("soft limit:", crawl.delay().get(timeout=60))


if __name__ == "__main__":
    main()
