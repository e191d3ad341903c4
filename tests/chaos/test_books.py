"""The books are read again when a node of the cluster does not know of the consumer yet, for a bounded time."""

from __future__ import annotations

import pytest
from nats.js.client import JetStreamContext
from nats.js.errors import ServiceUnavailableError

from tests.chaos import reading


def test_a_read_that_comes_too_early_is_repeated(nats_url: str) -> None:
    """The first answer is the one that a node gives to a pull from a consumer that it has not heard of."""
    reads = 0

    async def read(js: JetStreamContext) -> int:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise ServiceUnavailableError
        return (await js.account_info()).streams

    assert reading.run(nats_url, read) >= 0
    assert reads == 2


def test_a_read_that_never_comes_through_ends(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer whose node is gone stays unavailable: the look ends, and says that it took too long."""
    monkeypatch.setattr(reading, "_PATIENCE_SECONDS", 0.5)

    async def read(_js: JetStreamContext) -> None:
        raise ServiceUnavailableError

    with pytest.raises(TimeoutError):
        reading.run(nats_url, read)
