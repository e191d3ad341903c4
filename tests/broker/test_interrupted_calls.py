"""An exception that strikes a thread at any line leaves nothing taken: no lock, no lane, no counter, no second thread.

Dramatiq throws TimeLimitExceeded, Shutdown and Abort into threads wherever they stand, and Ctrl-C does so to the main
thread. Here each line of the way gets its turn.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from dramatiq_jetstream.config import MAX_CONNECTIONS
from dramatiq_jetstream.wire.connection import Connection, ConnectOptions
from dramatiq_jetstream.wire.ids import new_id
from dramatiq_jetstream.wire.thread_queue import ThreadQueue
from tests.support.polling import eventually

#: Lanes of a process at most.
MOST = MAX_CONNECTIONS - 1


class Interrupt(BaseException):
    """Stands for what Dramatiq raises."""


def struck_at(line: int, call: Callable[[], object]) -> bool:
    """Run a call, with an interrupt at its n-th line within `wire/`; False when it has fewer lines."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        return within if "/dramatiq_jetstream/wire/" in frame.f_code.co_filename else None

    def within(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == line:
                raise Interrupt
        return within

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def each_line(call: Callable[[], object]) -> Iterator[int]:
    """The number of each line of a call, after an interrupt there."""
    line = 1
    while struck_at(line, call):
        yield line
        line += 1
    assert line > 10, "nothing was traced"


@pytest.fixture
def connection(nats_url: str, namespace: str) -> Iterator[Connection]:
    connection = Connection(ConnectOptions.of(nats_url))
    connection.api(f"STREAM.CREATE.{namespace}", {"name": namespace, "subjects": [namespace]})
    yield connection
    connection.close()


def idle(connection: Connection) -> bool:
    """Whether nothing is left over of any call."""
    link = connection._link
    return (
        not link._waiters._signals and not link.calls._waiting and not link.loop._mailbox and not link._outbox
    )


def test_a_publish_by_a_lane(connection, namespace):
    """The lane that was struck is gone, and the next call has one."""

    def publish() -> None:
        connection.publish(namespace, b"x", {"Nats-Msg-Id": new_id()}, timeout=5_000)

    publish()
    for line in each_line(publish):
        publish()
        beside = connection._link.lanes
        assert len(beside._lanes) <= MOST // 2, line
        beside._not_before = 0.0
    eventually(lambda: idle(connection))


def test_opening_a_lane(connection, namespace):
    """A lane that is struck while it is opened counts no more."""

    def publish() -> None:
        connection._link.lanes._close_idle()
        connection.publish(namespace, b"x", {"Nats-Msg-Id": new_id()}, timeout=5_000)

    for _ in each_line(publish):
        connection._link.lanes._not_before = 0.0
        connection._link.lanes._pause = 0.0
    publish()
    assert len(connection._link.lanes._lanes) <= MOST // 2
    eventually(lambda: idle(connection))


def test_a_publish_by_the_loop(connection, namespace):
    connection.api("INFO")
    connection._link.lanes._not_before = float("inf")
    connection._link.lanes._close_idle()

    def publish() -> None:
        connection.publish(namespace, b"x", {"Nats-Msg-Id": new_id()}, timeout=5_000)

    for _ in each_line(publish):
        publish()
    eventually(lambda: idle(connection))


def test_a_subscription(connection):
    """What was not returned leaves no interest behind, or one that an object holds which can be closed."""

    def subscribe() -> None:
        connection.subscribe(connection.new_inbox(), lambda message: None).close()

    for _ in each_line(subscribe):
        subscribe()
        for left in connection._subscriptions:
            left.close()
    eventually(lambda: idle(connection))


def loop_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "dramatiq-jetstream"}


def test_the_first_connect(nats_url):
    """Wherever it was struck, the next call connects, by one thread and one connection."""
    before = loop_threads()
    made: list[Connection] = []

    def connect() -> None:
        made.append(Connection(ConnectOptions.of(nats_url)))
        made[-1].connect()

    for _ in each_line(connect):
        if made:
            made[-1].connect()
            assert made[-1].api("INFO")
            assert made[-1].state.reconnects == 0
            made.pop().close()
    made.pop().close()
    eventually(lambda: loop_threads() <= before)


def test_a_close(nats_url):
    """What was struck can be closed again, and no thread stays."""
    before = loop_threads()
    made: list[Connection] = []

    def close() -> None:
        made[-1].close()

    made.append(Connection(ConnectOptions.of(nats_url)))
    made[-1].connect()
    for _ in each_line(close):
        made[-1].close()
        made.append(Connection(ConnectOptions.of(nats_url)))
        made[-1].connect()
    for each in made:
        each.close()
    eventually(lambda: loop_threads() <= before)


@pytest.mark.parametrize("timeout", [0.01, None])
def test_taking_from_a_queue_between_threads(timeout):
    """The thread that was struck takes the item, or the next one does; no thread waits beside an item."""
    queue: ThreadQueue[int] = ThreadQueue()

    def take() -> None:
        if timeout is None:
            queue.put(1)
        with contextlib.suppress(Exception):
            queue.get(timeout=timeout)

    for _ in each_line(take):
        while not queue.empty():
            queue.get_nowait()
        getting = threading.Thread(target=queue.get, daemon=True)
        getting.start()
        queue.put(2)
        getting.join(5)
        assert not getting.is_alive()
