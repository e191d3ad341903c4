"""How a run is judged and shown."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree

from benchmarks import contenders, floors, plots, report
from benchmarks.measurements.drain import Drain
from benchmarks.run import Outcome, Row, Run


def _run(rates: Mapping[str, list[float]]) -> Run:
    rows = [
        Row(contenders.find(name), "", {"per_second": values} if values else {})
        for name, values in rates.items()
    ]
    for row in rows:
        row.failed = "" if row.values else "no server"
    versions = {name: {"dramatiq": "2.2.1"} for name in rates}
    return Run([row.contender for row in rows], {}, versions, [Outcome(Drain(), rows)])


def test_floors_compare_medians() -> None:
    """A floor divides our median by the peer's; what was not measured is not judged."""
    run = _run({"jetstream": [900, 1000, 5000], "dramatiq-rabbitmq": [500, 390, 400]})
    (verdict,) = floors.judge(run.outcomes)
    assert (verdict.measured, verdict.reached) == (2.5, True)


def test_a_missed_floor_is_said() -> None:
    """Below its floor a figure is not reached."""
    run = _run({"jetstream": [1000], "dramatiq-rabbitmq": [401]})
    assert [verdict.reached for verdict in floors.judge(run.outcomes)] == [False]


def test_failed_contenders_keep_their_row() -> None:
    """A contender that could not be measured stays in the tables with its reason, and out of the plots."""
    run = _run({"jetstream": [1000], "dramatiq-rabbitmq": []})
    assert "| Dramatiq / RabbitMQ | no server |" in report.as_markdown(run, "today")
    drawing = plots.chart(run.outcomes[0], Drain.figures[0], "today")
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert "RabbitMQ" not in drawing
