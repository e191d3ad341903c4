"""The whole service, started once for the tests in a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.web.stack import Stack


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The running service that tests share. A test that stops a part of it starts a Stack of its own."""
    with Stack(tmp_path_factory.mktemp("service"), web_processes=2) as stack:
        yield stack
