"""Ids that are used once."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

from dramatiq_jetstream.wire.ids import new_id


def test_no_id_is_given_twice_by_any_thread():
    with ThreadPoolExecutor(8) as pool:
        ids = [one for some in pool.map(lambda _: [new_id() for _ in range(2_000)], range(8)) for one in some]
    assert len(set(ids)) == 16_000
    assert all(re.fullmatch("[a-z0-9]{25,}", one) for one in ids), "they go into subjects and headers"


def test_a_forked_child_gives_others():
    """Parent and child stand at the same count; JetStream would take the child's messages for the parent's."""
    new_id()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, ",".join(new_id() for _ in range(10)).encode())
        os._exit(0)
    os.close(writing)
    theirs = os.read(reading, 10_000).decode().split(",")
    os.close(reading)
    os.waitpid(child, 0)
    assert len(theirs) == 10
    assert not {new_id() for _ in range(20)} & set(theirs)
