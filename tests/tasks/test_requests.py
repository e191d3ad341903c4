"""Idempotency keys on a bucket in memory, with a clock of the test's own: whose request runs, and until when."""

from __future__ import annotations

import hashlib
import json

import pytest

from tasks.idempotency import Claim, Requests
from tasks.model import IdempotencyConflict, IdempotencyInProgress
from tests.tasks.fakes import FakeBucket, no_pause

LEASE = 30_000
IN_PROGRESS = "a request with the same key is being worked on"


class Clock:
    """Milliseconds, as the test sets them."""

    def __init__(self) -> None:
        self.time = 1_000_000

    def __call__(self) -> int:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bucket() -> FakeBucket:
    return FakeBucket()


def process(bucket: FakeBucket, clock: Clock) -> Requests:
    return Requests(bucket, lease=LEASE, now=clock)


def claim(requests: Requests, order_id: str, *, digest: str = "d", placed: bool = False) -> Claim:
    return requests.claim("k", digest, order_id, lambda _: placed)


def test_a_new_key_stands_for_the_order_that_is_named(bucket: FakeBucket, clock: Clock) -> None:
    """The claim has the time of the request, and the bucket no key in clear."""
    requests = process(bucket, clock)
    claimed = claim(requests, "o-1")
    assert (claimed.order_id, claimed.created_at) == ("o-1", 1_000_000)
    assert requests.order_of("k") == "o-1"
    assert requests.order_of("other") is None
    assert list(bucket.entries) == [claimed.key] != ["k"]


def test_a_key_may_be_any_text(bucket: FakeBucket, clock: Clock) -> None:
    """Half of a surrogate pair, too, which UTF-8 cannot say."""
    requests = process(bucket, clock)
    assert requests.claim("\ud800", "d", "o-1", lambda _: False).order_id == "o-1"
    assert requests.order_of("\ud800") == "o-1"


def test_the_digest_decides_what_a_repetition_is(bucket: FakeBucket, clock: Clock) -> None:
    """Before anything else: another request is told so while the first one runs, and after it."""
    requests = process(bucket, clock)
    claim(requests, "o-1")
    for placed in (False, True):
        with pytest.raises(IdempotencyConflict, match=r"^the key was used before for a different order$"):
            claim(process(bucket, clock), "o-2", digest="other", placed=placed)


def test_a_request_that_runs_here_is_not_begun_twice(bucket: FakeBucket, clock: Clock) -> None:
    """However long it takes; when it has ended, the next one goes on with its order, from when it was first asked."""
    requests = process(bucket, clock)
    running = claim(requests, "o-1")
    clock.time += 2 * LEASE
    with pytest.raises(IdempotencyInProgress, match=f"^{IN_PROGRESS}$"):
        claim(requests, "o-2")
    requests.finished(running)
    assert claim(requests, "o-2") == running


def test_a_refused_request_leaves_its_key_free(bucket: FakeBucket, clock: Clock) -> None:
    """What raises does not count as running."""
    requests = process(bucket, clock)
    running = claim(requests, "o-1")
    requests.finished(running)
    with pytest.raises(IdempotencyConflict):
        claim(requests, "o-2", digest="other")
    assert claim(requests, "o-2") == running


@pytest.mark.parametrize(
    ("later", "wait"), [(0, 30), (1, 30), (999, 30), (1_000, 29), (29_000, 1), (29_999, 1)]
)
def test_another_process_waits_for_the_lease(bucket: FakeBucket, clock: Clock, later: int, wait: int) -> None:
    """It is told after how many whole seconds to ask again."""
    claim(process(bucket, clock), "o-1")
    clock.time += later
    with pytest.raises(IdempotencyInProgress, match=f"^{IN_PROGRESS}$") as refusal:
        claim(process(bucket, clock), "o-2")
    assert refusal.value.retry_after == wait


def test_another_process_takes_over_when_the_lease_is_over(bucket: FakeBucket, clock: Clock) -> None:
    """It has a lease of its own then, and the order and the time of the first."""
    first, second = process(bucket, clock), process(bucket, clock)
    before = claim(first, "o-1")
    clock.time += LEASE
    assert claim(second, "o-2") == before
    for other in (process(bucket, clock), first):
        first.finished(before)
        with pytest.raises(IdempotencyInProgress) as refusal:
            claim(other, "o-3")
        assert refusal.value.retry_after == 30
    second.finished(before)
    assert claim(second, "o-3") == before, "it knows that its own request has ended"


def test_a_placed_order_waits_for_no_lease(bucket: FakeBucket, clock: Clock) -> None:
    """Its key has the order and its time, whichever process asks."""
    first = claim(process(bucket, clock), "o-1")
    clock.time += 5
    assert process(bucket, clock).claim("k", "d", "o-2", lambda order_id: order_id == "o-1") == first


def test_of_two_that_take_over_one_is_told_to_wait(bucket: FakeBucket, clock: Clock) -> None:
    """The record changed between reading and writing."""
    claim(process(bucket, clock), "o-1")
    clock.time += LEASE
    effects: list[str] = []

    def overtaken(where: str) -> None:
        effects.append(where.split(" ")[0])
        if effects == ["before", "get", "before"]:  # create, get, update
            bucket.pause = no_pause
            claim(process(bucket, clock), "o-2")

    bucket.pause = overtaken
    with pytest.raises(IdempotencyInProgress, match=f"^{IN_PROGRESS}$") as refusal:
        claim(process(bucket, clock), "o-3")
    assert refusal.value.retry_after == 1
    assert bucket.pause is no_pause


def test_a_key_that_expires_between_two_looks_is_new(bucket: FakeBucket, clock: Clock) -> None:
    """It exists for `create`, and is gone for `get`: the request is the first one."""
    claim(process(bucket, clock), "o-1")

    def expire(where: str) -> None:
        if where.startswith("get"):
            bucket.entries.clear()

    bucket.pause = expire
    assert claim(process(bucket, clock), "o-2").order_id == "o-2"


def test_what_is_stored_is_read_by_other_versions(bucket: FakeBucket, clock: Clock) -> None:
    """One record for each key, under its digest, in few bytes; what it says more is left alone."""
    requests = process(bucket, clock)
    claimed = claim(requests, "o-1")
    assert claimed.key == hashlib.sha256(b"k").hexdigest()
    (entry,) = bucket.entries.values()
    stored = json.loads(entry.value)
    assert stored.pop("owner")
    assert stored == {
        "digest": "d",
        "order_id": "o-1",
        "created_at": clock.time,
        "lease_until": clock.time + LEASE,
    }
    assert b" " not in entry.value
    more = json.dumps({**json.loads(entry.value), "place": 7}).encode()
    bucket.update(entry.key, more, revision=entry.revision)
    assert claim(process(bucket, clock), "o-2", placed=True) == claimed
