"""The short run of the library's chaos: some faults on one server, and the books are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.library.faults import BY_NAME
from tests.chaos.library.trial import run

#: The same every time, so that CI fails for a reason; `python -m tests.chaos --subject library` draws another.
SEED = 20261128

FAULTS = (
    "worker-killed",
    "nats-killed",
    "links-mute",
    "login-rotated",
    "dead-letters-refused",
    "store-emptied",
)


@pytest.mark.timeout(400)
def test_the_library_keeps_every_promise(tmp_path: Path) -> None:
    """A worker and the server killed, a half-open link, a rotated key, and a server that comes back empty."""
    print(f"seed {SEED}")
    result = run(
        "single",
        [BY_NAME[name] for name in FAULTS],
        directory=tmp_path,
        seed=SEED,
        rate=10.0,
        settle=60.0,
        say=print,
    )
    assert result.kept, "\n".join(verdict.line() for verdict in result.verdicts)
    assert result.calls > 40
    assert [measured.fault for measured in result.measured] == list(FAULTS)
