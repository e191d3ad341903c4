"""How the tests are spread over xdist's processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.support.distribution import LONG, Distribution


class Node:
    """Stands for a process: runs nothing, and notes what it is given."""

    gateway = SimpleNamespace(id="a process")
    shutting_down = False

    def __init__(self, collection: list[str]) -> None:
        self.collection = collection
        self.given: list[str] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += [self.collection[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True


def spread(collection: list[str], processes: int) -> list[Node]:
    """Run a collection, one test of each process after the other; returns the processes."""
    options = SimpleNamespace(loadscopereorder=True)
    config: Any = SimpleNamespace(option=options, getvalue=lambda _: ["popen"] * processes)
    scheduler = Distribution(config)
    nodes = [Node(collection) for _ in range(processes)]
    for node in nodes:
        scheduler.add_node(node)  # type: ignore[arg-type]
        scheduler.add_node_collection(node, collection)  # type: ignore[arg-type]
    scheduler.schedule()
    ran = [0] * processes
    while any(ran[number] < len(node.given) for number, node in enumerate(nodes)):
        for number, node in enumerate(nodes):
            if ran[number] < len(node.given):
                index = collection.index(node.given[ran[number]])
                scheduler.mark_test_complete(node, index)  # type: ignore[arg-type]
                ran[number] += 1
    return nodes


def five_of(*files: str) -> list[str]:
    return [f"tests/{file}::test_{number}" for file in files for number in range(5)]


def test_every_test_runs_once_and_a_file_in_one_process() -> None:
    """However many processes there are."""
    collection = five_of("web/a.py", "web/b.py", "tasks/a.py", "broker/a.py", "broker/c/b.py", "test_docs.py")
    for processes in (1, 2, 4, 9):
        nodes = spread(collection, processes)
        assert sorted(test for node in nodes for test in node.given) == sorted(collection)
        for file in {test.partition("::")[0] for test in collection}:
            assert sum(any(test.startswith(file) for test in node.given) for node in nodes) == 1


def test_a_process_stays_in_its_directory() -> None:
    """And helps elsewhere when nothing is left there."""
    web, tasks = ([f"{name}/{number}.py" for number in range(4)] for name in ("web", "tasks"))
    first, second = spread(five_of(*web, *tasks), 2)
    assert [{test.split("/")[1] for test in node.given} for node in (first, second)] == [{"web"}, {"tasks"}]
    first, second = spread(five_of(*web[:1], *tasks), 2)
    assert {test.split("/")[1] for test in first.given} == {"web", "tasks"}


def test_one_process_runs_all_that_needs_rabbitmq() -> None:
    """Whatever file it stands in."""
    collection = [
        f"tests/broker/conformance/{file}.py::test[{server}-{number}]"
        for file in "ab"
        for server in ("redis", "rabbitmq")
        for number in range(3)
    ]
    nodes = spread(collection, 3)
    assert sorted(sum("rabbitmq" in test for test in node.given) for node in nodes) == [0, 0, 6]


def test_long_files_begin_first() -> None:
    """In the order of the list, before shorter ones that were collected before them."""
    long = [file.removeprefix("tests/") for file in LONG if file.startswith("tests/web/")]
    (node,) = spread(five_of("web/a.py", *reversed(long)), 1)
    assert list(dict.fromkeys(test.partition("::")[0] for test in node.given)) == [
        *(f"tests/{file}" for file in long),
        "tests/web/a.py",
    ]
