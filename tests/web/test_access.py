"""Who may do what: keys, tokens, sessions; a customer sees, orders and follows for itself alone."""

from __future__ import annotations

import base64
import hmac
import json
import re
import secrets
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from joserfc.jwk import RSAKey

from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks.settings import Settings
from tests.support.polling import eventually
from tests.support.processes import Process
from tests.support.provider import CLIENT_ID, Provider
from tests.web.closed import PAGE, Closed, closed_service
from tests.web.stack import Stack, gunicorn, order_body
from web import create_app

LOOPBACK = Settings(access="open", host="127.0.0.1")
PASSWORD = "correct horse battery staple"
# Of a browser that is shown the pages by a proxy with TLS, as every deployment has one.
SAME_SITE = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    with closed_service(tmp_path_factory.mktemp("closed")) as closed:
        yield closed


def test_every_route_says_what_it_needs() -> None:
    """Each view is declared, and only these answer strangers."""
    app = create_app(LOOPBACK)
    strangers = set()
    for rule in app.url_map.iter_rules():
        declared = getattr(app.view_functions[rule.endpoint], "needed_scopes", None)
        assert declared is not None, rule
        if not declared:
            strangers.add(rule.rule)
    assert strangers == {
        "/static/<path:filename>",
        *("/health", "/health/live", "/health/ready"),
        *("/docs", "/openapi.json"),
        "/api/payments/events",  # the gateway signs them
        *("/sign-in", "/sign-in/provider", "/sign-in/callback", "/sign-out"),
    }


def test_an_undeclared_route_keeps_the_application_from_starting() -> None:
    """A view that was forgotten is found at once, not by a stranger."""
    from flask import Flask

    from web.access import enforce

    app = Flask("forgetful")
    app.add_url_rule("/secrets", "secrets", lambda: "")
    with pytest.raises(RuntimeError, match="secrets"):
        enforce(app)


def test_strangers_get_nothing(closed: Closed) -> None:
    """Without a key or a session each route that needs a scope is refused: 401 for programs, the form for people."""
    app = create_app(LOOPBACK)
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        if not view.needed_scopes:  # type: ignore[attr-defined]
            continue
        path = re.sub("<[^>]*>", "some-order", rule.rule)
        for method in (rule.methods or set()) - {"OPTIONS"}:
            answer = closed.ask(None, method, path)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    answer = closed.get(None, "/orders?before=9", headers=PAGE)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/sign-in?next=%2Forders%3Fbefore%3D9")


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        f"Bearer ord_{'0' * 12}_{'a' * 43}",
        "Bearer a.b.c",
        "Bearer ..",
        "x" * 4_000,
    ],
)
def test_what_is_shown_and_not_valid_is_an_error(closed: Closed, header: str) -> None:
    """A bad credential is 401 wherever one is needed; it is never as good as none at all."""
    answer = requests.get(f"{closed.stack.url}/api/products", headers={"Authorization": header}, timeout=10)
    assert answer.status_code == 401
    assert (
        requests.get(f"{closed.stack.url}/health", headers={"Authorization": header}, timeout=10).status_code
        == 200
    )


def test_a_customer_sees_its_own_orders_alone(closed: Closed) -> None:
    """Lists, pages, live state and streams: another customer's order is one that does not exist."""
    order_id = closed.order("alice", "alice").json()["order_id"]
    missing = str(uuid.uuid4())
    for path in ("/api/orders/{}", "/orders/{}", "/orders/{}/state", "/orders/{}/stream"):
        assert closed.get("alice", path.format(order_id), stream=True).status_code == 200, path
        foreign, none = (closed.get("bob", path.format(one)) for one in (order_id, missing))
        assert foreign.status_code == none.status_code == 404
        assert foreign.text.replace(order_id, "") == none.text.replace(missing, "")
    for path in ("/api/orders?limit=100", "/orders", "/recent-orders", "/"):
        assert order_id in closed.get("alice", path).text, path
        assert order_id not in closed.get("bob", path).text, path
        if path != "/":
            assert order_id in closed.get("reader", path).text


def test_a_customer_orders_for_itself_alone(closed: Closed) -> None:
    """An order in another's name is refused; a program that acts for all may order for any."""
    assert closed.order("alice", "bob").status_code == 403
    body = OrderCreated(customer_id="bob", items=[OrderItem(sku="MUG-01", quantity=1)]).SerializeToString()
    sent = {"Content-Type": "application/x-protobuf"}
    assert closed.ask("alice", "POST", "/api/orders", data=body, headers=sent).status_code == 403
    assert closed.ask("bob", "POST", "/api/orders", data=body, headers=sent).status_code == 202
    assert closed.order("shop", "bob").status_code == 202
    # On the form there is nothing to choose, and what is sent all the same does not count.
    data = {"customer_id": "bob", "quantity-MUG-01": "1", "submission": secrets.token_urlsafe(18)}
    answer = closed.ask("alice", "POST", "/orders", data=data)
    assert answer.status_code == 303
    assert closed.get("alice", f"/api{answer.headers['Location']}").json()["customer_id"] == "alice"


def test_scopes_are_what_a_key_may(closed: Closed) -> None:
    """Ordering, reading and operating are apart; metrics and the detail of health need a scope."""
    order_id = closed.order("shop", "carol").json()["order_id"]
    assert closed.get("shop", f"/api/orders/{order_id}").status_code == 404
    assert closed.get("shop", "/api/orders").status_code == 403
    assert closed.get("reader", f"/api/orders/{order_id}").status_code == 200
    assert closed.order("reader", "carol").status_code == 403
    assert closed.get("alice", "/metrics").status_code == 403
    assert "dramatiq" in closed.get("reader", "/metrics").text
    for who, known in (
        (None, {"status"}),
        ("alice", {"status"}),
        ("operator", {"status", "stopping", "nats"}),
    ):
        for path in ("/health", "/health/ready"):
            assert closed.get(who, path).json().keys() == known


def test_an_operator_says_why_an_order_is_cancelled(closed: Closed) -> None:
    """Its customer need not."""
    mine, theirs = (closed.order("alice", "alice").json()["order_id"] for _ in range(2))
    address = f"/api/orders/{theirs}/cancel"
    assert (
        'name="reason" maxlength="200" autocomplete="off" required'
        in closed.get("operator", f"/orders/{theirs}").text
    )
    for refused in (
        closed.ask("operator", "POST", address),
        closed.ask("operator", "POST", address, json={"reason": " "}),
        closed.ask("operator", "POST", f"/orders/{theirs}/cancel", data={"reason": ""}),
    ):
        assert (refused.status_code, "ay why you cancel another" in refused.text) == (400, True)
    history = closed.get("alice", f"/api/orders/{theirs}").json()["history"]
    assert "cancel_requested" not in [entry["event"] for entry in history]
    assert closed.ask("operator", "POST", address, json={"reason": "sold twice"}).status_code == 202
    assert closed.ask("alice", "POST", f"/api/orders/{mine}/cancel").status_code == 202


def test_one_who_acts_for_a_customer_sees_nothing_of_all_customers(closed: Closed) -> None:
    """Whatever a customer's key may, it opens no route that is not for those who order."""
    key = closed.key("all-that-a-customer-may", "--scope", "order", "--scope", "read", "--customer", "alice")
    assert closed.get(key, "/api/orders").status_code == 200
    app = create_app(LOOPBACK)
    for rule in app.url_map.iter_rules():
        scopes = app.view_functions[rule.endpoint].needed_scopes  # type: ignore[attr-defined]
        if not scopes or "order" in scopes:
            continue
        path = re.sub("<[^>]*>", "some-order", rule.rule)
        for method in (rule.methods or set()) - {"OPTIONS"}:
            assert closed.ask(key, method, path).status_code == 403, (method, path)
    assert closed.get("reader", "/metrics").status_code == 200


def test_idempotency_keys_belong_to_the_caller(closed: Closed) -> None:
    """Two callers with one key place two orders, and neither learns of the other's."""
    key = {"Idempotency-Key": "the same for all"}
    alice, bob, shop = (
        closed.order(who, customer, headers=key)
        for who, customer in (("alice", "alice"), ("bob", "bob"), ("shop", "alice"))
    )
    assert [answer.status_code for answer in (alice, bob, shop)] == [202, 202, 202]
    assert len({answer.json()["order_id"] for answer in (alice, bob, shop)}) == 3
    again = closed.order("alice", "alice", headers=key)
    assert again.json()["order_id"] == alice.json()["order_id"]
    assert again.headers["Idempotency-Replayed"] == "true"


def test_a_renewed_key_keeps_its_idempotency_keys(closed: Closed) -> None:
    """A customer's next key, and their token, repeat what was ordered with the one before."""
    sent = {"Idempotency-Key": "kept over a renewal"}
    first = closed.order("alice", "alice", headers=sent).json()["order_id"]
    renewed = closed.key("alice-shop-2", "--scope", "order", "--customer", "alice")
    token = closed.provider.token(sub="alice")
    for who in (renewed, token):
        assert closed.order(who, "alice", headers=sent).json()["order_id"] == first


def test_keys_are_made_listed_and_revoked(closed: Closed) -> None:
    """The list shows use and end of a key but never its text; a revoked one is refused within seconds."""
    text = closed.key("temporary", "--scope", "read", "--days", "3")
    key_id = text.split("_")[1]
    assert closed.get(text, "/api/orders").status_code == 200
    listed = next(line for line in closed.run("keys", "list").stdout.splitlines() if key_id in line)
    assert "temporary" in listed
    assert "valid until" in listed
    assert "never" not in listed
    everything = closed.run("keys", "list", "--json").stdout
    assert text.split("_", 2)[2] not in everything
    assert closed.run("keys", "revoke", key_id).returncode == 0
    eventually(lambda: closed.get(text, "/api/orders").status_code == 401)
    assert "revoked" in next(
        line for line in closed.run("keys", "list").stdout.splitlines() if key_id in line
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("revoke", "nothing"),
        ("add", "x", "--scope", "operate", "--customer", "c"),
        ("add", "a b", "--scope", "read"),
    ],
)
def test_what_is_wrong_with_a_key_is_one_sentence(closed: Closed, arguments: tuple[str, ...]) -> None:
    """The command says what is wrong and ends with 1."""
    done = closed.run("keys", *arguments)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr


def test_a_secret_is_nowhere_in_the_store(closed: Closed) -> None:
    """Neither a key's secret nor a password lies in any file of the server."""
    closed.run("operators", "set", "hidden", stdin=f"{PASSWORD} hidden\n")
    searched = [
        f"{PASSWORD} hidden".encode(),
        *(text.split("_", 2)[2].encode() for text in closed.keys.values()),
    ]
    for path in closed.stack.directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in searched), path


def test_tokens_of_the_provider(closed: Closed) -> None:
    """A token's subject is a customer; one with a role of ours operates; roles do not come from the scopes."""
    alice = closed.provider.token(sub="alice")
    order_id = closed.order(alice, "alice").json()["order_id"]
    assert closed.get("bob", f"/api/orders/{order_id}").status_code == 404
    assert closed.get(closed.provider.token(sub="bob"), f"/api/orders/{order_id}").status_code == 404
    assert (
        closed.get(
            closed.provider.token(sub="bob", scope="read admin"), f"/api/orders/{order_id}"
        ).status_code
        == 404
    )
    roles = {"roles": ["staff", "operate"]}
    assert (
        closed.get(closed.provider.token(sub="o", realm_access=roles), f"/api/orders/{order_id}").status_code
        == 200
    )
    assert closed.order(closed.provider.token(sub="c" * 65), "c" * 65).status_code == 403


def base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def with_public_key(provider: Provider) -> str:
    """Return a token whose secret is the provider's public key, by hand: no library makes one any more."""
    head = base64url(json.dumps({"alg": "HS256", "kid": "first"}).encode())
    signed = f"{head}.{provider.token().split('.')[1]}"
    mac = hmac.new(provider.key.as_pem(private=False), signed.encode(), "sha256")
    return f"{signed}.{base64url(mac.digest())}"


FORGERIES: dict[str, Callable[[Provider], str]] = {
    "expired": lambda provider: provider.token(exp=1),
    "without an end": lambda provider: provider.token(exp=None),
    "not yet valid": lambda provider: provider.token(nbf=4_000_000_000),
    "for another program": lambda provider: provider.token(aud="another"),
    "for nobody": lambda provider: provider.token(aud=None),
    "of another issuer": lambda provider: provider.token(iss="https://elsewhere.example.com"),
    "of nobody": lambda provider: provider.token(sub=None),
    "of a number": lambda provider: provider.token(sub=42),
    "signed by another": lambda provider: provider.token(key=RSAKey.generate_key(2048)),
    "signed with the public key": lambda provider: with_public_key(provider),
    "an ID token of the pages": lambda provider: provider.token(aud=CLIENT_ID),
    "with another key named": lambda provider: provider.token(header={"kid": "second"}),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_tokens_are_refused(closed: Closed, forge: Callable[[Provider], str]) -> None:
    """Signature, algorithm, issuer, audience, time and subject are all checked."""
    answer = closed.get(forge(closed.provider), "/api/orders")
    assert answer.status_code == 401, answer.text
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


def test_an_unsigned_token_is_refused(closed: Closed) -> None:
    """The algorithm none is none."""
    head, body, _ = closed.provider.token().split(".")
    del head
    assert closed.get(f"eyJhbGciOiJub25lIn0.{body}.", "/api/orders").status_code == 401


def test_forgeries_do_not_have_keys_fetched(closed: Closed) -> None:
    """A flood of tokens with unknown keys fetches once a minute in each process."""
    closed.get(closed.provider.token(), "/api/orders")
    before = closed.provider.fetched
    for number in range(30):
        closed.get(closed.provider.token(header={"kid": f"k{number}"}), "/api/orders")
    assert closed.provider.fetched - before <= 2


def sign_in(
    closed: Closed, name: str, password: str, way_back: str = "/orders"
) -> tuple[requests.Session, Any]:
    browser = closed.browser()
    data = {"name": name, "password": password, "next": way_back}
    answer = browser.post(
        f"{closed.stack.url}/sign-in", data=data, headers=SAME_SITE, timeout=20, allow_redirects=False
    )
    return browser, answer


def test_an_operator_signs_in_with_a_password(closed: Closed) -> None:
    """The right password opens all orders; a wrong one, or a name that is none, the same refusal."""
    assert closed.run("operators", "set", "olga", stdin=f"{PASSWORD}\n").returncode == 0
    order_id = closed.order("alice", "alice").json()["order_id"]
    browser, answer = sign_in(closed, "olga", PASSWORD, f"/orders/{order_id}")
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/orders/{order_id}")
    cookie = answer.headers["Set-Cookie"]
    for attribute in ("__Host-session=", "Secure", "HttpOnly", "SameSite=Lax", "Path=/"):
        assert attribute in cookie
    assert "Domain" not in cookie
    page = browser.get(f"{closed.stack.url}/orders/{order_id}", timeout=20)
    assert (page.status_code, "olga" in page.text) == (200, True)
    refused = [sign_in(closed, name, "wrong password")[1] for name in ("olga", "nobody", "../x", "o" * 9_000)]
    assert {answer.status_code for answer in refused} == {401}
    assert not any("Set-Cookie" in answer.headers for answer in refused)


def test_a_session_ends(closed: Closed) -> None:
    """Signing out, a new password and removal each end it; a cookie that was changed was never one."""
    assert closed.run("operators", "set", "pavel", stdin=f"{PASSWORD}\n").returncode == 0
    orders = f"{closed.stack.url}/orders"

    def opens(browser: requests.Session) -> bool:
        return browser.get(orders, timeout=20, allow_redirects=False).status_code == 200

    browser, _ = sign_in(closed, "pavel", PASSWORD)
    assert opens(browser)
    browser.post(f"{closed.stack.url}/sign-out", headers=SAME_SITE, timeout=20)
    assert not opens(browser)
    browser, _ = sign_in(closed, "pavel", PASSWORD)
    (cookie,) = browser.cookies
    changed = closed.browser()
    changed.headers["Cookie"] = f"{cookie.name}={'A' if cookie.value[0] != 'A' else 'B'}{cookie.value[1:]}"
    assert not opens(changed)
    assert closed.run("operators", "set", "pavel", stdin=f"{PASSWORD} 2\n").returncode == 0
    eventually(lambda: not opens(browser))
    browser, answer = sign_in(closed, "pavel", f"{PASSWORD} 2")
    assert answer.status_code == 303
    assert closed.run("operators", "remove", "pavel").returncode == 0
    eventually(lambda: not opens(browser))


def test_a_foreign_site_can_do_nothing_with_a_session(closed: Closed) -> None:
    """A form of another site neither orders, nor signs in or out; not through the API either."""
    closed.run("operators", "set", "rita", stdin=f"{PASSWORD}\n")
    browser, _ = sign_in(closed, "rita", PASSWORD)
    data = {"customer_id": "x", "quantity-MUG-01": "1", "submission": secrets.token_urlsafe(18)}
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
    ):
        for path in ("/orders", "/api/orders", "/sign-in", "/sign-out"):
            answer = browser.post(closed.stack.url + path, data=data, headers=headers, timeout=20)
            assert answer.status_code == 403, (path, headers)
    assert browser.get(f"{closed.stack.url}/orders", timeout=20, allow_redirects=False).status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "/\t/evil.example",
        "javascript:alert(1)",
        "",
    ],
)
def test_signing_in_leads_nowhere_else(closed: Closed, address: str) -> None:
    """The way back is on this site, whatever the link said."""
    closed.run("operators", "set", "sven", stdin=f"{PASSWORD}\n")
    assert sign_in(closed, "sven", PASSWORD, address)[1].headers["Location"] == "/"


def with_provider(closed: Closed, **person: Any) -> tuple[requests.Session, requests.Response]:
    closed.provider.person = person
    browser = closed.browser()
    return browser, browser.get(f"{closed.stack.url}/sign-in/provider?next=/orders", timeout=20)


def test_people_sign_in_at_the_provider(closed: Closed) -> None:
    """The code flow ends on the page they wanted: a customer sees their own orders, an operator all."""
    order_id = closed.order("alice", "alice").json()["order_id"]
    browser, page = with_provider(closed, sub="alice", name="Alice")
    assert (page.status_code, page.url) == (200, f"{closed.stack.url}/orders")
    assert "Alice" in page.text
    assert order_id in page.text
    _, page = with_provider(closed, sub="bob")
    assert page.status_code == 200
    assert order_id not in page.text
    _, page = with_provider(closed, sub="o-1", realm_access={"roles": ["operate"]})
    assert order_id in page.text
    _, page = with_provider(closed, sub="d" * 100)
    assert page.status_code == 403
    del browser


def test_a_callback_that_nobody_asked_for_signs_nobody_in(closed: Closed) -> None:
    """Another person's code, or the same callback twice, opens nothing."""
    closed.provider.person = {"sub": "mallory"}
    attacker = closed.browser()
    away = attacker.get(f"{closed.stack.url}/sign-in/provider", timeout=20, allow_redirects=False)
    back = requests.get(away.headers["Location"], timeout=20, allow_redirects=False).headers["Location"]
    victim = closed.browser()
    assert victim.get(back, timeout=20, allow_redirects=False).status_code == 401
    assert attacker.get(back, timeout=20, allow_redirects=False).status_code == 303
    assert attacker.get(back, timeout=20, allow_redirects=False).status_code == 401


REFUSALS = {
    "no key for payment tokens": ({"SECRET_KEY": "k" * 32, "TOKEN_KEY": ""}, "TOKEN_KEY"),
    "a bad key for payment tokens": ({"SECRET_KEY": "k" * 32, "TOKEN_KEY": "secret"}, "TOKEN_KEY"),
    "the Procfile's defaults": ({}, "SECRET_KEY"),
    "loopback without being told": ({"HOST": "127.0.0.1"}, "SECRET_KEY"),
    "open to all": ({"ACCESS": "open", "HOST": "0.0.0.0"}, "ACCESS=open"),
    "open to all by default": ({"ACCESS": "open"}, "ACCESS=open"),
    "open on an address of the command line": (
        {"ACCESS": "open", "HOST": "127.0.0.1", "GUNICORN_CMD_ARGS": "--bind 0.0.0.0:8123"},
        "ACCESS=open",
    ),
    "a short secret": ({"SECRET_KEY": "short"}, "SECRET_KEY"),
    "a provider without a client": ({"OIDC_ISSUER": "https://login.example.com"}, "OIDC_CLIENT_ID"),
    "a provider without TLS": ({"OIDC_ISSUER": "http://login.example.com"}, "OIDC_ISSUER"),
}


@pytest.mark.parametrize(("env", "said"), REFUSALS.values(), ids=REFUSALS.keys())
def test_it_does_not_start_open_to_others(tmp_path: Path, env: dict[str, str], said: str) -> None:
    """Without a way to sign in the front end ends at once, with one sentence that says what to set."""
    process = Process(gunicorn(), log=tmp_path / "web.log", env=env).start()
    assert process.wait() != 0
    (line,) = [line for line in process.output.splitlines() if said in line]
    assert "Traceback" not in process.output
    assert line.count(". ") == 0
    assert "short" not in line or env.get("SECRET_KEY") != "short" or "'short'" not in line


def test_an_open_service_is_open_to_this_machine_alone(service: Stack) -> None:
    """A name of another site that leads here opens nothing, and every page says that the service is open."""
    for path in ("/", "/orders", "/docs", "/nothing-here"):
        assert "This service is open" in service.get(path, headers=PAGE).text
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1"):
        assert service.get("/api/orders", headers={"Host": host}).status_code == 401
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert service.get("/api/orders", headers={"Host": host}).status_code == 200
    # What a proxy on this machine passes on, for whom no one said that there is one.
    for header in ("X-Forwarded-For", "X-Forwarded-Proto", "Forwarded", "X-Real-IP"):
        proxied = {header: "192.0.2.7"}
        assert service.get("/api/orders", headers=proxied).status_code == 401, header
        assert service.get("/admin/fleet/", headers=proxied, allow_redirects=False).status_code == 303


def test_a_caller_who_asks_too_often_waits(tmp_path: Path) -> None:
    """Beyond the rate a customer gets 429 with the seconds to wait; others, and programs, are not affected."""
    env = {"ACCESS": "required", "SECRET_KEY": secrets.token_urlsafe(32), "RATE_LIMIT": "5"}
    with Stack(tmp_path, env=env, workers=False) as stack, Provider() as provider:
        closed = Closed(stack, provider)
        answers = [closed.order("alice", "alice") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [202] * 5 + [429]
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 15
        assert answers[-1].json()["type"] == "/docs#too-many-requests"
        assert closed.order("bob", "bob").status_code == 202
        assert {closed.order("shop", "alice").status_code for _ in range(10)} == {202}
        browser = closed.browser()
        guess = {"name": "olga", "password": "a guess"}
        guesses = list[int]()
        while 429 not in guesses and len(guesses) < 60:
            guesses.append(browser.post(f"{stack.url}/sign-in", data=guess, timeout=20).status_code)
        assert set(guesses[:-1]) == {401}
        assert len(guesses) > 20
        assert guesses[-1] == 429


def test_one_order_takes_no_more_than_one_order_may(closed: Closed) -> None:
    """The limit of pieces is the order's, over all its lines, in JSON and in protobuf."""
    lines = [("MUG-01", 500), ("MUG-01", 500), ("TEE-01", 1)]
    body = order_body(*lines, customer_id="alice")
    answer = closed.ask("alice", "POST", "/api/orders", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "items")
    event = OrderCreated(
        customer_id="alice", items=[OrderItem(sku=sku, quantity=count) for sku, count in lines]
    )
    headers = {"Content-Type": "application/x-protobuf"}
    sent = closed.ask("alice", "POST", "/api/orders", data=event.SerializeToString(), headers=headers)
    assert sent.status_code == 422
    assert (
        closed.ask(
            "alice", "POST", "/api/orders", json=order_body(*lines[:2], customer_id="alice")
        ).status_code
        == 202
    )


def test_administrators_manage_keys_on_a_page(closed: Closed) -> None:
    """They make a key that works, see it once, and revoke it; no other caller gets there."""
    assert closed.run("operators", "set", "ada", "--scope", "admin", stdin=f"{PASSWORD}\n").returncode == 0
    browser, _ = sign_in(closed, "ada", PASSWORD)
    url = f"{closed.stack.url}/admin/keys"
    data = {"name": "from-the-page", "scope": ["order"], "customer_id": "dora", "days": "30"}
    page = browser.post(url, data=data, headers=SAME_SITE, timeout=20)
    assert page.status_code == 201
    (text,) = re.findall(r"ord_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", page.text)
    assert closed.order(text, "dora").status_code == 202
    assert closed.order(text, "alice").status_code == 403
    listed = browser.get(url, timeout=20).text
    assert text not in listed
    assert "from-the-page" in listed
    wrong = browser.post(url, data={"name": "a b", "scope": ["order"]}, headers=SAME_SITE, timeout=20)
    assert (wrong.status_code, "A name has" in wrong.text) == (422, True)
    for days in ("99999", "-1", "000099999", "soon", "1.5"):
        lasting = {"name": "lasting", "scope": ["order"], "days": days}
        assert browser.post(url, data=lasting, headers=SAME_SITE, timeout=20).status_code == 422, days
    assert "lasting" not in browser.get(url, timeout=20).text
    key_id = text.split("_")[1]
    foreign = browser.post(f"{url}/{key_id}/revoke", headers={"Origin": "https://evil.example"}, timeout=20)
    assert foreign.status_code == 403
    assert browser.post(f"{url}/{key_id}/revoke", headers=SAME_SITE, timeout=20).status_code == 200
    eventually(lambda: closed.get(text, "/api/orders").status_code == 401)
    for who in ("alice", "operator", "reader"):
        assert closed.get(who, "/admin/keys").status_code == 403
        assert closed.ask(who, "POST", "/admin/keys", data=data).status_code == 403


def test_a_customer_need_not_say_who_orders(closed: Closed) -> None:
    """Who acts for one customer may leave the customer out, in JSON and in protobuf; who acts for all may not."""
    body = {"items": [{"sku": "MUG-01", "quantity": 1}]}
    assert closed.ask("alice", "POST", "/api/orders", json=body).json()["customer_id"] == "alice"
    assert closed.ask("shop", "POST", "/api/orders", json=body).status_code == 422
    assert closed.ask("alice", "POST", "/api/orders", json={**body, "customer_id": None}).status_code == 422
    event = OrderCreated(items=[OrderItem(sku="MUG-01", quantity=1)]).SerializeToString()
    sent = {"Content-Type": "application/x-protobuf"}
    answer = closed.ask("alice", "POST", "/api/orders", data=event, headers=sent)
    assert answer.json()["customer_id"] == "alice"


def test_the_page_of_the_api_can_be_tried_with_a_key(closed: Closed, service: Stack) -> None:
    """A service that asks who comes has a field for it there; an open one needs none."""
    assert 'id="key"' in closed.get(None, "/docs").text
    assert 'id="key"' not in service.get("/docs").text
