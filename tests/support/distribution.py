"""How a run in several processes is spread over them; xdist asks tests/conftest.py for this.

A file stays together, because its servers are started once for it. A process stays in the directory where it began
as long as there is work, because the files of a directory share a running service, which each process that comes by
starts for itself. Long files begin first, so that none of them is alone at the end. What needs RabbitMQ is one unit:
a node of it takes as long to start as dozens of these tests.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from xdist.scheduler import LoadFileScheduling

RABBITMQ = "rabbitmq"

#: Files that take a quarter of a minute or more, the longest of each directory first.
LONG = [
    "tests/web/test_access.py",
    "tests/web/test_pages.py",
    "tests/web/test_mutated_events.py",
    "tests/web/test_other_peoples_orders.py",
    "tests/web/test_order_trace.py",
    "tests/tasks/test_runbook.py",
    "tests/tasks/test_gateway.py",
    "tests/tasks/test_running.py",
    "tests/tasks/test_telemetry.py",
    "tests/tasks/test_orders_end_to_end.py",
    "tests/tasks/test_permissions.py",
    "tests/broker/test_fleet_work.py",
    "tests/broker/test_stateful.py",
    "tests/broker/test_deadlines.py",
    "tests/broker/test_upgrading.py",
    "tests/broker/test_cli.py",
    "tests/broker/test_connection_loss.py",
]

#: Where the processes begin; each takes one that no other has, and helps where most is left when there is none.
DIRECTORIES = ["web", "tasks", "broker", "chaos", "ui", "browser", RABBITMQ, "walk", "instrumentation"]


class Distribution(LoadFileScheduling):
    """xdist's `--dist loadfile` with units of work chosen by what they need."""

    def _split_scope(self, nodeid: str) -> str:
        return RABBITMQ if f"[{RABBITMQ}" in nodeid else str(super()._split_scope(nodeid))

    def _assign_work_unit(self, node: Any) -> None:
        self.workqueue.move_to_end(self._next_unit(node), last=False)
        super()._assign_work_unit(node)

    def _next_unit(self, node: Any) -> str:
        left = Counter(map(_directory, self.workqueue))
        own = [_directory(unit) for unit in self.assigned_work[node]]
        begun = {_directory(unit) for units in self.assigned_work.values() for unit in units}
        directory = next(
            (
                each
                for each in [*reversed(own), *DIRECTORIES, *left]
                if left[each] and (each in own or each not in begun)
            ),
            max(left, key=lambda each: left[each]),
        )
        units = [unit for unit in self.workqueue if _directory(unit) == directory]
        return min(units, key=lambda unit: LONG.index(unit) if unit in LONG else len(LONG))


def _directory(unit: str) -> str:
    """Return the directory below `tests` that a unit is from, or what it is named after."""
    parts = PurePosixPath(unit).parts
    return parts[1] if len(parts) > 2 else parts[0]
