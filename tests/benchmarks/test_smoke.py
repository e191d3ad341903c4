"""The whole harness, once, with very little work."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.__main__ import main


def test_harness_measures_the_broker_and_its_bound(tmp_path: Path) -> None:
    """Enqueue, drain and latency of the broker and of the StubBroker end in a table, JSON and plots."""
    arguments = [
        "--scale",
        "0.004",
        "--repeat",
        "1",
        "--peers",
        "jetstream,stub",
        "--only",
        "enqueue,drain,latency",
    ]
    main([*arguments, "--json", str(tmp_path / "run.json"), "--plots", str(tmp_path)])
    written = json.loads((tmp_path / "run.json").read_text())
    rows = {(part["name"], row["contender"]): row for part in written["measurements"] for row in part["rows"]}
    assert {row["failed"] for row in rows.values()} == {""}
    for contender in ("jetstream", "stub"):
        assert rows["drain", contender]["figures"]["per_second"]["median"] > 0
        assert rows["latency", contender]["figures"]["p50_ms"]["median"] > 0
    assert written["contenders"]["jetstream"]["versions"]["nats-server"]
    assert (tmp_path / "drain.svg").exists()
    assert "StubBroker" in (tmp_path / "results.md").read_text()
