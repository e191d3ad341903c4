"""Pipelines and groups on every broker, with the result and rate limiter backends that belong beside it."""

from __future__ import annotations

import threading
import time

import pytest
from dramatiq import group, pipeline
from dramatiq.middleware import GroupCallbacks, Middleware
from dramatiq.results import ResultMissing, Results, ResultTimeout

from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds

pytestmark = pytest.mark.where(whole_suite=True)


@pytest.fixture
def stored(rig, broker):
    """Results on the broker under test."""
    backend = rig.results()
    broker.add_middleware(Results(backend=backend))
    yield backend
    if hasattr(backend, "close"):
        backend.close()


@pytest.fixture
def callbacks(rig, broker):
    """Group callbacks on the broker under test."""
    backend = rig.limits()
    broker.add_middleware(GroupCallbacks(backend))
    yield backend
    if hasattr(backend, "close"):
        backend.close()


@pytest.fixture
def add(actor):
    """An actor whose result is the sum of its arguments."""

    @actor(store_results=True)
    def add(*numbers):
        return sum(numbers)

    return add


@pytest.mark.usefixtures("stored")
def test_a_pipeline_feeds_each_result_to_the_next(rig, broker, queue, add):
    """Every step gets the result of the one before as its last argument; pipelines in pipelines are flat."""
    pipe = pipeline([add.message(1, 2), add.message(3) | add.message(4)])
    assert len(pipe) == 3
    with running(broker) as worker:
        pipe.run()
        assert pipe.get_result(block=True) == 10
        assert list(pipe.get_results(block=True)) == [3, 6, 10]
        assert pipe.completed
        assert pipe.completed_count == 3
        rig.drain(queue, worker)


@pytest.mark.usefixtures("stored")
def test_a_step_may_ignore_the_result_before(rig, broker, actor, queue):
    """`pipe_ignore` belongs to the step that receives."""

    @actor(store_results=True)
    def collect(*args):
        return list(args)

    pipe = collect.message(1) | collect.message_with_options(args=(2,), pipe_ignore=True) | collect.message(3)
    with running(broker) as worker:
        pipe.run()
        assert list(pipe.get_results(block=True)) == [[1], [2], [3, [2]]]
        rig.drain(queue, worker)


@pytest.mark.usefixtures("stored")
def test_a_pipeline_that_is_not_run_is_not_complete(broker, add):
    """Without a worker nothing completes."""
    pipe = add.message(1) | add.message(2)
    pipe.run()
    assert not pipe.completed
    assert pipe.completed_count == 0
    with pytest.raises(ResultMissing):
        pipe.get_result()


@pytest.mark.usefixtures("stored")
def test_waiting_for_a_pipeline_has_a_timeout(rig, broker, actor, queue):
    """Results that do not come in time raise ResultTimeout."""
    go_on = threading.Event()

    @actor(store_results=True)
    def wait(*args):
        go_on.wait(timeout=30)

    pipe = wait.message() | wait.message()
    with running(broker) as worker:
        pipe.run()
        with pytest.raises(ResultTimeout):
            list(pipe.get_results(block=True, timeout=100))
        assert not pipe.completed
        go_on.set()
        rig.drain(queue, worker)


def test_a_pipeline_stops_at_a_message_that_was_failed(rig, broker, actor, queue):
    """Middleware that fails a message keeps the next step from being sent."""

    class Fail(Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            message.fail()

    broker.add_middleware(Fail())
    runs = []

    @actor
    def note(step, *args):
        runs.append(step)

    with running(broker) as worker:
        (note.message(1) | note.message(2)).run()
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert runs == [1]


@pytest.mark.parametrize(
    ("of_first", "of_second", "of_pipeline", "at_least"),
    [(0, 0, 300, (300, 300)), (300, 0, 0, (300, 300)), (100, 0, 300, (300, 300)), (0, 300, 0, (0, 300))],
    ids=["pipeline", "first step", "the longer one", "second step"],
)
def test_a_pipeline_respects_delays(rig, broker, actor, queue, of_first, of_second, of_pipeline, at_least):
    """Steps start after their own delay; for the first that or the pipeline's, whichever is longer."""
    started = {}

    @actor
    def note(step, *args):
        started[step] = (time.monotonic() - sent_at) * 1000

    first = note.message_with_options(args=(0,), **({"delay": of_first} if of_first else {}))
    second = note.message_with_options(args=(1,), **({"delay": of_second} if of_second else {}))
    with running(broker) as worker:
        sent_at = time.monotonic()
        (first | second).run(delay=of_pipeline or None)
        eventually(lambda: len(started) == 2)
        rig.drain(queue, worker)
    assert started[0] >= at_least[0]
    assert started[1] >= at_least[1]


@pytest.mark.usefixtures("stored")
def test_a_group_runs_side_by_side(rig, broker, actor, queue):
    """Messages of a group run at the same time, and each result has its place."""
    together = threading.Barrier(4)

    @actor(store_results=True)
    def meet(number):
        together.wait(timeout=30)
        return number

    parts = group(meet.message(number) for number in range(4))
    with running(broker, threads=4) as worker:
        parts.run()
        assert list(parts.get_results(block=True)) == [0, 1, 2, 3]
        assert parts.completed
        rig.drain(queue, worker)


@pytest.mark.usefixtures("stored")
def test_groups_may_contain_groups_and_pipelines(rig, broker, queue, add):
    """Results keep the shape of what was run."""
    parts = group([group([add.message(1), add.message(2)]), add.message(3) | add.message(4), add.message(5)])
    with running(broker) as worker:
        parts.run()
        assert list(parts.get_results(block=True)) == [[1, 2], 7, 5]
        rig.drain(queue, worker)


@pytest.mark.usefixtures("stored")
def test_a_group_counts_what_is_complete_in_any_order(rig, broker, actor, queue):
    """The number of completed parts grows with each that ends, whatever its place in the group."""
    gates = [threading.Event() for _ in range(3)]

    @actor(store_results=True)
    def wait(number):
        gates[number].wait(timeout=30)

    parts = group(wait.message(number) for number in range(3))
    with running(broker, threads=3) as worker:
        parts.run()
        with pytest.raises(ResultTimeout):
            parts.wait(timeout=50)
        assert parts.completed_count == 0
        for count, number in enumerate((2, 0, 1), start=1):
            gates[number].set()
            eventually(lambda count=count: parts.completed_count == count)
        parts.wait(timeout=5000)
        assert parts.completed
        rig.drain(queue, worker)


@pytest.mark.parametrize("delay", [None, 200])
@pytest.mark.usefixtures("callbacks")
def test_a_group_calls_back_once_when_all_have_run(rig, broker, actor, queue, delay):
    """Completion callbacks run after the last part, once each; also when a group is run again."""
    ran, finished = [], []

    @actor
    def part(number):
        ran.append(number)

    @actor
    def finish(name):
        finished.append((name, len(ran)))

    parts = group(part.message(number) for number in range(6))
    parts.add_completion_callback(finish.message("one"))
    parts.add_completion_callback(finish.message("two"))
    with running(broker) as worker:
        for run in (1, 2):
            parts.run(delay=delay)
            eventually(lambda run=run: len(finished) == 2 * run)
            rig.drain(queue, worker)
    assert sorted(finished) == sorted([("one", 6), ("two", 6), ("one", 12), ("two", 12)])


@pytest.mark.usefixtures("callbacks")
def test_a_failed_part_holds_the_callback_back(rig, broker, actor, queue):
    """A part that has not succeeded, and is to be retried, is awaited; a dead one is never replaced."""
    runs, finished = [], []

    @actor(max_retries=1, min_backoff=10, max_backoff=20)
    def part(number, failures):
        runs.append(number)
        if runs.count(number) <= failures:
            raise RuntimeError

    @actor
    def finish(name):
        finished.append((name, len(runs)))

    with running(broker) as worker:
        recovers = group([part.message(1, 0), part.message(2, 1)])
        recovers.add_completion_callback(finish.message("recovered"))
        recovers.run()
        eventually(lambda: finished == [("recovered", 3)])
        dies = group([part.message(3, 0), part.message(4, 2)])
        dies.add_completion_callback(finish.message("died"))
        dies.run()
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
        holds(lambda: len(finished) == 1, 0.1)


@pytest.mark.usefixtures("callbacks")
def test_a_group_of_pipelines_calls_back_after_the_last_steps(rig, broker, actor, queue):
    """A pipeline counts as run when its last step has."""
    ran, finished = [], []

    @actor
    def step(*args):
        ran.append(1)

    @actor
    def finish():
        finished.append(len(ran))

    parts = group([step.message(1) | step.message() | step.message(), step.message(1)])
    parts.add_completion_callback(finish.message())
    with running(broker) as worker:
        parts.run()
        eventually(lambda: finished == [4])
        rig.drain(queue, worker)
    assert finished == [4]


def test_callbacks_need_their_middleware(broker, actor):
    """A group with a callback that would never be made is refused when it is run."""

    @actor
    def part():
        pass

    parts = group([part.message()])
    parts.add_completion_callback(part.message())
    with pytest.raises(RuntimeError, match="GroupCallbacks"):
        parts.run()
