"""Every request and every step of an order is seen: one line each, counted, and what watches it names what exists."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, WORKER_READY, Process, supervised_workers
from tests.web.stack import Stack

GRAFANA = REPOSITORY / "deploy" / "grafana"
RUNBOOK = (REPOSITORY / "docs" / "operations.md").read_text()


class Watched:
    """A service with JSON logs whose workers are scraped as well."""

    def __init__(self, shop: Stack, workers: Process, port: int) -> None:
        self.shop = shop
        self.workers = workers
        self.port = port

    def scrape(self) -> dict[str, Metric]:
        """Return all metrics by name, the samples of `web` and of the workers together."""
        found: dict[str, Metric] = {}
        for text in (
            self.shop.get("/metrics").text,
            requests.get(f"http://127.0.0.1:{self.port}/metrics", timeout=20).text,
        ):
            for family in text_string_to_metric_families(text):
                found.setdefault(family.name, family).samples.extend(
                    family.samples if family.name in found and found[family.name] is not family else []
                )
        return found

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        return sum(
            sample.value
            for family in self.scrape().values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("watched")
    port = free_port()
    env = {"LOG_FORMAT": "json", "RETRY_LIMIT": "1"}
    with Stack(directory, workers=False, web_processes=2, env=env) as shop:
        workers = supervised_workers(
            "tasks",
            log=directory / "workers.log",
            arguments=["--http", f"127.0.0.1:{port}"],
            env=shop.environment,
        )
        with workers:
            workers.wait_for_output(WORKER_READY, timeout=60)
            yield Watched(shop, workers, port)


def lines(process: Process, **fields: Any) -> list[dict[str, Any]]:
    """Return the JSON lines of a process that have these fields."""
    found = []
    for line in process.output.splitlines():
        start = line.find("{")
        try:
            read = json.loads(line[start:]) if start >= 0 else {}
        except ValueError:
            continue
        if fields.items() <= read.items():
            found.append(read)
    return found


def test_an_order_is_one_line_for_its_request_and_one_for_each_step(watched: Watched) -> None:
    """Each has the order, the request and how long it took; a step also its event and what came of it."""
    sent = {"X-Request-Id": "req-17.a"}
    body = {"customer_id": "c-1", "items": [{"sku": "MUG-01", "quantity": 1}]}
    answer = watched.shop.post("/api/orders", json=body, headers=sent)
    assert answer.headers["X-Request-Id"] == "req-17.a"
    order_id = answer.json()["order_id"]
    watched.shop.final(order_id, timeout=60)
    (asked,) = eventually(lambda: lines(watched.shop.web, request_id="req-17.a"), timeout=30)
    assert {name: asked[name] for name in ("level", "order_id", "method", "route", "status")} == {
        "level": "INFO",
        "order_id": order_id,
        "method": "POST",
        "route": "/api/orders",
        "status": 202,
    }
    assert isinstance(asked["milliseconds"], int)
    steps = eventually(
        lambda: len(found := lines(watched.workers, logger="tasks.steps", order_id=order_id)) == 2 and found,
        timeout=30,
    )
    assert sorted((step["event"], step["outcome"]) for step in steps) == [
        ("created", "held"),
        ("reserved", "confirmed"),
    ]
    for step in steps:
        assert (step["level"], step["request_id"]) == ("INFO", "req-17.a")
        assert isinstance(step["milliseconds"], int)


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "{}", "a\u00e9"])
def test_an_id_that_is_none_is_replaced(watched: Watched, given: str) -> None:
    """No client chooses what stands in the log, and two requests never share an id by accident."""
    headers = {"X-Request-Id": given.encode("latin-1")}
    ids = [watched.shop.get("/api/products", headers=headers).headers["X-Request-Id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    assert len(set(ids)) == 2


def test_requests_are_counted_by_route(watched: Watched) -> None:
    """With what is refused, and by the route rather than the address, in all processes together."""
    before = watched.value("http_requests_total", route="/api/orders/<path:order_id>", status="404")
    for number in range(20):
        with requests.Session() as session:  # a connection of its own, to any of the processes
            session.get(f"{watched.shop.url}/api/orders/none-{number}", timeout=20)
    counted = watched.value("http_requests_total", route="/api/orders/<path:order_id>", status="404")
    assert counted == before + 20
    assert watched.value("http_request_duration_seconds_count", route="/api/orders/<path:order_id>") >= 20
    watched.shop.get("/nothing-here")
    assert watched.value("http_requests_total", route="none", status="404") >= 1
    requests.request("BREW", f"{watched.shop.url}/", timeout=20)
    assert watched.value("http_requests_total", method="BREW") == 0


def test_orders_are_counted_once_by_their_outcome(watched: Watched) -> None:
    """With the seconds that they took; projections may run twice."""

    for token in ("tok_ok", "tok_declined"):
        watched.shop.final(watched.shop.order(payment_token=token)["order_id"], timeout=60)
    orders = watched.shop.get("/api/orders?limit=100").json()["orders"]
    shown = Counter(order["status"] for order in orders)
    for outcome in ("confirmed", "rejected"):
        for name in ("order_duration_seconds_count", "order_duration_seconds_bucket"):
            labels = {"outcome": outcome} | ({"le": "+Inf"} if name.endswith("bucket") else {})
            eventually(
                lambda name=name, labels=labels: watched.value(name, **labels) == shown[labels["outcome"]],
                timeout=30,
            )


def test_orders_that_are_not_final_are_seen(watched: Watched) -> None:
    """By status, with the age of the oldest; a step that was given up leaves a failed one."""
    watched.shop.knobs(failure_rate=1.0)
    order_id = watched.shop.order()["order_id"]
    # First, because it is taken to be away for a while only when it is not asked again.
    eventually(lambda: watched.value("payment_gateway_away") == 1, timeout=60)
    eventually(lambda: watched.value("orders_unfinished", status="failed") == 1, timeout=60)
    eventually(lambda: watched.value("orders_oldest_unfinished_seconds", status="failed") > 0, timeout=30)
    refused = lines(watched.workers, logger="tasks.steps", order_id=order_id, outcome="error")
    assert [one["event"] for one in refused] == ["reserved"] * len(refused)
    watched.shop.knobs(failure_rate=0.0)
    watched.shop.final(watched.shop.order()["order_id"], timeout=60)
    eventually(lambda: watched.value("payment_gateway_away") == 0, timeout=30)


def boards() -> list[Path]:
    return sorted(GRAFANA.glob("*.json"))


def rules() -> list[Path]:
    return sorted(GRAFANA.glob("*.rules.yml"))


def queries(path: Path) -> list[str]:
    """Return the queries of a board, or of rules."""
    if path.suffix == ".json":
        panels = json.loads(path.read_text())["panels"]
        return [target["expr"] for panel in panels for target in panel.get("targets", ())]
    groups = yaml.safe_load(path.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


#: What PromQL itself has names for, in these queries.
_WORDS = {"sum", "max", "min", "rate", "increase", "histogram_quantile", "and", "or"}


def names_in(query: str) -> set[str]:
    """Return the metrics that a query names."""
    bare = re.sub(r"""\{[^}]*\}|\[[^\]]*\]|by *\([^)]*\)""", " ", query)
    return set(re.findall(r"[a-z_:][a-zA-Z0-9_:]*", bare)) - _WORDS


def test_what_is_watched_exists(watched: Watched) -> None:
    """Every query of the orders' board and rules names metrics, labels and values that a live service shows."""
    watched.shop.final(watched.shop.order()["order_id"], timeout=60)
    eventually(lambda: watched.value("order_duration_seconds_count", outcome="confirmed") >= 1, timeout=30)
    recorded = {
        rule["record"]
        for path in rules()
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    families = watched.scrape()
    samples = [sample for family in families.values() for sample in family.samples]
    # A gauge without a value now, such as the age of what waits, has a family alone.
    shown = {sample.name for sample in samples} | families.keys()
    for path in [*boards(), *rules()]:
        assert queries(path)
        for query in queries(path):
            named = names_in(query)
            assert named, query
            assert named <= shown | recorded, f"{path.name}: {named - shown - recorded} in {query}"
            for name, selector in re.findall(r"([a-z_]+)\{([^}]*)\}", query):
                wanted = dict(re.findall(r'(\w+)="([^"]*)"', selector))
                assert any(s.name == name and wanted.keys() <= s.labels.keys() for s in samples), query
                if name.endswith("_bucket"):
                    assert any(s.name == name and wanted.items() <= s.labels.items() for s in samples), query


@pytest.mark.parametrize("path", rules(), ids=lambda path: path.name)
def test_every_alert_leads_to_its_page(path: Path) -> None:
    """Each names a section of the runbook that exists, and says in one sentence what is wrong."""
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in RUNBOOK.splitlines()
        if line.startswith("#")
    }
    for group in yaml.safe_load(path.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                page, _, section = rule["annotations"]["runbook"].partition("#")
                assert (REPOSITORY / page).exists()
                if page == "docs/operations.md":
                    assert section in headings, section
                assert rule["annotations"]["summary"].endswith(".")
