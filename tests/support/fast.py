"""`pytest --fast` (`make test-fast`): only tests that need no server and start no process.

A test that uses one of the fixtures below is left out, and so is a module with `pytestmark = pytest.mark.processes`.
What is left may not start a process: it fails if it tries, so the selection stays honest.
"""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

__all__ = ["register"]

#: Fixtures that start a server, or processes.
_STARTING = {
    "nats_server",
    "own_nats_server",
    "nats_cluster",
    "redis_url",
    "rabbitmq_url",
    "make_fleet",
    "stack",
    "browser",
}


class _Fast:
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if _starts(item)]
        items[:] = [item for item in items if not _starts(item)]
        config.hook.pytest_deselected(items=left_out)

    @pytest.fixture(autouse=True)
    def _no_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError("a fast test starts no process: mark its module with pytest.mark.processes")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


def _starts(item: pytest.Item) -> bool:
    fixtures = set(getattr(item, "fixturenames", ()))
    return bool(fixtures & _STARTING) or item.get_closest_marker("processes") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--fast`; called from the conftest at the root."""
    parser.addoption(
        "--fast", action="store_true", help="only tests that need no server and start no process"
    )


def register(config: pytest.Config) -> None:
    """Leave out what is not fast, if that was asked for."""
    config.addinivalue_line(
        "markers", "processes: the tests of this module start processes or servers themselves"
    )
    if config.getoption("--fast"):
        config.pluginmanager.register(_Fast(), "fast")
