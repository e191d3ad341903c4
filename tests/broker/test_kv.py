"""Buckets: compare-and-set, time to live, listings and watches, over lost acknowledgements and reconnects."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dramatiq_jetstream.config import Storage
from dramatiq_jetstream.errors import (
    ApiError,
    BrokerConnectionError,
    InvalidOption,
    KeyExists,
    RevisionConflict,
    TopologyMissing,
)
from dramatiq_jetstream.jetstream import conditional_writes, topology
from dramatiq_jetstream.jetstream.names import Names, bucket_subject
from dramatiq_jetstream.jetstream.reading import message_at
from dramatiq_jetstream.kv import Bucket, Entry
from dramatiq_jetstream.testing import NatsCluster, NatsServer
from dramatiq_jetstream.wire.connection import Connection, ConnectOptions, Publication
from dramatiq_jetstream.wire.error_numbers import WRONG_LAST_SEQUENCE
from tests.broker.cables import DeafCable
from tests.support.polling import eventually, holds
from tests.support.proxy import Proxy

MakeBucket = Callable[..., Bucket]


@pytest.fixture
def make_bucket(nats_url: str, namespace: str) -> Iterator[MakeBucket]:
    """Makes buckets, each on a connection of its own, as in different processes."""
    connections: list[Connection] = []

    def make(
        url: str | list[str] = nats_url, *, declare: bool = True, timeout: int = 10_000, **settings: int
    ) -> Bucket:
        connection = Connection(ConnectOptions.of(url), timeout=timeout)
        connections.append(connection)
        return Bucket(connection, topology.bucket(Names(namespace), "b", **settings), declare=declare)

    yield make
    for connection in connections:
        connection.close()


@pytest.fixture
def bucket(make_bucket: MakeBucket) -> Bucket:
    return make_bucket()


@pytest.fixture
def cable(nats_url: str) -> Iterator[DeafCable]:
    cable = DeafCable(nats_url)
    yield cable
    cable.close()


def value(bucket: Bucket, key: str) -> bytes | None:
    entry = bucket.get(key)
    return None if entry is None else entry.value


def test_what_was_put_is_read(bucket: Bucket) -> None:
    """A put overwrites, revisions grow, and a missing key is None."""
    assert bucket.get("k") is None
    first = bucket.put("k", b"1")
    second = bucket.put("k", b"2")
    entry = bucket.get("k")
    assert entry is not None
    assert (entry.value, entry.revision, entry.deleted) == (b"2", second, False)
    assert second > first


@pytest.mark.parametrize(
    "key", ["a@1", "a.b.c", ".", "..", "a..b", "ü 東京\n\t\0", "*", ">", "=", "$KV.x", "x" * 200]
)
def test_keys_may_hold_any_characters(bucket: Bucket, key: str) -> None:
    """What a key is made of does not matter, and listings give it back as it was."""
    bucket.put(key, b"here")
    entry = bucket.get(key)
    assert entry is not None
    assert entry.key == key
    assert bucket.keys() == [key]
    assert bucket.keys(key[:1]) == [key]


def test_create_refuses_what_is_there(bucket: Bucket) -> None:
    """A key that exists cannot be created, whichever program made it."""
    bucket.create("k", b"first")
    with pytest.raises(KeyExists, match="'k'"):
        bucket.create("k", b"second")
    assert value(bucket, "k") == b"first"


def test_create_takes_a_deleted_key(bucket: Bucket) -> None:
    """A deleted key leaves a mark on the server, which does not stand in the way."""
    bucket.create("k", b"first")
    bucket.delete("k")
    assert bucket.get("k") is None
    assert bucket.keys() == []
    bucket.create("k", b"second")
    with pytest.raises(KeyExists):
        bucket.create("k", b"third")


def test_create_takes_an_expired_key(bucket: Bucket) -> None:
    """When a key's time is over it is gone, and can be created again."""
    bucket.create("k", b"first", ttl=1)

    def created() -> int:
        try:
            return bucket.create("k", b"second")
        except KeyExists:
            return 0

    assert eventually(created)


def test_time_to_live_is_rounded_up_and_belongs_to_a_revision(bucket: Bucket) -> None:
    """A put without a ttl ends the one before; 1 ms is a second, which is all the server can count."""
    bucket.put("stays", b"1", ttl=1)
    bucket.put("stays", b"2")
    bucket.put("goes", b"1", ttl=1)
    assert bucket.get("goes") is not None
    assert eventually(lambda: bucket.get("goes") is None)
    assert bucket.get("stays") is not None


@pytest.mark.parametrize("ttl", [0, -1, True])
def test_a_time_to_live_that_cannot_work_is_refused(bucket: Bucket, ttl: int) -> None:
    """A ttl of nothing is an error that names it, before anything is stored."""
    with pytest.raises(InvalidOption, match=r"ttl="):
        bucket.put("k", b"", ttl=ttl)
    assert bucket.get("k") is None


def test_an_expired_key_does_not_fall_back_to_its_history(make_bucket: MakeBucket) -> None:
    """In a bucket with history, no older revision appears when the newest expires."""
    bucket = make_bucket(history=5)
    bucket.put("k", b"old")
    bucket.put("k", b"new", ttl=1)
    assert eventually(lambda: (entry := bucket.get("k")) is None or entry.value != b"new")
    assert bucket.get("k") is None


def test_update_wants_the_revision_it_knows(bucket: Bucket) -> None:
    """Compare-and-set: the second of two writers with the same revision gets a conflict."""
    revision = bucket.update("k", b"1", revision=0)
    bucket.update("k", b"2", revision=revision)
    with pytest.raises(RevisionConflict, match="'k'"):
        bucket.update("k", b"3", revision=revision)
    with pytest.raises(RevisionConflict):
        bucket.update("k", b"3", revision=0)


def test_delete_wants_the_revision_it_knows(bucket: Bucket) -> None:
    """A delete with an old revision deletes nothing."""
    revision = bucket.put("k", b"1")
    bucket.put("k", b"2")
    with pytest.raises(RevisionConflict):
        bucket.delete("k", revision=revision)
    assert bucket.get("k") is not None


def test_the_mark_of_a_deleted_key_disappears(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted keys leave nothing behind for ever."""
    monkeypatch.setattr("dramatiq_jetstream.kv.MARK_TTL_SECONDS", 1)
    bucket.put("k", b"1")
    bucket.delete("k")

    def messages() -> int:
        return int(bucket.connection.api(f"STREAM.INFO.{bucket.stream}")["state"]["messages"])

    assert eventually(lambda: messages() == 0)


def test_concurrent_updates_lose_nothing(make_bucket: MakeBucket) -> None:
    """Increments by compare-and-set from many threads on two connections add up."""
    buckets = [make_bucket(), make_bucket()]
    buckets[0].create("n", b"0")

    def increment(bucket: Bucket) -> None:
        for _ in range(10):
            while True:
                entry = bucket.get("n")
                assert entry is not None
                try:
                    bucket.update("n", b"%d" % (int(entry.value) + 1), revision=entry.revision)
                    break
                except RevisionConflict:
                    continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(increment, buckets * 4))
    assert value(buckets[0], "n") == b"80"


def lose_the_answer(
    cable: DeafCable, seen: Callable[[], object], write: Callable[[], int], meanwhile: Callable[[], object]
) -> int:
    """Do `write` so that it is stored and its acknowledgement is lost; return what it returns in the end."""
    with ThreadPoolExecutor(1) as pool:
        with cable.deafness():
            writing = pool.submit(write)
            eventually(seen)
            meanwhile()
        return writing.result(timeout=30)


@pytest.mark.parametrize("way", ["create", "update", "put", "within"])
@pytest.mark.parametrize("overwritten", [False, True], ids=["", "overwritten"])
def test_a_writer_whose_acknowledgement_got_lost_does_not_lose_against_itself(
    make_bucket: MakeBucket, cable: DeafCable, way: str, overwritten: bool
) -> None:
    """The write is sent again after the reconnect, and is known to have succeeded, even if overwritten since."""
    writer, reader = make_bucket(cable.url), make_bucket()
    before = writer.put("g.k", b"before") if way != "create" else 0
    writer.get("g.k")
    writes: dict[str, Callable[[], int]] = {
        "create": lambda: writer.create("g.k", b"mine"),
        "update": lambda: writer.update("g.k", b"mine", revision=before),
        "put": lambda: writer.put("g.k", b"mine"),
        "within": lambda: writer.update("g.k", b"mine", revision=before, within="g."),
    }
    stored: list[Entry] = []

    def seen() -> bool:
        entry = reader.get("g.k")
        if entry is not None and entry.value == b"mine":
            stored.append(entry)
        return bool(stored)

    def meanwhile() -> None:
        if overwritten:
            reader.put("g.k", b"theirs")

    assert lose_the_answer(cable, seen, writes[way], meanwhile) == stored[0].revision
    assert value(reader, "g.k") == (b"theirs" if overwritten else b"mine")


@pytest.mark.parametrize("way", ["create", "update", "within", "delete"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
@pytest.mark.parametrize("outdated_reads", [0, 2])
def test_a_leader_of_yesterday_is_not_believed(
    make_bucket: MakeBucket, monkeypatch: pytest.MonkeyPatch, way: str, stored: bool, outdated_reads: int
) -> None:
    """It refuses a write that the true leader stores, or that is lost, and reads what was there before.

    A mock: when a cluster has such a server among it cannot be chosen. This is what was seen of one.
    """
    writer, reader = make_bucket(), make_bucket()
    before = writer.put("g.k", b"before") if way != "create" else 0
    writer.get("g.k")
    publish, last = writer.connection.publish, conditional_writes.last_message
    refusals = []

    def refuse_once(*args: Any, **kwargs: Any) -> Any:
        if refusals:
            return publish(*args, **kwargs)
        refusals.append(args)
        if stored:
            publish(*args, **kwargs)
        raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence")

    reads = [last(writer.connection, writer.stream, writer._subject("g.k"))] * outdated_reads

    def read(*args: Any, **kwargs: Any) -> Any:
        return reads.pop() if reads else last(*args, **kwargs)

    monkeypatch.setattr(writer.connection, "publish", refuse_once)
    monkeypatch.setattr(conditional_writes, "last_message", read)
    writer._writes.one_server = False
    writes: dict[str, Callable[[], int | None]] = {
        "create": lambda: writer.create("g.k", b"mine"),
        "update": lambda: writer.update("g.k", b"mine", revision=before),
        "within": lambda: writer.update("g.k", b"mine", revision=before, within="g."),
        "delete": lambda: writer.delete("g.k", revision=before),
    }
    revision = writes[way]()

    assert len(refusals) == 1
    entry = reader.get("g.k")
    if way == "delete":
        assert entry is None
    else:
        assert entry is not None
        assert (entry.value, entry.revision) == (b"mine", revision)
    newest = last(reader.connection, reader.stream, reader._subject("g.k"))
    assert newest is not None
    assert newest.sequence == before + 1, "stored once"


def test_a_leader_of_yesterday_does_not_hide_who_was_first(
    make_bucket: MakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first reads do not show it."""
    writer, other = make_bucket(), make_bucket()
    before = writer.put("k", b"before")
    outdated = [conditional_writes.last_message(writer.connection, writer.stream, writer._subject("k"))] * 3
    other.put("k", b"theirs")
    last = conditional_writes.last_message
    monkeypatch.setattr(
        conditional_writes,
        "last_message",
        lambda *args, **more: outdated.pop() if outdated else last(*args, **more),
    )
    writer._writes.one_server = False

    with pytest.raises(RevisionConflict):
        writer.update("k", b"mine", revision=before)
    assert not outdated
    assert value(other, "k") == b"theirs"


def test_a_linearizable_read_is_not_taken_in_by_a_leader_of_yesterday(
    make_bucket: MakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What such a server answers is not what it returns: of a key that was changed, made or deleted."""
    bucket = make_bucket()
    bucket.put("changed", b"before")
    bucket.put("deleted", b"before")
    last = conditional_writes.last_message
    outdated = {
        bucket._subject(key): last(bucket.connection, bucket.stream, bucket._subject(key))
        for key in ("changed", "made", "deleted")
    }
    bucket.put("changed", b"now")
    bucket.put("made", b"now")
    bucket.delete("deleted")
    monkeypatch.setattr(
        conditional_writes, "last_message", lambda _connection, _stream, subject, **_: outdated[subject]
    )
    bucket._writes.one_server = False

    def read(*, linearizable: bool) -> list[bytes | None]:
        entries = (bucket.get(key, linearizable=linearizable) for key in ("changed", "made", "deleted"))
        return [entry and entry.value for entry in entries]

    assert read(linearizable=False) == [b"before", None, b"before"]
    assert read(linearizable=True) == [b"now", b"now", None]


def test_a_lost_conflict_is_still_a_conflict(make_bucket: MakeBucket, cable: DeafCable) -> None:
    """Being sent again does not turn a conflict into a success."""
    writer, other = make_bucket(cable.url), make_bucket()
    revision = writer.put("k", b"before")
    other.put("k", b"theirs")
    started = threading.Event()

    def update() -> int:
        started.set()
        return writer.update("k", b"mine", revision=revision)

    with pytest.raises(RevisionConflict):
        lose_the_answer(cable, started.is_set, update, lambda: threading.Event().wait(0.3))
    assert value(other, "k") == b"theirs"


def test_a_listing_goes_over_many_pages(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key under the prefix comes once, deleted ones do not, however small the pages are."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.listing.PAGE", 7)
    bucket.put("other.1", b"")
    bucket.connection.publish_many(
        Publication(bucket_subject(bucket.name, f"many.{n}"), b"%d" % n) for n in range(100)
    )
    bucket.delete("many.50")
    assert sorted(bucket.keys("many.")) == sorted(f"many.{n}" for n in range(100) if n != 50)
    assert {entry.value for entry in bucket.items("many.1")} == {b"1", *(b"%d" % n for n in range(10, 20))}
    assert bucket.keys("none.") == []


def test_a_listing_survives_a_reconnect(
    make_bucket: MakeBucket, cable: DeafCable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that got lost is asked for again."""
    bucket = make_bucket(cable.url)
    for n in range(10):
        bucket.put(f"k{n}", b"")
    assert len(bucket.keys()) == 10
    send = bucket.connection.send

    def lose_the_page(*args: Any, **kwargs: Any) -> None:
        cable.deaf = True
        monkeypatch.undo()
        send(*args, **kwargs)

    monkeypatch.setattr(bucket.connection, "send", lose_the_page)
    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(bucket.keys)
        eventually(lambda: cable.lost)
        cable.cut()
        cable.deaf = False
        assert len(listing.result(timeout=30)) == 10


def test_the_newest_revision_is_that_of_the_last_write(bucket: Bucket) -> None:
    """It counts writes, deletions too; a bucket that was deleted begins again."""
    assert bucket.newest_revision() == 0
    revision = bucket.put("a.b", b"1")
    assert bucket.newest_revision() == revision
    bucket.delete("a.b")
    assert bucket.newest_revision() == revision + 1
    assert list(bucket.items(after=revision)) == []
    bucket.connection.api(f"STREAM.DELETE.{bucket.stream}")
    assert bucket.newest_revision() == 0
    assert bucket.put("c", b"2") == 1


def test_a_snapshot_can_be_written_against(bucket: Bucket) -> None:
    """A write that depends on a whole prefix fails as soon as any key there changed, or was deleted."""
    empty = bucket.snapshot("g.")
    assert (empty.entries, empty.revision) == ({}, 0)
    bucket.update("g.a", b"1", revision=empty.revision, within="g.")
    with pytest.raises(RevisionConflict):
        bucket.update("g.b", b"1", revision=empty.revision, within="g.")
    bucket.put("elsewhere", b"1")
    seen = bucket.snapshot("g.")
    assert {key: entry.value for key, entry in seen.entries.items()} == {"g.a": b"1"}
    bucket.update("g.b", b"1", revision=seen.revision, within="g.")
    seen = bucket.snapshot("g.")
    bucket.delete("g.a")
    with pytest.raises(RevisionConflict):
        bucket.update("g.c", b"1", revision=seen.revision, within="g.")
    seen = bucket.snapshot("g.")
    assert seen.entries.keys() == {"g.b"}
    bucket.update("g.c", b"1", revision=seen.revision, within="g.")


class Seen:
    """A callback for watches that remembers."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def __call__(self, entry: Entry) -> None:
        self.entries.append(entry)

    @property
    def values(self) -> list[tuple[str, bytes | None]]:
        return [(entry.key, None if entry.deleted else entry.value) for entry in list(self.entries)]


def test_a_watch_begins_with_what_is_there(bucket: Bucket) -> None:
    """First the entries that exist, then each change in order, only under the prefix, until it is closed."""
    bucket.put("g.a", b"1")
    bucket.put("h.a", b"other")
    seen = Seen()
    watch = bucket.watch("g.", seen)
    assert eventually(lambda: seen.values == [("g.a", b"1")])
    revision = bucket.put("g.b", b"2")
    bucket.delete("g.a")
    assert eventually(lambda: seen.values == [("g.a", b"1"), ("g.b", b"2"), ("g.a", None)])
    assert seen.entries[1] == dataclasses.replace(bucket.get("g.b"), revision=revision)  # type: ignore[type-var]
    watch.close()
    bucket.put("g.c", b"3")
    eventually(lambda: not bucket.connection.api(f"CONSUMER.NAMES.{bucket.stream}")["consumers"])
    assert len(seen.entries) == 3


def test_a_watch_misses_nothing_over_reconnects(make_bucket: MakeBucket, cable: DeafCable) -> None:
    """Each entry comes exactly once, in order, though the connection breaks again and again."""
    bucket, writer = make_bucket(cable.url), make_bucket()
    seen = Seen()
    watch = bucket.watch("", seen)
    for start in range(0, 60, 20):
        for n in range(start, start + 10):
            writer.put(f"k{n}", b"")
        # Reconnected and caught up, so that the next entries are on their way when they get lost.
        assert eventually(lambda end=start + 10: len(seen.entries) >= end)
        cable.lost = b""
        with cable.deafness():
            for n in range(start + 10, start + 15):
                writer.put(f"k{n}", b"")
            assert eventually(lambda: bool(cable.lost))
        for n in range(start + 15, start + 20):
            writer.put(f"k{n}", b"")
    assert eventually(lambda: len(seen.entries) >= 60)
    assert [key for key, _ in seen.values] == [f"k{n}" for n in range(60)]
    watch.close()


def test_a_watch_goes_on_when_its_consumer_disappears(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that was deleted on the server is noticed by its silence and replaced."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.watching.SILENCE_SECONDS", 0.5)
    bucket.put("k", b"1")
    seen = Seen()
    watch = bucket.watch("", seen)
    assert eventually(lambda: len(seen.entries) == 1)
    for name in bucket.connection.api(f"CONSUMER.NAMES.{bucket.stream}")["consumers"]:
        bucket.connection.api(f"CONSUMER.DELETE.{bucket.stream}.{name}")
    bucket.put("k", b"2")
    assert eventually(lambda: seen.values == [("k", b"1"), ("k", b"2")])
    watch.close()


def test_a_watch_sees_a_bucket_that_was_made_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sequences begin again, far below those that the watch has seen; that it is missing is said once."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.watching.RETRY_SECONDS", 0.05)
    monkeypatch.setattr("dramatiq_jetstream.jetstream.watching.SILENCE_SECONDS", 0.5)
    for number in range(20):
        bucket.put("k", b"%d" % number)
    seen = Seen()
    watch = bucket.watch("", seen)
    eventually(lambda: seen.values == [("k", b"19")])
    bucket.connection.api(f"STREAM.DELETE.{bucket.stream}")
    eventually(lambda: "could not be set up" in caplog.text)
    holds(lambda: caplog.text.count("could not be set up") == 1, 0.5)
    bucket.put("k", b"after")
    eventually(lambda: seen.values == [("k", b"19"), ("k", b"after")])
    bucket.put("k", b"later")
    eventually(lambda: seen.values[2:] == [("k", b"later")])
    watch.close()


def test_a_watch_sees_a_bucket_that_came_back_older(
    make_bucket: MakeBucket, own_nats_server: NatsServer, tmp_path: Path
) -> None:
    """A store that was restored from a copy is the same stream, and ends before what the watch has seen."""
    bucket, store = make_bucket(own_nats_server.url), tmp_path / "nats"
    for number in range(5):
        bucket.put("k", b"%d" % number)
    own_nats_server.stop()
    shutil.copytree(store, tmp_path / "copy")
    own_nats_server.start()
    for number in range(5, 20):
        bucket.put("k", b"%d" % number)
    seen = Seen()
    watch = bucket.watch("", seen)
    eventually(lambda: seen.values == [("k", b"19")])
    own_nats_server.kill()
    shutil.rmtree(store)
    (tmp_path / "copy").rename(store)
    own_nats_server.start()
    eventually(lambda: seen.values == [("k", b"19"), ("k", b"4")])
    bucket.put("k", b"after")
    eventually(lambda: seen.values[2:] == [("k", b"after")])
    watch.close()


def test_a_watch_sees_what_an_older_bucket_got_before_it_was_back(
    make_bucket: MakeBucket, own_nats_server: NatsServer, tmp_path: Path
) -> None:
    """Others were connected first: they have written beyond what the watch had seen, in the places of that."""
    writer, store = make_bucket(own_nats_server.url), tmp_path / "nats"
    writer.put("k", b"0")
    own_nats_server.stop()
    shutil.copytree(store, tmp_path / "copy")
    own_nats_server.start()
    for number in range(1, 10):
        writer.put("k", b"%d" % number)
    with Proxy(own_nats_server.url) as proxy:
        seen = Seen()
        watch = make_bucket(proxy.url).watch("", seen)
        eventually(lambda: seen.values == [("k", b"9")])
        proxy.lose()
        own_nats_server.kill()
        shutil.rmtree(store)
        (tmp_path / "copy").rename(store)
        own_nats_server.start()
        writer.put("early", b"x")
        for number in range(20):
            writer.put("k", b"new %d" % number)
        proxy.restore()
        eventually(lambda: ("early", b"x") in seen.values and seen.values[-1] == ("k", b"new 19"))
        watch.close()


def test_reading_a_bucket_that_was_deleted_makes_it_again_at_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that only reads does not wait for a stream that is gone, message after message."""
    # A stream that is starting would be waited for until the call's time is over, 10 s.
    monkeypatch.setattr("dramatiq_jetstream.wire.asking.NO_RESPONDERS_GRACE_MS", 60_000)
    bucket.put("k", b"1")
    bucket.connection.api(f"STREAM.DELETE.{bucket.stream}")
    started = time.monotonic()
    assert bucket.get("k") is None
    assert time.monotonic() - started < 8
    assert bucket.stream in bucket.connection.api("STREAM.NAMES")["streams"]


def test_an_atomic_change_makes_a_deleted_bucket_again(bucket: Bucket) -> None:
    """As a single write does."""
    bucket.put("k", b"1")
    bucket.connection.api(f"STREAM.DELETE.{bucket.stream}")
    bucket.update_all({"a": (b"1", 0), "b": (b"2", 0)})
    assert bucket.keys() == ["a", "b"]


def test_keys_are_cleared_by_their_prefix(bucket: Bucket) -> None:
    """All that begin with it are gone, others stay, and one that another writer changes meanwhile stays too."""
    for key in ("q/a", "q/b", "q/c", "qq/a", "other"):
        bucket.put(key, b"1")
    items = bucket.items

    def then_changed(prefix: str) -> Iterator[Entry]:
        found = list(items(prefix))
        bucket.put("q/b", b"2")
        yield from found

    bucket.items = then_changed  # type: ignore[method-assign]
    bucket.clear("q/")
    bucket.items = items  # type: ignore[method-assign]
    assert sorted(bucket.keys()) == ["other", "q/b", "qq/a"]


def test_a_note_makes_a_deleted_bucket_again(bucket: Bucket) -> None:
    """The first is lost with the bucket, those that come after are kept."""
    bucket.note("k", b"0")
    eventually(lambda: bucket.get("k"))
    bucket.connection.api(f"STREAM.DELETE.{bucket.stream}")

    def kept() -> bool:
        bucket.note("k", b"1")
        return bucket.stream in bucket.connection.api("STREAM.NAMES")["streams"]

    eventually(kept)
    bucket.note("k", b"2")
    eventually(lambda: (bucket.get("k") or Entry("k", b"", 0, 0)).value == b"2")


def test_a_failing_callback_does_not_end_the_watch(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """What a callback raises is logged, and the next entry still comes."""
    seen = Seen()

    def callback(entry: Entry) -> None:
        seen(entry)
        raise ValueError("on purpose")

    watch = bucket.watch("", callback)
    bucket.put("a", b"")
    bucket.put("b", b"")
    assert eventually(lambda: len(seen.entries) == 2)
    assert "on purpose" in caplog.text
    watch.close()


def test_a_bucket_that_may_not_be_declared_must_exist(make_bucket: MakeBucket) -> None:
    """With declare=False nothing is created, and writing says what is missing."""
    without = make_bucket(declare=False, timeout=700)
    assert without.get("k") is None
    with pytest.raises(TopologyMissing, match="fleet setup"):
        without.put("k", b"")
    make_bucket().put("k", b"1")
    assert without.get("k") is not None


def test_a_bucket_that_was_deleted_is_made_again(bucket: Bucket) -> None:
    """A bucket that may declare does not depend on what someone removed."""
    bucket.connection.timeout = 700
    bucket.put("k", b"1")
    bucket.connection.api(f"STREAM.DELETE.{bucket.stream}")
    bucket.put("k", b"2")
    assert value(bucket, "k") == b"2"


def test_without_a_server_every_call_ends_in_time(
    make_bucket: MakeBucket, own_nats_server: NatsServer
) -> None:
    """Reads, writes and listings raise a BrokerConnectionError once the connection's timeout is over."""
    bucket = make_bucket(own_nats_server.url, timeout=400)
    bucket.put("k", b"1")
    own_nats_server.stop()
    for call in (
        lambda: bucket.get("k"),
        lambda: bucket.put("k", b"2"),
        lambda: bucket.create("k", b"2"),
        lambda: bucket.keys(),
    ):
        with pytest.raises(BrokerConnectionError):
            call()
    own_nats_server.start()
    assert eventually(lambda: bucket.connection.is_connected)
    assert bucket.get("k") is not None


def test_three_replicas_are_read_as_they_were_written(
    make_bucket: MakeBucket, nats_cluster: NatsCluster
) -> None:
    """On a cluster a writer of a key reads and lists it, and compare-and-set holds, within a prefix too."""
    buckets = [make_bucket(url, storage=Storage(replicas=3)) for url in nats_cluster.urls[:2]]
    for n in range(30):
        writer, reader = buckets[n % 2], buckets[(n + 1) % 2]
        revision = writer.put("k", b"%d" % n)
        assert value(reader, "k") == b"%d" % n
        writer.put(f"list.{n}", b"")
        assert len(reader.keys("list.")) == n + 1
        with pytest.raises(RevisionConflict):
            reader.update("k", b"lost", revision=revision - 1)

    def take(bucket: Bucket) -> int:
        """Add a key under the prefix unless there are five, as a limiter does."""
        taken = 0
        for _ in range(5):
            while True:
                seen = bucket.snapshot("limited.")
                if len(seen.entries) >= 5:
                    return taken
                try:
                    key = f"limited.{id(bucket)}-{threading.get_ident()}-{taken}"
                    bucket.update(key, b"", revision=seen.revision, within="limited.")
                    taken += 1
                    break
                except RevisionConflict:
                    continue
        return taken

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(take, buckets * 2)) == 5


def test_linearizable_reads_on_a_cluster(make_bucket: MakeBucket, nats_cluster: NatsCluster) -> None:
    """Whichever replica answers, it has what was acknowledged before; nothing of the reads is seen in the bucket."""
    writer, reader = (make_bucket(url, storage=Storage(replicas=3)) for url in nats_cluster.urls[:2])
    seen: list[str] = []
    with contextlib.closing(reader.watch("", lambda entry: seen.append(entry.key))):
        assert reader.get("k", linearizable=True) is None
        for n in range(50):
            revision = writer.put("k", b"%d" % n)
            entry = reader.get("k", linearizable=True)
            assert entry is not None
            assert (entry.value, entry.revision) == (b"%d" % n, revision)
        assert reader.get("missing", linearizable=True) is None
        assert reader.keys() == ["k"]
        writer.put("last", b"")
        assert eventually(lambda: "last" in seen)
    assert set(seen) == {"k", "last"}


def test_asking_for_a_write_leaves_a_cluster_alone(
    make_bucket: MakeBucket, nats_cluster: NatsCluster
) -> None:
    """After a write was repeated the server is asked whether it has it: an answer, and no harm to the stream."""
    bucket = make_bucket(nats_cluster.urls[0], storage=Storage(replicas=3))
    revision = bucket.put("k", b"1")
    subject = bucket._subject("k")
    written = message_at(bucket.connection, bucket.stream, revision)
    assert written is not None
    for _ in range(3):
        assert bucket._writes._stored_as(subject, written.headers["Nats-Msg-Id"]) == revision
        assert bucket._writes._stored_as(subject, "nobody-wrote-this") is None
    assert bucket.update("k", b"2", revision=revision) == revision + 1
    assert value(bucket, "k") == b"2"


def test_a_waiting_thread_hears_of_a_write(broker):
    """From any program, for this key alone, without a consumer on the server."""
    bucket = broker.bucket("heard")
    with bucket.hearing("order.1") as heard:
        bucket.put("order.2", b"another")
        assert not heard.wait(0.3)
        bucket.put("order.1", b"this one")
        assert heard.wait(30)
    assert broker.stream(bucket.stream).consumers() == []


def test_several_keys_in_one_request(bucket: Bucket) -> None:
    """Those that exist, as they are; asked for one or several."""
    bucket.put("a", b"1")
    bucket.put("b.c", b"2")
    bucket.put("gone", b"x")
    bucket.delete("gone")
    newest = bucket.put("newest", b"3")
    found = bucket.get_many(["a", "b.c", "gone", "missing", "a"], since=("newest", newest))
    assert {key: entry.value for key, entry in found.items()} == {"a": b"1", "b.c": b"2"}
    assert bucket.get_many(["missing"], since=("newest", newest)) == {}
    assert bucket.get_many(["newest"], since=("newest", newest))["newest"].revision == newest
    assert bucket.get_many([], since=("newest", newest)) == {}


def test_several_keys_on_a_cluster_are_not_behind(make_bucket: MakeBucket, nats_cluster: NatsCluster) -> None:
    """Whichever replica answers, it has what was stored before the revision that the reader knows."""
    writer, reader = (make_bucket(url, storage=Storage(replicas=3)) for url in nats_cluster.urls[:2])
    for number in range(30):
        writer.put("record", str(number).encode())
        known = writer.put("level", b"")
        found = reader.get_many(["record", "missing"], since=("level", known))
        assert {key: entry.value for key, entry in found.items()} == {"record": str(number).encode()}
