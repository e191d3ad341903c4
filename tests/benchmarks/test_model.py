"""The bounds that are worked out of measured rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model


def _results(
    rows: dict[tuple[str, str, str], dict[str, float]], processor: str = "any", day: str = "2026-11-29"
) -> dict[str, Any]:
    """What a run writes, with two cores and one repetition."""
    return {
        "at": f"{day}T12:00:00+00:00",
        "machine": {"processor": processor, "cores": 2},
        "measurements": [
            {
                "name": name,
                "rows": [
                    {
                        "contender": contender,
                        "case": case,
                        "figures": {key: {"values": [value]} for key, value in figures.items()},
                    }
                ],
            }
            for (name, contender, case), figures in rows.items()
        ],
    }


ENQUEUE = {
    ("enqueue", "jetstream", "1 thread"): {"per_second": 2_000.0},
    ("enqueue", "jetstream-1s", "1 thread"): {"per_second": 4_000.0},
}


@pytest.fixture
def read(tmp_path: Path):
    """Writes results into files and reads them."""

    def load(*results: dict[str, Any]) -> list[model.Machine]:
        files = []
        for number, one in enumerate(results):
            files.append(tmp_path / f"{number}.json")
            files[-1].write_text(json.dumps(one))
        return model.load(files)

    return load


def test_an_fsync_is_what_always_takes_longer(read) -> None:
    """Half a millisecond for a message with it and a quarter without: the rest is the fsync."""
    (machine,) = read(_results(ENQUEUE))
    assert machine.fsync_seconds == pytest.approx(0.000_25)
    assert [bound.per_second for bound in machine.fsyncs(2, streams=3)] == pytest.approx([6_000])


def test_the_lowest_bound_is_compared(read) -> None:
    """An fsync of 0.25 ms allows 4,000 a second, 400 µs of two cores 5,000, and 150 µs of one client 6,667."""
    cpu = {"driver_cpu_us": 150.0, "server_cpu_us": 200.0, "worker_cpu_us": 50.0}
    (machine,) = read(_results({**ENQUEUE, ("sustained", "jetstream", ""): {"per_second": 3_000.0, **cpu}}))
    (found,) = model.predictions(machine)
    assert {round(bound.per_second) for bound in found.bounds} == {4_000, 5_000, 6_667}
    assert found.bound.per_second == pytest.approx(4_000)
    assert found.share == pytest.approx(0.75)


def test_thirty_streams_meet_the_processors_first(read) -> None:
    """What waits for its own fsync does not wait for another stream's; the processors are everybody's."""
    cpu = {"driver_cpu_us": 100.0, "server_cpu_us": 200.0, "worker_cpu_us": 50.0}
    (machine,) = read(_results({**ENQUEUE, ("sustained", "jetstream", ""): {"per_second": 1_500.0, **cpu}}))
    one, thirty, estimate = model.capacities(machine)
    assert (one.bound.per_second, thirty.bound.per_second) == pytest.approx((4_000, 10_000))
    assert estimate.bound.per_second == thirty.bound.per_second
    assert thirty.cores_elsewhere == pytest.approx(1.5)


def test_what_was_not_measured_is_left_out(read) -> None:
    """A row without its figures is no prediction, and neither machines nor days are mixed."""
    first, second, third = read(
        _results(ENQUEUE), _results({}, processor="other"), _results({}, day="2026-11-30")
    )
    assert third.fsync_seconds is None
    assert model.predictions(first) == model.predictions(second) == []
    assert model.capacities(first) == []
    assert second.fsync_seconds is None


def test_repetitions_of_several_files_are_taken_together(read) -> None:
    """The median of all of them counts."""
    rates = [
        {("drain", "jetstream", ""): {"per_second": rate, "worker_cpu_us": 40.0}} for rate in (1.0, 5.0, 4.0)
    ]
    (machine,) = read(*map(_results, rates))
    (found,) = model.predictions(machine)
    assert found.measured == 4.0


def test_the_command_reads_the_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a table for each kind of processor, from the files that are in the repository."""
    model.main([])
    printed = capsys.readouterr().out
    assert "an fsync takes" in printed
    assert "drain until settled, always" in printed
