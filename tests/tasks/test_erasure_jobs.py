"""Erasures as jobs: asked for once, whatever is killed, and shown newest first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.streams import StoredMessage
from tasks.audit import Who
from tasks.erasure_jobs import Jobs, NotErasable
from tests.tasks.fakes import FakeBucket

ANN = Who("ann", "operator", "page")


class Killed(BaseException):
    """The process was killed."""


def unread(subject: str, *, before: int | None, page: int) -> Iterator[StoredMessage]:
    """Stands for a stream of which no page is read."""
    return iter(())


def jobs(bucket: FakeBucket) -> Jobs:
    return Jobs(bucket, "erasures", unread, lambda: 7, lambda: 1_000)


def test_a_customer_has_one_job_at_a_time() -> None:
    """Asked again before it is done, it is the same; after that it is another, and the name is nowhere."""
    bucket = FakeBucket()
    first = jobs(bucket).begin("c-1", ANN)
    other = jobs(bucket).begin("c-2", ANN)
    assert jobs(bucket).begin("c-1", ANN).id == first.id != other.id
    jobs(bucket).waits(first, "orders are under way")
    assert jobs(bucket).problem(first) == "orders are under way"
    jobs(bucket).finish(first)
    assert b"c-1" not in b"".join(entry.value for entry in bucket.entries.values())
    assert jobs(bucket).problem(first) == ""
    second = jobs(bucket).begin("c-1", ANN)
    assert second.id != first.id
    with pytest.raises(NotErasable, match="carried out by another process"):
        jobs(bucket).save(first)


def test_killed_between_any_two_writes() -> None:
    """The next one who asks gets a job that can be carried out."""
    for cut in range(1, 20):
        left = cut

        def die(where: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        bucket = FakeBucket(die)
        try:
            job = jobs(bucket).begin("c-1", ANN)
            jobs(bucket).finish(job)
        except Killed:
            pass
        bucket.pause = lambda where: None
        again = jobs(bucket).begin("c-1", ANN)
        found = jobs(bucket).find(again.id)
        assert found is not None
        assert (found.customer_id, found.is_done) == ("c-1", False)
        assert [one.id for one in jobs(bucket).all() if not one.is_done] == [again.id]


def test_pages(broker: JetStreamBroker) -> None:
    """What changed last comes first, each once."""
    bucket = broker.bucket("erasures")
    bucket.declare()
    real = Jobs(bucket, bucket.name, broker.stream(bucket.stream).newest, lambda: 0, lambda: 1_000)
    begun = [real.begin(f"c-{number}", ANN) for number in range(5)]
    real.finish(begun[0])
    expected = [begun[0].id, *(job.id for job in reversed(begun[1:]))]
    found: list[str] = []
    before: int | None = None
    while True:
        page, before = real.page(2, before)
        found += [job.id for job in page]
        if before is None:
            break
    assert found == expected
