"""The short run of `make chaos`: a few faults on one server, and the books are right.

The cluster and the partitions take minutes; `make chaos` runs them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import BY_NAME
from tests.chaos.fleet import Topology
from tests.chaos.trial import Result, run

#: The same every time, so that CI fails for a reason; `make chaos` draws another one each time.
SEED = 20261121


def _run(topology: Topology, names: list[str], directory: Path) -> Result:
    print(f"seed {SEED}")
    result = run(
        topology,
        [BY_NAME[name] for name in names],
        directory=directory,
        seed=SEED,
        rate=5.0,
        settle=60.0,
        say=print,
    )
    assert result.kept, "\n".join(verdict.line() for verdict in result.verdicts)
    assert result.accepted > 20
    return result


@pytest.mark.timeout(240)
def test_one_server_keeps_every_promise(tmp_path: Path) -> None:
    """Workers, the front end and the server killed, and a gateway that fails after it has charged."""
    faults = ["worker-killed", "web-killed", "nats-killed", "gateway-after-charge", "store-full"]
    result = _run("single", faults, tmp_path)
    assert [measured.fault for measured in result.measured] == faults
