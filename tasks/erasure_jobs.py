"""Erasures as jobs: who asked for one, how far it is, and what is certified when it is done.

`job.{certificate}` in the bucket `erasures` holds one. `open.{digest of the customer's id}` names the job of a customer
until it is done, so asking again finds it without a look at all jobs. It is written first: killed between the two, the
next one who asks makes the job that it names. `problem.{certificate}` says why a job waits.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from dramatiq_jetstream.streams import StoredMessage

from .audit import Who
from .newer import members_of, stored_of
from .ports import Bucket

_JOB: Final = "job."
_OPEN: Final = "open."
_PROBLEM: Final = "problem."


class NotErasable(Exception):
    """The customer cannot be erased now; the message says why and what to do."""


@dataclass(slots=True)
class Job:
    """An erasure; times in milliseconds. `customer_id` is empty when it is done: then this is the certificate.

    Attributes:
      by, via: Who asked for it, and from where.
      last: The place of the newest event when it was asked for, 0 in one of an earlier version.
      counts: How many of each kind were taken away or made anonymous.
      doomed: What is taken away right now, and `stage` of which kind it is.
      others: What a newer version has stored beside it.
    """

    id: str
    customer_id: str
    at: int
    by: str
    via: str
    finished_at: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    stage: str = ""
    doomed: list[str] = field(default_factory=list)
    last: int = 0
    others: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_done(self) -> bool:
        return self.finished_at > 0

    @property
    def is_begun(self) -> bool:
        """Whether anything was taken away, or may have been."""
        return bool(self.counts or self.doomed)

    def certificate(self) -> dict[str, Any]:
        """Return what is certified: no word of it is about the customer."""
        return {
            "certificate": self.id,
            "asked_for_at": self.at,
            "finished_at": self.finished_at,
            "by": self.by,
            "via": self.via,
            "erased": self.counts,
        }


class Newest(Protocol):
    """Reads the bucket's stream, newest first."""

    def __call__(self, subject: str, *, before: int | None, page: int) -> Iterator[StoredMessage]: ...


class Jobs:
    """The jobs in their bucket. Any thread may use it.

    Parameters:
      bucket: Where they are kept.
      name: The bucket's name on the server, for which its subjects begin with `$KV.`.
      newest: Reads its stream, newest first.
      last_event: Returns the place of the newest event.
      now: The time in milliseconds.
    """

    def __init__(
        self, bucket: Bucket, name: str, newest: Newest, last_event: Callable[[], int], now: Callable[[], int]
    ) -> None:
        self._bucket = bucket
        self._subjects = f"$KV.{name}.{_JOB}>"
        self._newest = newest
        self._last_event = last_event
        self._now = now

    def begin(self, customer_id: str, who: Who) -> Job:
        """Ask for an erasure; returns its job, the one of before if that is not done."""
        key = f"{_OPEN}{hashlib.sha256(customer_id.encode()).hexdigest()}"
        while True:
            opened = self._bucket.get(key)
            known = None if opened is None else self.find(opened.value.decode())
            if known is not None and not known.is_done:
                return known
            certificate = secrets.token_hex(8)
            with suppress(KeyExists, RevisionConflict):  # another one has asked at the same moment
                if opened is None:
                    self._bucket.create(key, certificate.encode())
                elif known is None:
                    certificate = opened.value.decode()
                else:
                    self._bucket.update(key, certificate.encode(), revision=opened.revision)
                by = who.name or who.kind
                job = Job(certificate, customer_id, self._now(), by, who.via, last=self._last_event())
                self._bucket.create(f"{_JOB}{certificate}", _encode(job))
                return job

    def find(self, certificate: str) -> Job | None:
        """Return an erasure by the id of its certificate."""
        return find_job(self._bucket, certificate)

    def all(self) -> Iterator[Job]:
        """Yield all erasures, done or not."""
        for entry in self._bucket.items(_JOB):
            yield _decode(entry.value)

    def page(self, limit: int, before: int | None = None) -> tuple[list[Job], int | None]:
        """Return the erasures that changed last, and the cursor of the next page."""
        found = list(islice(self._newest(self._subjects, before=before, page=limit + 1), limit + 1))
        jobs = [_decode(one.data) for one in found[:limit] if one.data]
        return jobs, found[limit - 1].sequence if len(found) > limit else None

    def save(self, job: Job) -> None:
        """Store how far a job is.

        Raises:
          NotErasable: When another process was faster.
        """
        key = f"{_JOB}{job.id}"
        entry = self._bucket.get(key)
        if entry is None or _decode(entry.value).is_done:
            raise NotErasable(f"Erasure {job.id} was carried out by another process.")
        self._bucket.update(key, _encode(job), revision=entry.revision)

    def finish(self, job: Job) -> None:
        """Store that a job is done, without its customer."""
        opened = f"{_OPEN}{hashlib.sha256(job.customer_id.encode()).hexdigest()}"
        job.customer_id, job.stage, job.finished_at = "", "", self._now()
        self.save(job)
        for key in (opened, f"{_PROBLEM}{job.id}"):
            entry = self._bucket.get(key)
            if entry is not None and (key != opened or entry.value.decode() == job.id):
                with suppress(RevisionConflict):
                    self._bucket.delete(key, revision=entry.revision)

    # Why one waits

    def waits(self, job: Job, problem: str) -> None:
        """Note why a job cannot go on."""
        key = f"{_PROBLEM}{job.id}"
        entry = self._bucket.get(key)
        with suppress(KeyExists, RevisionConflict):  # another one has noted something
            if entry is None:
                self._bucket.create(key, problem.encode())
            elif entry.value != problem.encode():
                self._bucket.update(key, problem.encode(), revision=entry.revision)

    def problem(self, job: Job) -> str:
        """Return why a job waits; empty when it does not."""
        entry = None if job.is_done else self._bucket.get(f"{_PROBLEM}{job.id}")
        return "" if entry is None else entry.value.decode()


def find_job(bucket: Bucket, certificate: str) -> Job | None:
    """Return an erasure by the id of its certificate."""
    entry = bucket.get(f"{_JOB}{certificate}")
    return None if entry is None else _decode(entry.value)


def _encode(job: Job) -> bytes:
    return json.dumps(stored_of(job), separators=(",", ":")).encode()


def _decode(value: bytes) -> Job:
    return Job(**members_of(Job, json.loads(value)))
