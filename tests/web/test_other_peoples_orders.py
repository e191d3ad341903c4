"""No caller ever sees another's order or webhook: many callers, every route that there is, in any order."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks.settings import Settings
from tests.web.closed import Closed, closed_service
from tests.web.stack import order_body
from web import create_app
from web.openapi import document

CUSTOMERS = ("alice", "bob", "carol")
#: Who may see which customers' orders.
SEES = {
    "alice": {"alice"},
    "alice's token": {"alice"},
    "bob": {"bob"},
    "carol's token": {"carol"},
    "shop": set(),
    None: set(),
    "reader": set(CUSTOMERS),
    "operator": set(CUSTOMERS),
    "operator's token": set(CUSTOMERS),
}
CALLERS = st.sampled_from(sorted(SEES, key=str))

RULES = list(create_app(Settings(access="open", host="127.0.0.1")).url_map.iter_rules())
ROUTES = [
    (
        rule.rule.replace("<path:order_id>", "{order_id}"),
        sorted((rule.methods or set()) - {"OPTIONS", "HEAD"}),
    )
    for rule in RULES
    if rule.arguments <= {"order_id"}
]
#: Who may have webhooks, and whose: None stands for an operator's, which operators share.
OWNERS: dict[str | None, str | None] = {
    "alice": "alice",
    "alice's token": "alice",
    "bob": "bob",
    "carol's token": "carol",
    "operator": None,
    "operator's token": None,
}
OF_ONE_WEBHOOK = [
    (re.sub(r"<(\w+)>", r"{\1}", rule.rule), method)
    for rule in RULES
    if "webhook_id" in rule.arguments
    for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"})
]
OF_ONE_ORDER = [route for route in ROUTES if "{" in route[0]]
LISTS = ("/api/orders", "/api/orders.csv", "/api/orders.ndjson", "/orders")
OF_MANY = [path for path, methods in ROUTES if "{" not in path and "GET" in methods]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    with closed_service(
        tmp_path_factory.mktemp("many"), RATE_LIMIT="1000000", STREAM_DURATION="1000"
    ) as closed:
        closed.keys |= {
            "alice's token": closed.provider.token(sub="alice"),
            "carol's token": closed.provider.token(sub="carol"),
            "operator's token": closed.provider.token(sub="o-1", realm_access={"roles": ["operate"]}),
        }
        yield closed


class Callers(RuleBasedStateMachine):
    """Callers who order, look and guess; `closed` is set by the test."""

    closed: Closed

    @initialize()
    def begin(self) -> None:
        self.run = secrets.token_hex(3)
        # What belongs to whom: ids of orders that this run has placed.
        self.orders: dict[str, str] = {}
        # The same of webhooks, each with a text that its address alone has.
        self.webhooks: dict[str, tuple[str | None, str]] = {}
        self.cursors: list[str] = []
        self.answers: list[tuple[str | None, str, str, str | None, requests.Response]] = []

    def ask(self, who: str | None, method: str, path: str, asked: str | None = None, **options: Any) -> Any:
        answer = self.closed.ask(who, method, path, **options)
        assert answer.status_code < 500 or answer.status_code == 503, (who, method, path, answer.text)
        self.answers.append((who, method, path, asked, answer))
        return answer

    @rule(
        who=CALLERS,
        customer=st.sampled_from(CUSTOMERS),
        key=st.integers(0, 2),
        name=st.integers(0, 3),
        kind=st.integers(0, 2),
    )
    def order(self, who: str | None, customer: str, key: int, name: int, kind: int) -> None:
        """Order for a customer, under keys and ids that others use too."""
        headers = {"Idempotency-Key": f"{self.run}-{key}"} if key else {}
        if kind == 0:
            answer = self.ask(
                who, "POST", "/api/orders", json=order_body(customer_id=customer), headers=headers
            )
        elif kind == 1:
            event = OrderCreated(
                order_id=f"{self.run}-{name}" if name else "",
                customer_id=customer,
                items=[OrderItem(sku="MUG-01", quantity=1)],
            )
            headers["Content-Type"] = "application/x-protobuf"
            answer = self.ask(
                who,
                "POST",
                "/api/orders",
                event.order_id or None,
                data=event.SerializeToString(),
                headers=headers,
            )
        else:
            form = {
                "customer_id": customer,
                "quantity-MUG-01": "1",
                "submission": f"{self.run}-submission-{key}",
            }
            self.ask(who, "POST", "/orders", data=form)
            return
        if answer.status_code == 202:
            body = answer.json()
            known = self.orders.setdefault(body["order_id"], body["customer_id"])
            assert known == body["customer_id"] == customer
            assert customer in SEES[who] or who == "shop"
        elif answer.status_code == 403:
            assert customer not in SEES[who] or who == "reader"

    @rule(who=CALLERS, data=st.data())
    def look_at_one(self, who: str | None, data: st.DataObject) -> None:
        """Ask for another customer's order, in each way that there is."""
        if not self.orders:
            return
        order_id = data.draw(st.sampled_from(sorted(self.orders)))
        path, methods = data.draw(st.sampled_from(OF_ONE_ORDER))
        answer = self.ask(who, methods[0], path.format(order_id=order_id), order_id)
        if self.orders[order_id] not in SEES[who]:
            # Nothing tells it from an order that does not exist.
            other = self.ask(who, methods[0], path.format(order_id=f"none-{self.run}"))
            assert answer.status_code == other.status_code, (who, path, answer.status_code)
            assert answer.status_code in ((401,) if who is None else (403, 404)), (who, path)
        elif methods == ["GET"]:
            assert answer.status_code == 200, (who, path, answer.text)

    @rule(who=CALLERS, data=st.data())
    def look_at_many(self, who: str | None, data: st.DataObject) -> None:
        """Ask for a list or page, also with the cursor of another caller's list."""
        path = data.draw(st.sampled_from(OF_MANY))
        before = data.draw(st.sampled_from([None, *self.cursors]))
        params = {"limit": data.draw(st.integers(1, 5)), **({} if before is None else {"before": before})}
        if data.draw(st.booleans()):
            params["customer"] = data.draw(st.sampled_from(CUSTOMERS))
        answer = self.ask(who, "GET", path, params=params if path in LISTS else {})
        if path == "/api/orders" and answer.status_code == 200 and answer.json()["next"]:
            self.cursors.append(answer.json()["next"])

    @rule(who=CALLERS)
    def make_webhook(self, who: str | None) -> None:
        """Have events sent to an address, which no event ever fits."""
        mark = secrets.token_hex(8)
        body = {"url": f"https://{mark}.example/", "events": ["order.failed"]}
        answer = self.ask(who, "POST", "/api/webhooks", json=body)
        if who not in OWNERS:
            assert answer.status_code == (401 if who is None else 403)
        elif answer.status_code != 409:  # there are as many as can be
            assert answer.status_code == 201, answer.text
            assert answer.json()["customer_id"] == OWNERS[who]
            self.webhooks[answer.json()["id"]] = OWNERS[who], mark

    @rule(who=CALLERS, which=st.integers(0, 9), route=st.sampled_from(OF_ONE_WEBHOOK))
    def act_on_a_webhook(self, who: str | None, which: int, route: tuple[str, str]) -> None:
        """Look at a webhook, change it or remove it, in each way that there is."""
        if not self.webhooks:
            return
        webhook_id = list(self.webhooks)[which % len(self.webhooks)]
        path, method = route
        path = path.format(webhook_id=webhook_id, delivery_id=f"msg_{'0' * 40}")
        options: dict[str, Any] = {"json": {"description": "mine"}} if method == "PATCH" else {}
        answer = self.ask(who, method, path, **options)
        if not self.may_see(who, webhook_id):
            assert answer.status_code == (401 if who is None else 404 if who in OWNERS else 403), (who, path)
            assert "secret" not in answer.text

    def may_see(self, who: str | None, webhook_id: str) -> bool:
        """Whether a caller may see a webhook: its owner, and operators."""
        return who in OWNERS and OWNERS[who] in (None, self.webhooks[webhook_id][0])

    @invariant()
    def nobody_sees_what_is_not_theirs(self) -> None:
        """No answer names an order, or a customer, that its caller may not see, unless the caller named it."""
        for who, method, path, asked, answer in self.answers:
            text = answer.text + str(answer.headers)
            for order_id, customer in self.orders.items():
                if customer not in SEES[who] and order_id != asked:
                    placed = who == "shop" and method == "POST" and answer.status_code in (202, 303)
                    assert placed or order_id not in text, (
                        f"{who} saw {order_id} of {customer} at {method} {path}"
                    )
            for webhook_id, (_, mark) in self.webhooks.items():
                assert mark not in text or self.may_see(who, webhook_id), f"{who} saw a webhook at {path}"
            if method == "GET":
                for customer in set(CUSTOMERS) - SEES[who]:
                    assert f'"{customer}"' not in text, f"{who} saw {customer} at {path}"
                    assert f">{customer}<" not in text, f"{who} saw {customer} at {path}"
        self.answers.clear()


@pytest.mark.timeout(600)  # hundreds of requests, one after the other
def test_no_caller_sees_anothers_order(closed: Closed) -> None:
    """Whatever is asked, by whom and after what, each answer has only what its caller may see."""
    machine = type("Callers", (Callers,), {"closed": closed})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=30,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("who", ["alice", "shop", None], ids=str)
def test_generated_requests_show_nobody_elses_order(closed: Closed, who: str | None) -> None:
    """Requests made from the description, fit and unfit, never have another customer's order in their answers."""
    secret = f"bob-only-{secrets.token_hex(4)}"
    hidden = closed.order("operator", secret).json()["order_id"]
    description = schemathesis.openapi.from_url(f"{closed.stack.url}/openapi.json")
    headers = {} if who is None else {"Authorization": f"Bearer {closed.keys[who]}"}
    for path, methods in document()["paths"].items():
        for method in methods:
            # Who shows nothing is answered before anything else is looked at.
            examples = 3 if who is None else 10
            check_operation(description[path][method.upper()], headers, secret, hidden, examples)


def check_operation(operation: Any, headers: dict[str, str], secret: str, hidden: str, examples: int) -> None:
    """Ask an operation in many ways, also for the hidden order itself."""
    has_id = "{order_id}" in operation.path

    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), named=st.booleans())
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def shows_nothing(case: schemathesis.Case, named: bool) -> None:
        if has_id and named:
            case.path_parameters = {"order_id": hidden}
        answer = case.call(headers=headers, timeout=20)
        case.validate_response(answer, checks=[not_a_server_error])
        assert secret not in answer.text
        assert hidden not in answer.text or (has_id and named and answer.status_code in (401, 404))

    shows_nothing()
