"""Webhooks keep their secrets, and deliveries come to an end: accepted, given up, or waiting for their time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography.fernet import Fernet
from standardwebhooks.webhooks import Webhook

from dramatiq_jetstream.streams import StoredMessage
from tasks.webhooks.announcing import send_again
from tasks.webhooks.deliveries import DELIVERED, FAILED, PENDING, TRIED_MS, Deliveries, Delivery, delivery_id
from tasks.webhooks.health import DISABLED_AFTER_MS, MAX_REST_MS, RESTS_AFTER, Health
from tasks.webhooks.posting import Answer, NotAnswered
from tasks.webhooks.sending import Sender
from tasks.webhooks.subscriptions import (
    MAX_OF_CUSTOMER,
    OVERLAP_MS,
    Directory,
    InvalidWebhook,
    SecretUnreadable,
    Subscriptions,
    TooManyWebhooks,
)
from tests.tasks.fakes import FakeBucket, FakeEntry

URL = "https://receiver.example/hook"
DAY_MS = 86_400_000


class Killed(BaseException):
    """Stands for what ends a run between any two lines."""


class NoStream:
    """The stream of a log of which no list is read."""

    def newest(
        self, subject: str = ">", *, before: int | None = None, page: int = 64
    ) -> Iterator[StoredMessage]:
        return iter(())

    def read(self, subject: str = ">", *, start: int = 1, page: int = 256) -> Iterator[StoredMessage]:
        return iter(())

    def last(self, subject: str = ">") -> StoredMessage | None:
        return None


class Moving(NoStream):
    """The stream of a log in which deliveries change while it is read: each change stores one again at the end."""

    def __init__(self, entries: list[tuple[str, bytes]], changes: list[str]) -> None:
        self._stored = {
            subject: self._message(place, subject, data)
            for place, (subject, data) in enumerate(entries, start=1)
        }
        self._changes = changes

    @staticmethod
    def _message(place: int, subject: str, data: bytes) -> StoredMessage:
        return StoredMessage("KV_deliveries", place, subject, data, {}, 0)

    def _change(self) -> None:
        if self._changes:
            subject = self._changes.pop(0)
            place = self._last().sequence + 1
            self._stored[subject] = self._message(place, subject, self._stored[subject].data)

    def _last(self) -> StoredMessage:
        return max(self._stored.values(), key=lambda one: one.sequence)

    def last(self, subject: str = ">") -> StoredMessage | None:
        return self._last()

    def newest(
        self, subject: str = ">", *, before: int | None = None, page: int = 64
    ) -> Iterator[StoredMessage]:
        place = before or self._last().sequence + 1
        while found := [one for one in self._stored.values() if one.sequence < place]:
            newest = max(found, key=lambda one: one.sequence)
            place = newest.sequence
            yield newest
            self._change()

    def read(self, subject: str = ">", *, start: int = 1, page: int = 256) -> Iterator[StoredMessage]:
        found = [one for one in self._stored.values() if one.sequence >= start]
        self._change()
        return iter(sorted(found, key=lambda one: one.sequence))


class Fixture:
    """Webhooks in memory, with a clock and a receiver that the test moves."""

    def __init__(self) -> None:
        self.time = 1_700_000_000_000
        self.bucket = FakeBucket()
        self.log = FakeBucket()
        self.key = Fernet.generate_key().decode()
        self.subscriptions = self.with_keys(self.key)
        self.health = Health(self.bucket, self.now)
        self.deliveries = Deliveries(self.log, "deliveries", NoStream())
        self.answers: Callable[[], Answer] = lambda: Answer(200, "thanks")
        self.sent: list[tuple[bytes, dict[str, str]]] = []
        self.outcomes: list[str] = []
        self.runs: list[int] = []
        self.effects_left: float = math.inf
        self.sender = Sender(
            self.subscriptions,
            self.deliveries,
            self.health,
            self.post,
            lambda outcome, _: self.outcomes.append(outcome),
            self.now,
        )

    def now(self) -> int:
        return self.time

    def with_keys(self, *keys: str) -> Subscriptions:
        return Subscriptions(self.bucket, keys, (), self.now)

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> Answer:
        assert url == URL
        self.sent.append((body, headers))
        return self.answers()

    def webhook(self) -> tuple[str, str]:
        made, secret = self.subscriptions.add(URL, [], "", "alice", "alice")
        return made.id, secret

    def delivery(self, webhook_id: str, event: str = "paid") -> str:
        named = delivery_id(webhook_id, "o-1", event)
        self.deliveries.create(
            Delivery(
                named, webhook_id, "o-1", f"order.{event}", self.time, '{"type":1}', self.time + TRIED_MS
            )
        )
        return named

    def run(self, webhook_id: str, named: str, run: int = 0) -> int | None:
        return self.sender.run(webhook_id, named, run)

    def send_again(self, webhook_id: str, named: str) -> Delivery | None:
        """Send a delivery again, in a process that dies when no effects are left."""

        def effect() -> None:
            self.effects_left -= 1
            if self.effects_left < 0:
                raise Killed

        def send(lane: str, webhook_id: str, delivery_id: str, run: int) -> None:
            effect()
            self.runs.append(run)

        class Dying(Deliveries):
            def change(self, *args: Any) -> Delivery | None:
                effect()
                return super().change(*args)

        found = self.subscriptions.find(webhook_id)
        assert found is not None
        deliveries = Dying(self.log, "deliveries", lambda subject, **_: iter(()))
        return send_again(deliveries, found, named, send, self.time)

    def state(self, webhook_id: str, named: str) -> Delivery:
        found = self.deliveries.find(webhook_id, named)
        assert found is not None
        return found


@pytest.mark.parametrize("limit", [3, 10])
@pytest.mark.parametrize("changes", [[0], [1, 0], [2, 0, 1], [0, 0, 2]])
def test_a_page_of_the_log_has_what_changes_while_it_is_read(
    it: Fixture, changes: list[int], limit: int
) -> None:
    """What is about to be read is stored again at the end: it is on the page, once; the next page goes on behind."""
    webhook_id, _ = it.webhook()
    named = [it.delivery(webhook_id, event) for event in ("created", "reserved", "paid", "confirmed")]
    entries = [(f"$KV.deliveries.{entry.key}", entry.value) for entry in it.log.items()]
    stream = Moving(list(entries), [entries[number][0] for number in changes])
    deliveries = Deliveries(it.log, "deliveries", stream)
    found, following = deliveries.page(webhook_id, limit)
    if following is not None:
        rest, following = deliveries.page(webhook_id, limit, following)
        found += rest
    assert following is None
    assert sorted(one.id for one in found) == sorted(named)


@pytest.fixture
def it() -> Fixture:
    return Fixture()


def refuses(status: int) -> Callable[[], Answer]:
    return lambda: Answer(status, "no")


# Secrets


def test_a_secret_is_shown_once_and_stored_encrypted(it: Fixture) -> None:
    """It stands nowhere in the bucket, and what is shown of a webhook does not have it."""
    made, secret = it.subscriptions.add(URL, [], "", None, "olga")
    assert it.subscriptions.secrets(made) == [secret]
    assert not any(secret[6:].encode() in entry.value for entry in it.bucket.entries.values())
    assert made.sealed
    assert made.sealed not in repr(made)


def test_a_new_secret_signs_beside_the_old_one_for_a_day(it: Fixture) -> None:
    """The receiver can verify with either; after a day with the new one alone."""
    webhook_id, old = it.webhook()
    new = it.subscriptions.rotate(webhook_id)
    assert new is not None
    found = it.subscriptions.find(webhook_id)
    assert found is not None
    assert it.subscriptions.secrets(found) == [new, old]
    it.time += OVERLAP_MS
    assert it.subscriptions.secrets(found) == [new]


def test_a_new_key_encrypts_all_secrets_again(it: Fixture) -> None:
    """After that the old key is not needed any more; before, its lack is said."""
    webhook_id, secret = it.webhook()
    newer = Fernet.generate_key().decode()
    found = it.subscriptions.find(webhook_id)
    assert found is not None
    with pytest.raises(SecretUnreadable, match="TOKEN_KEY"):
        it.with_keys(newer).secrets(found)
    both = it.with_keys(newer, it.key)
    assert (both.reseal(), both.reseal()) == (1, 0)
    found = it.subscriptions.find(webhook_id)
    assert found is not None
    assert it.with_keys(newer).secrets(found) == [secret]


def test_a_sealed_secret_opens_nothing_elsewhere(it: Fixture) -> None:
    """One that is copied to another webhook is none."""
    webhook_id, _ = it.webhook()
    other_id, _ = it.webhook()
    one, other = (it.subscriptions.find(each) for each in (webhook_id, other_id))
    assert one is not None
    assert other is not None
    from dataclasses import replace

    with pytest.raises(SecretUnreadable):
        it.subscriptions.secrets(replace(one, sealed=other.sealed))


# What a webhook can be


@pytest.mark.parametrize(
    ("field", "members"),
    [
        ("url", {"url": "http://receiver.example/"}),
        ("url", {"url": "https://10.0.0.1/"}),
        ("events", {"events": ["order.exploded"]}),
        ("description", {"description": "x" * 101}),
        ("description", {"description": "two\nlines"}),
    ],
)
def test_what_a_webhook_cannot_have(it: Fixture, field: str, members: dict[str, Any]) -> None:
    """It says which member is wrong, when it is made and when it is changed."""
    webhook_id, _ = it.webhook()
    with pytest.raises(InvalidWebhook) as refusal:
        it.subscriptions.add(
            **{"url": URL, "events": [], "description": "", "customer_id": None, "by": "", **members}
        )
    assert refusal.value.field == field
    with pytest.raises(InvalidWebhook):
        it.subscriptions.change(webhook_id, **members)


def test_a_customer_has_so_many_webhooks_and_no_more(it: Fixture) -> None:
    """Others are not affected, and a removed one makes room."""
    ids = [it.webhook()[0] for _ in range(MAX_OF_CUSTOMER)]
    with pytest.raises(TooManyWebhooks):
        it.webhook()
    it.subscriptions.add(URL, [], "", "bob", "bob")
    assert it.subscriptions.remove(ids[0])
    assert not it.subscriptions.remove(ids[0])
    it.webhook()


def test_a_directory_reads_what_has_changed(it: Fixture) -> None:
    """New webhooks, changes and removals are there at the next look."""
    directory = Directory(it.bucket)
    assert directory.refresh() == []
    webhook_id, _ = it.webhook()
    it.health.failed(webhook_id, "no answer")
    assert [one.id for one in directory.refresh()] == [webhook_id]
    it.subscriptions.disable(webhook_id)
    assert [one.is_active for one in directory.refresh()] == [False]
    it.subscriptions.remove(webhook_id)
    assert directory.refresh() == []
    assert it.subscriptions.find(webhook_id) is None


class Looks:
    """What a directory reads of a bucket: counts how often, and does something at the end of each look."""

    def __init__(self, bucket: FakeBucket) -> None:
        self.bucket = bucket
        self.count = 0
        self.at_the_end: Callable[[], object] = lambda: None

    def items(self, prefix: str = "", *, after: int = 0) -> Iterator[FakeEntry]:
        self.count += 1
        yield from list(self.bucket.items(prefix, after=after))
        self.at_the_end()


def watched(it: Fixture) -> tuple[Looks, Callable[..., list[str]]]:
    """Return the looks of a directory, and what returns the ids that it knows."""
    looks: Any = Looks(it.bucket)
    directory = Directory(looks)
    return looks, lambda since=None: [one.id for one in directory.refresh(since)]


def test_one_look_serves_all_whose_moment_came_before_it(it: Fixture) -> None:
    """What was read after an event had arrived has each webhook that was there before the event."""
    looks, ids = watched(it)
    first, _ = it.webhook()
    moment = time.monotonic()
    assert [ids(moment), ids(moment), ids(moment)] == [[first]] * 3
    assert looks.count == 1
    second, _ = it.webhook()
    assert ids(time.monotonic()) == [first, second]


def test_a_look_serves_no_moment_after_its_beginning(it: Fixture) -> None:
    """A webhook that is made while the webhooks are read is seen by threads whose events come after it, in one look."""
    looks, ids = watched(it)
    read, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        read.set()
        assert go_on.wait(30)

    looks.at_the_end = hold
    with ThreadPoolExecutor(4) as pool:
        early = pool.submit(ids)
        assert read.wait(30)
        webhook_id, _ = it.webhook()
        moment = time.monotonic()
        late = [pool.submit(ids, moment) for _ in range(3)]
        go_on.set()
        assert early.result(30) == []
        assert [one.result(30) for one in late] == [[webhook_id]] * 3
    assert looks.count == 2


def test_a_look_that_was_cut_off_serves_no_moment(it: Fixture) -> None:
    """The next thread that asks reads the webhooks, however long its moment is past."""
    looks, ids = watched(it)
    moment = time.monotonic()
    webhook_id, _ = it.webhook()

    def cut_off() -> None:
        raise Killed

    looks.at_the_end = cut_off
    with pytest.raises(Killed):
        ids(moment)
    looks.at_the_end = lambda: None
    assert ids(moment) == [webhook_id]
    assert looks.count == 2


# Deliveries


def test_a_delivery_is_signed_and_accepted_once(it: Fixture) -> None:
    """The library of the specification verifies it; what is accepted is not sent again."""
    it.time = __import__("time").time_ns() // 1_000_000
    webhook_id, secret = it.webhook()
    new = it.subscriptions.rotate(webhook_id)
    assert new is not None
    named = it.delivery(webhook_id)
    assert it.run(webhook_id, named) is None
    ((body, headers),) = it.sent
    for one in (secret, new):
        assert Webhook(one).verify(body, headers) == {"type": 1}
    assert headers["webhook-id"] == named
    assert it.run(webhook_id, named) is None
    assert (len(it.sent), it.state(webhook_id, named).state, it.outcomes) == (1, DELIVERED, ["accepted"])


def test_a_delivery_is_tried_for_a_day(it: Fixture) -> None:
    """Its pauses grow; after a day it has failed, and the log has the newest attempts."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)
    it.answers = refuses(503)
    begun, waits = it.time, []
    while (wait := it.run(webhook_id, named)) is not None:
        waits.append(wait)
        it.time += wait
    delivery = it.state(webhook_id, named)
    assert (delivery.state, delivery.attempts[-1].status) == (FAILED, 503)
    assert DAY_MS * 0.7 < it.time - begun <= DAY_MS
    assert waits[0] <= 1_000
    assert 10 <= len(it.sent) == len(delivery.attempts)
    assert {headers["webhook-id"] for _, headers in it.sent} == {named}


def test_a_message_that_comes_early_waits(it: Fixture) -> None:
    """After a crash between the record of a failure and its retry nothing is sent before its time."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)
    it.answers = refuses(500)
    wait = it.run(webhook_id, named)
    assert wait is not None
    assert it.run(webhook_id, named) == wait
    assert len(it.sent) == 1


def test_a_run_that_is_cut_off_is_repeated(it: Fixture) -> None:
    """What was sent before the crash is sent again, under the same id."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)

    def killed() -> Answer:
        raise Killed

    it.answers = killed
    with pytest.raises(Killed):
        it.run(webhook_id, named)
    it.answers = refuses(204)
    assert it.run(webhook_id, named) is None
    assert [headers["webhook-id"] for _, headers in it.sent] == [named] * 2


def test_a_receiver_that_fails_again_and_again_rests(it: Fixture) -> None:
    """While it rests nothing is sent to it, and its deliveries wait; the first success ends that."""
    webhook_id, _ = it.webhook()
    deliveries = [it.delivery(webhook_id, f"refunded.{number}") for number in range(RESTS_AFTER + 3)]

    def hangs() -> Answer:
        raise NotAnswered("no answer within 10000 ms")

    it.answers = hangs
    waits = [it.run(webhook_id, named) for named in deliveries]
    assert len(it.sent) == RESTS_AFTER
    assert all(wait is not None and wait > 1_000 for wait in waits[RESTS_AFTER:])
    assert it.state(webhook_id, deliveries[-1]).attempts == []
    it.time += MAX_REST_MS + 1
    it.answers = refuses(200)
    assert it.run(webhook_id, deliveries[0]) is None
    assert it.health.find(webhook_id) is None
    assert [it.run(webhook_id, named) for named in deliveries] == [None] * len(deliveries)


def test_days_of_failure_disable_a_webhook(it: Fixture) -> None:
    """With the reason; what still waits is given up, and enabling it begins afresh."""
    webhook_id, _ = it.webhook()
    it.answers = refuses(500)
    begun = it.time
    for day in range(10):
        named = it.delivery(webhook_id, f"refunded.{day}")
        while (wait := it.run(webhook_id, named)) is not None:
            it.time += wait
    found = it.subscriptions.find(webhook_id)
    assert found is not None
    assert not found.is_active
    assert found.reason == "The receiver accepted nothing for 5 days: it answered 500."
    assert DISABLED_AFTER_MS <= found.changed_at - begun < DISABLED_AFTER_MS + DAY_MS
    count = len(it.sent)
    named = it.delivery(webhook_id, "cancelled")
    assert it.run(webhook_id, named) is None
    assert it.state(webhook_id, named).reason == "the webhook was disabled"
    assert len(it.sent) == count
    it.health.recovered(webhook_id)
    it.subscriptions.enable(webhook_id)
    it.time += MAX_REST_MS
    it.run(webhook_id, it.delivery(webhook_id, "shipped"))
    found = it.subscriptions.find(webhook_id)
    assert found is not None
    assert found.is_active


def test_a_receiver_that_is_gone_is_left_alone(it: Fixture) -> None:
    """410 disables the webhook at once."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)
    it.answers = refuses(410)
    assert it.run(webhook_id, named) is None
    found = it.subscriptions.find(webhook_id)
    assert found is not None
    assert (found.is_active, found.reason) == (False, "The receiver answered 410 Gone.")
    assert it.state(webhook_id, named).state == FAILED


def test_a_delivery_is_sent_again(it: Fixture) -> None:
    """Whatever came of it; a message of the run before does nothing any more."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)
    it.answers = refuses(500)
    it.run(webhook_id, named)
    begun = it.send_again(webhook_id, named)
    assert begun is not None
    assert (begun.state, [begun.run]) == (PENDING, it.runs)
    assert it.run(webhook_id, named, run=0) is None
    it.answers = refuses(200)
    assert it.run(webhook_id, named, run=begun.run) is None
    delivery = it.state(webhook_id, named)
    assert (delivery.state, [one.status for one in delivery.attempts]) == (DELIVERED, [500, 200])


@pytest.mark.parametrize("effects", [0, 1])
def test_a_process_that_dies_while_it_sends_again_stops_no_delivery(it: Fixture, effects: int) -> None:
    """Killed before the message is stored, or between it and the delivery: one message goes on, and one only."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)
    it.answers = refuses(500)
    it.run(webhook_id, named)
    it.effects_left = effects
    with pytest.raises(Killed):
        it.send_again(webhook_id, named)
    it.time += 60_000
    waits = [it.run(webhook_id, named, run) for run in [*it.runs, 0]]
    assert [wait is not None for wait in waits] == ([True, False] if effects else [True])
    assert len(it.sent) == 2


def test_a_delivery_that_is_sent_again_twice_at_once_has_one_run(it: Fixture) -> None:
    """The later request counts, whichever message comes first."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)
    it.answers = refuses(500)
    for run in (it.time + 1, it.time + 2):
        assert it.run(webhook_id, named, run) is not None
    assert it.run(webhook_id, named, it.time + 1) is None
    assert len(it.sent) == 2


def test_a_delivery_that_was_sent_again_meanwhile_goes_on(it: Fixture) -> None:
    """An attempt of the run before that ends late is recorded, and does not change the new run's times."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)

    def again() -> Answer:
        it.send_again(webhook_id, named)
        return Answer(500, "late")

    it.answers = again
    assert it.run(webhook_id, named) is None
    delivery = it.state(webhook_id, named)
    assert (delivery.state, delivery.run, delivery.next_at) == (PENDING, it.runs[0], 0)


def test_nothing_is_left_in_a_webhook_that_was_removed(it: Fixture) -> None:
    """For a day it can be told that it was there, and no more."""
    webhook_id, _ = it.webhook()
    it.subscriptions.remove(webhook_id)
    (entry,) = it.bucket.entries.values()
    assert not any(text in entry.value for text in (b"alice", b"receiver", b"gAAAA"))


def test_a_webhook_that_was_removed_gets_nothing(it: Fixture) -> None:
    """What was on its way is not sent, and not kept."""
    webhook_id, _ = it.webhook()
    named = it.delivery(webhook_id)
    it.subscriptions.remove(webhook_id)
    assert it.run(webhook_id, named) is None
    assert it.sent == []
    assert it.log.entries == {}
