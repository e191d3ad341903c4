"""`pytest --fast` (`make test-fast`): the tests that need no server and start no process, in seconds.

They are the modules below. What they run may not start a process: it fails if it tries, so the list stays honest.
"""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

__all__ = ["add_option", "register"]

MODULES = {
    "tests/benchmarks/test_report.py",
    "tests/benchmarks/test_statistics.py",
    "tests/benchmarks/test_tally.py",
    "tests/broker/test_board.py",
    "tests/broker/test_carried_events.py",
    "tests/broker/test_checked_options.py",
    "tests/broker/test_delay_times.py",
    "tests/broker/test_deliveries.py",
    "tests/broker/test_envelope.py",
    "tests/broker/test_fitting.py",
    "tests/broker/test_following.py",
    "tests/broker/test_headers.py",
    "tests/broker/test_hooks.py",
    "tests/broker/test_ids.py",
    "tests/broker/test_limit_state.py",
    "tests/broker/test_naming.py",
    "tests/broker/test_protocol.py",
    "tests/broker/test_references.py",
    "tests/broker/test_replies.py",
    "tests/broker/test_rooms.py",
    "tests/broker/test_settlements.py",
    "tests/broker/test_shown_text.py",
    "tests/broker/test_suspects.py",
    "tests/broker/test_time_limits.py",
    "tests/broker/test_unique_claims.py",
    "tests/instrumentation/test_instrumentor.py",
    "tests/instrumentation/test_interruptions.py",
    "tests/instrumentation/test_sampling.py",
    "tests/instrumentation/test_strikes.py",
    "tests/tasks/test_acceptance.py",
    "tests/tasks/test_listing.py",
    "tests/tasks/test_logs.py",
    "tests/tasks/test_outdated_reads.py",
    "tests/tasks/test_parsing.py",
    "tests/tasks/test_pricing.py",
    "tests/tasks/test_requests.py",
    "tests/tasks/test_saga_steps.py",
    "tests/tasks/test_stock_steps.py",
    "tests/test_workflows.py",
}


class _Fast:
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if not _is_fast(item)]
        items[:] = [item for item in items if _is_fast(item)]
        config.hook.pytest_deselected(items=left_out)

    @pytest.fixture(autouse=True)
    def _no_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError(
                "a fast test starts no process: take its module off the list in tests/support/fast.py"
            )

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


def _is_fast(item: pytest.Item) -> bool:
    return item.nodeid.partition("::")[0] in MODULES


def add_option(parser: pytest.Parser) -> None:
    """Add `--fast`; called from the conftest at the root."""
    parser.addoption(
        "--fast", action="store_true", help="only tests that need no server and start no process"
    )


def register(config: pytest.Config) -> None:
    """Leave out what is not fast, if that was asked for."""
    if config.getoption("--fast"):
        config.pluginmanager.register(_Fast(), "fast")


if __name__ == "__main__":
    print(*sorted(MODULES))
