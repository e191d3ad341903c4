"""The short run of `make chaos`: a few faults on one server and on a cluster, and the books are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import BY_NAME
from tests.chaos.fleet import Topology
from tests.chaos.network import Network
from tests.chaos.trial import Result, run
from tests.support.skips import needs_root

#: The same every time, so that CI fails for a reason; `make chaos` draws another one each time.
SEED = 20261121


def _run(topology: Topology, names: list[str], directory: Path, cut: Network | None = None) -> Result:
    print(f"seed {SEED}")
    result = run(
        topology,
        [BY_NAME[name] for name in names],
        directory=directory,
        seed=SEED,
        rate=5.0,
        settle=60.0,
        say=print,
        network=cut,
    )
    assert result.kept, "\n".join(verdict.line() for verdict in result.verdicts)
    assert result.accepted > 20
    assert all(result.beside.values()), result.beside
    return result


@pytest.mark.timeout(400)
def test_one_server_keeps_every_promise(tmp_path: Path) -> None:
    """Workers, the front end and the server killed, and a gateway that fails after it has charged."""
    faults = ["worker-killed", "web-killed", "nats-killed", "gateway-after-charge", "store-full"]
    result = _run("single", faults, tmp_path)
    assert [measured.fault for measured in result.measured] == faults


@needs_root
@pytest.mark.timeout(400)
def test_a_cluster_keeps_every_promise(tmp_path: Path) -> None:
    """The leader killed, and the service cut off from all nodes, in network namespaces."""
    cut = Network().open()
    try:
        _run("cluster", ["leader-killed", "service-parted"], tmp_path, cut)
    finally:
        cut.close()
