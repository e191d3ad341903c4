"""The tally that counts messages in shared memory."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

from benchmarks.tally import Count, Counter, Tally


def test_counts_of_all_threads_add_up(tmp_path: Path) -> None:
    """Threads that count at the same time lose nothing, as each has a slot of its own."""
    tally, counter = Tally(tmp_path, samples=8 * 500), Counter(tmp_path)

    def part(number: int) -> None:
        for index in range(500):
            counter.tick(number * 500 + index)

    threads = [threading.Thread(target=part, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = tally.times()
    count = tally.read()
    assert count.messages == 4_000
    assert all(times)
    assert (count.first_ns, count.last_ns) == (min(times), max(times))


def test_forked_processes_count_apart(tmp_path: Path) -> None:
    """A counter made before a fork counts in the child's own file."""
    tally, counter = Tally(tmp_path), Counter(tmp_path)
    counter.tick()
    child = multiprocessing.get_context("fork").Process(target=counter.tick)
    child.start()
    child.join(10)
    assert tally.read().messages == 2
    assert sorted(tally.pids().values()) == [1, 1]


def test_messages_that_did_not_run_have_no_time(tmp_path: Path) -> None:
    """A lost message shows as 0 in the times."""
    tally = Tally(tmp_path, samples=3)
    Counter(tmp_path).tick(1)
    assert [moment > 0 for moment in tally.times()] == [False, True, False]


def test_rate_counts_the_distances_between_messages() -> None:
    """Eleven messages over one second are ten a second, as the clock starts with the first."""
    assert Count(messages=11, first_ns=0, last_ns=1_000_000_000).per_second == 10
