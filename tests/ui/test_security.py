"""What keeps the dashboard safe: who comes in, who may change what, and what a request must have to change anything."""

from __future__ import annotations

import base64
import html
import json
import re
from typing import Any

import dramatiq
import pytest
from dramatiq import Message
from werkzeug.test import Client, TestResponse

from dramatiq_jetstream import JetStreamBroker, audit
from dramatiq_jetstream.cli import main
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.sending.envelope import HISTORY_OPTION
from dramatiq_jetstream.ui import (
    PERMISSIONS,
    Passwords,
    Person,
    ProxyHeader,
    create_app,
    letter_changes,
    operator,
    viewer,
)

LOCAL = {"environ_base": {"REMOTE_ADDR": "127.0.0.1"}, "base_url": "http://127.0.0.1:8080"}

PAGES = (
    "/",
    "/workers",
    "/running",
    "/messages",
    "/messages/m-1",
    "/delayed",
    "/schedules",
    "/dead",
    "/limits",
    "/audit",
)

#: A change of each kind, with the permission that it needs.
CHANGES = {
    "/change/pause?queue=work": "pause",
    "/change/resume?queue=work": "pause",
    "/change/abort?message=m-1": "abort",
    "/change/cancel?queue=work&message=m-1": "cancel",
    "/change/run?queue=work&message=m-1": "run",
    "/change/run-schedule?queue=work&actor=tick": "schedule",
    "/change/pause-schedule?queue=work&actor=tick": "schedule",
    "/change/resume-schedule?queue=work&actor=tick": "schedule",
    "/change/remove-schedule?queue=work&actor=tick": "schedule",
    "/change/replay?all=1": "replay",
    "/change/drop?all=1": "drop",
}


@pytest.fixture
def shown(broker: JetStreamBroker) -> JetStreamBroker:
    """A broker with a queue, one ready message, one delayed message and two dead letters."""
    broker.declare_queue("work")
    broker.setup()
    broker.enqueue(Message("work", "act", (), {}, {}))
    broker.enqueue(Message("work", "act", (), {}, {}, message_id="m-1"), delay=3_600_000)
    for number in range(2):
        bury(broker, number)
    return broker


def bury(broker: JetStreamBroker, number: int, **said: Any) -> None:
    """Store a dead letter."""
    message: Message[Any] = Message("work", "act", (number,), {}, {})
    letter = {
        "queue": "work",
        "origin": f"o{number}",
        "subject": broker.names.task("work"),
        "data": message.encode(),
        "headers": {},
        "reason": "retries exhausted",
        "error": f"ValueError: number {number}",
        "deliveries": 1,
        "actor": "act",
        "message_id": message.message_id,
    }
    broker.dead_letters.store(**{**letter, **said})


def client(broker: JetStreamBroker, person: Person | None) -> Client:
    return Client(create_app(broker, access=lambda environ: person))


def confirmed(visitor: Client, path: str, **changed: str) -> TestResponse:
    """Open the page that confirms a change and send its form, with some fields changed."""
    page = visitor.get(path)
    assert page.status_code == 200, page.text
    form = {**form_of(page), **{name: [value] for name, value in changed.items()}}
    return visitor.post(path.partition("?")[0], data=form)


def form_of(page: TestResponse) -> dict[str, list[str]]:
    """The hidden fields of a form."""
    form: dict[str, list[str]] = {}
    for name, value in re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', page.text):
        form.setdefault(name, []).append(html.unescape(value))
    return form


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


# Who comes in


def test_without_access_this_machine_may_look_and_no_one_else(shown):
    """A loopback address and name are let in; another address, another name, and a proxy before it are not."""
    app = create_app(shown)
    assert Client(app).get("/", **LOCAL).status_code == 200
    elsewhere = [
        {"environ_base": {"REMOTE_ADDR": "192.0.2.7"}},
        {"base_url": "http://rebound.example:8080"},
        {"headers": {"X-Forwarded-For": "192.0.2.7"}},
        {"headers": {"Forwarded": "for=192.0.2.7"}},
        {"headers": {"X-Real-IP": "192.0.2.7"}},
        {"environ_base": {"REMOTE_ADDR": ""}},
    ]
    for odd in elsewhere:
        response = Client(app).get("/", **{**LOCAL, **odd})
        assert (response.status_code, "work" in response.text) == (403, False), odd
    for path in CHANGES:
        assert Client(app).get(path, **LOCAL).status_code == 403
    assert "Pause" not in Client(app).get("/", **LOCAL).text


def test_a_stranger_sees_nothing_and_changes_nothing(shown):
    """Every page and every change is refused before anything is read."""
    stranger = client(shown, None)
    for path in (*PAGES, "/dead/1", *CHANGES):
        response = stranger.get(path)
        assert (response.status_code, "ValueError" in response.text) == (403, False), path
    assert stranger.post("/change/pause", data={"queue": "work"}).status_code == 403
    assert not shown.is_paused("work")


def test_a_stranger_is_sent_to_the_hosts_own_page(shown):
    """With `sign_in` a stranger goes there, with the way back; what would change something is not sent on."""
    app = create_app(shown, access=lambda environ: None, sign_in="/sign-in")
    response = Client(app).get("/dead?queue=work", base_url="http://host/admin/fleet")
    assert response.status_code == 303
    assert response.location == "/sign-in?next=%2Fadmin%2Ffleet%2Fdead%3Fqueue%3Dwork"
    assert Client(app).post("/change/pause", data={"queue": "work"}).status_code == 403


def test_people_sign_in_with_passwords(shown, tmp_path):
    """The right password of the right person, from a file as `fleet ui-user` writes it; roles come with it."""
    kept = Passwords.hash("a long password")
    path = tmp_path / "users"
    path.write_text(f"# people\n\nann operator {kept}\nvic viewer {kept}\n")
    visitor = Client(create_app(shown, access=Passwords.read(path)))
    asked = visitor.get("/")
    assert asked.status_code == 401
    assert asked.headers["WWW-Authenticate"].startswith("Basic ")
    for name, password in (("ann", "wrong password"), ("eve", "a long password"), ("ann", ""), ("", "x")):
        assert visitor.get("/", headers=basic(name, password)).status_code == 401
    assert visitor.get("/", headers={"Authorization": "Basic !!"}).status_code == 401
    for _ in range(2):  # hashed, and remembered
        assert "Pause" in visitor.get("/", headers=basic("ann", "a long password")).text
    assert "Pause" not in visitor.get("/", headers=basic("vic", "a long password")).text


@pytest.mark.parametrize(
    "text",
    ["ann operator", "ann boss $argon2id$x", "ann operator plaintext-password", "# nobody\n", ""],
)
def test_a_file_of_users_that_cannot_be_used_is_refused(tmp_path, text):
    """Nothing is served with a file that would let no one, or everyone, in."""
    path = tmp_path / "users"
    path.write_text(text)
    with pytest.raises(InvalidOption):
        Passwords.read(path)
    with pytest.raises(InvalidOption):
        Passwords.hash("short")


def test_a_proxys_header_is_believed_from_the_proxy_alone(shown):
    """The header says who it is; from any other address it counts for nothing."""
    access = ProxyHeader("X-Forwarded-User", operators=["ann"], proxies=["10.0.0.0/8"])
    visitor = Client(create_app(shown, access=access))
    proxy = {"environ_base": {"REMOTE_ADDR": "10.1.2.3"}}
    assert "Pause" in visitor.get("/", headers={"X-Forwarded-User": "ann"}, **proxy).text
    page = visitor.get("/", headers={"X-Forwarded-User": "vic"}, **proxy)
    assert (page.status_code, "Pause" in page.text) == (200, False)
    assert visitor.get("/", **proxy).status_code == 403
    for other in ("127.0.0.1", "", "not an address"):
        spoofed = visitor.get("/", headers={"X-Forwarded-User": "ann"}, environ_base={"REMOTE_ADDR": other})
        assert spoofed.status_code == 403


def test_a_person_has_known_permissions_only():
    """A permission with a typing error would be one that is never granted."""
    assert operator("ann").may == PERMISSIONS
    assert viewer("vic").may == frozenset()
    with pytest.raises(InvalidOption):
        Person("ann", frozenset({"replai"}))


# Who may change what


@pytest.mark.parametrize("path", CHANGES)
def test_the_server_refuses_a_change_without_its_permission(shown, path):
    """A viewer, and an operator of everything else, is refused the form and the change, with a token or without."""
    permission = CHANGES[path]
    app_of = {
        person.name: client(shown, person)
        for person in (viewer("vic"), Person("most", PERMISSIONS - {permission}))
    }
    for visitor in app_of.values():
        visitor.set_cookie("fleet_csrf", "a" * 64)
        assert visitor.get(path).status_code == 403
        fields = dict(pair.split("=") for pair in path.partition("?")[2].split("&"))
        posted = visitor.post(path.partition("?")[0], data={**fields, "token": "b" * 64})
        assert posted.status_code == 403
    only = client(shown, Person("only", frozenset({permission})))
    assert only.get(path).status_code == 200
    assert audit.changes(shown) == []


def test_a_change_needs_the_token_of_its_own_form(shown):
    """No token, another browser's, another person's, or one for another change: nothing happens."""
    ann = client(shown, operator("ann"))
    form = {"queue": "work"}
    assert ann.post("/change/pause", data=form).status_code == 403
    assert confirmed(ann, "/change/pause?queue=work", token="0" * 64).status_code == 403
    token = re.search(r'name="token" value="(\w+)"', ann.get("/change/pause?queue=work").text)[1]
    assert ann.post("/change/drop", data={"all": "1", "token": token}).status_code == 403
    cookie = ann.get_cookie("fleet_csrf").value
    for other in (client(shown, operator("bob")), client(shown, operator("ann"))):
        other.set_cookie("fleet_csrf", cookie if other is None else "c" * 64)
        assert other.post("/change/pause", data={**form, "token": token}).status_code == 403
    bob = client(shown, operator("bob"))
    bob.set_cookie("fleet_csrf", cookie)
    assert bob.post("/change/pause", data={**form, "token": token}).status_code == 403
    assert not shown.is_paused("work")
    assert ann.post("/change/pause", data={**form, "token": token}).status_code == 303
    assert shown.is_paused("work")


def test_a_request_from_another_site_changes_nothing(shown):
    """Even with cookie and token: browsers say where a request comes from."""
    ann = client(shown, operator("ann"))
    token = re.search(r'name="token" value="(\w+)"', ann.get("/change/pause?queue=work").text)[1]
    form = {"queue": "work", "token": token}
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        assert ann.post("/change/pause", data=form, headers=headers).status_code == 403
    assert not shown.is_paused("work")
    cookie = ann.get("/change/pause?queue=work").headers.get("Set-Cookie")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie


def test_nothing_is_changed_by_a_get_or_by_another_method(shown):
    """Looking at every page and every form leaves the queue, the letters and the audit as they are."""
    ann = client(shown, operator("ann"))
    before = shown.queue_stats("work")
    for path in (*PAGES, "/dead/1", *CHANGES):
        assert ann.get(path).status_code == 200, path
        assert ann.head(path).status_code == 200, path
    for path in PAGES:
        assert ann.post(path).status_code == 405
        assert ann.delete(path).status_code == 405
    after = shown.queue_stats("work")
    assert (after.ready, after.delayed, after.dead, after.paused) == (
        before.ready,
        before.delayed,
        before.dead,
        False,
    )
    assert audit.changes(shown) == []


@pytest.mark.parametrize("number", ["9" * 19, "9" * 20, "9" * 5_000, "18446744073709551616", "²", "-1", "0"])
def test_a_number_that_no_server_has_is_not_found(shown, number):
    """As an id, a place in a list or a bound it is what does not exist, and NATS is not said to be away."""
    ann = client(shown, operator("ann"))
    for path in ("/dead/{}", "/dead?before={}", "/change/drop?all=1&upto={}"):
        assert ann.get(path.format(number)).status_code in (200, 404), path
    assert ann.get(f"/messages?cursor={number}").status_code in (200, 404)
    assert ann.get(f"/change/drop?id={number}").status_code == 200
    assert ann.get(f"/workers?page={number}").status_code == 200


def test_every_answer_refuses_frames_and_foreign_content(shown):
    """Pages, errors, assets and live streams all have the headers; nothing is inline."""
    ann = client(shown, operator("ann"))
    for path in (*PAGES, "/dead/1", "/nothing", "/static/style.css", "/static/nothing", *CHANGES):
        response = ann.get(path)
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        if response.mimetype == "text/html":
            assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", response.text), path
            assert response.headers["Cache-Control"] == "no-store"


def test_what_strangers_wrote_is_shown_as_text(shown):
    """Markup in an error, an actor, a message id or a filter is not markup of the page."""
    mark = "<script>alert(1)</script>"
    bury(shown, 7, error=mark, actor=mark, message_id=mark, data=mark.encode())
    ann = client(shown, operator(mark))
    for path in (
        "/dead",
        "/dead/3",
        f"/dead?text={mark}",
        f"/running?actor={mark}",
        f"/delayed?queue={mark}",
    ):
        page = ann.get(path)
        assert page.status_code == 200
        assert mark not in page.text, path


@pytest.mark.parametrize(
    "options",
    [
        {"event": {"a": 1}},
        {"event": {"subject": {}, "stream": [], "sequence": "x"}},
        {"event": [1]},
        {"group_info": {"group_id": {"a": [1]}}},
        {"group_info": "x"},
        {"pipe_target": {"actor_name": 5, "message_id": {"a": 1}}},
        {"pipe_target": [1]},
        {HISTORY_OPTION: "x"},
        {HISTORY_OPTION: [{}]},
        {HISTORY_OPTION: [{"time": 1e300, "reason": 5, "error": [1]}, {"time": -(10**30)}, 7]},
        {HISTORY_OPTION: {"a": 1}},
        [],
        "x",
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_letter_of_any_message_is_shown(shown, nats_url, capsys, options, apart):
    """Whatever another program put into its message, its pages, the list and the command show the letter."""
    fields = {"queue_name": "work", "actor_name": "act", "args": 7, "kwargs": [1], "options": options}
    body = json.dumps({**fields, "message_id": "m-9", "message_timestamp": 1}).encode()
    history = options.get(HISTORY_OPTION, ()) if isinstance(options, dict) else ()
    said = {"actor": None, "message_id": None} if apart else {"message_id": "m-9", "history": history}
    bury(shown, 9, data=body, **said)
    vic = client(shown, viewer("vic"))
    for path in ("/dead", "/dead/3", "/messages/m-9"):
        assert vic.get(path).status_code == 200, path
    main(["--url", nats_url, "--namespace", shown.names.namespace, "dead", "show", "3"])
    assert "act" in capsys.readouterr().out


def test_a_viewer_runs_no_code_of_what_is_looked_at(shown, tmp_path):
    """Bytes that pickle would run, and a module whose package would be imported, are only shown."""
    ran = tmp_path / "ran"
    evil = b"cposix\nsystem\n(Vtouch " + str(ran).encode() + b"\ntR."
    bury(shown, 8, data=evil, actor=None, message_id=None)
    shown.connection.publish(shown.names.task("work"), evil)
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(dramatiq.PickleEncoder())
    try:
        vic = client(shown, viewer("vic"))
        for path in ("/dead", "/dead/3", "/delayed", "/running", "/", "/messages/evil"):
            assert vic.get(path).status_code == 200
    finally:
        dramatiq.set_encoder(before)
    assert not ran.exists()


# What is recorded


def test_every_change_is_recorded_before_and_after(shown):
    """Who, what, to what, how many: in the order of time, newest first, on the page and for programs."""
    ann = client(shown, operator("ann"))
    for path in ("/change/pause?queue=work", "/change/run?queue=work&message=m-1", "/change/replay?all=1"):
        assert confirmed(ann, path).status_code == 303
    found = [(each.who, each.what, each.planned, each.done, each.outcome) for each in audit.changes(shown)]
    assert found == [
        ("ann", "replay", 2, 2, "finished"),
        ("ann", "run", 1, 1, "finished"),
        ("ann", "pause", 1, 1, "finished"),
    ]
    page = ann.get("/audit").text
    assert "all dead letters" in page
    assert "queue work" in page


def test_a_change_that_fails_says_so_in_its_record(shown):
    """The record that was stored before is replaced by one with the error."""

    def fail():
        with audit.record(shown, who="ann", what="x", target="y", planned=3) as change:
            assert audit.changes(shown)[0].outcome == "unfinished"
            change.done = 1
            raise RuntimeError("as the test wants it")

    with pytest.raises(RuntimeError):
        fail()
    (only,) = audit.changes(shown)
    assert (only.outcome, only.done, only.error) == ("failed", 1, "RuntimeError: as the test wants it")


def test_without_a_record_nothing_is_changed(shown, make_quiet):
    """When the audit cannot be stored the change is not made."""
    quiet = make_quiet(declare=False)
    shown.connection.api(f"STREAM.DELETE.{shown.names.audit_stream}")
    ann = client(quiet, operator("ann"))
    assert confirmed(ann, "/change/pause?queue=work").status_code == 503
    assert not shown.is_paused("work")


@pytest.fixture
def make_quiet(nats_url, namespace):
    """Makes brokers of the namespace that use what exists."""
    made = []

    def make(**options):
        made.append(JetStreamBroker(nats_url, namespace=namespace, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_dry_run_is_what_is_done(shown):
    """Letters that come after the form was shown are not part of what it confirms; filters are kept."""
    ann = client(shown, operator("ann"))
    page = ann.get("/change/drop?all=1&text=number 1")
    assert "Drop 1 dead letter?" in page.text
    everything = ann.get("/change/drop?all=1")
    assert "Drop 2 dead letters?" in everything.text
    bury(shown, 5)
    assert ann.post("/change/drop", data=form_of(everything)).status_code == 303
    assert [letter.error for letter in shown.dead_letters.list()] == ["ValueError: number 5"]


def test_only_the_letters_that_were_chosen_are_replayed(shown):
    """Ids that are gone, or were never there, are left out of the count."""
    ann = client(shown, operator("ann"))
    assert confirmed(ann, "/change/replay?id=1&id=99").status_code == 303
    assert [letter.id for letter in shown.dead_letters.list()] == ["2"]
    assert "Nothing to do" in ann.get("/change/replay?id=1").text
    assert "Nothing to do" in ann.get("/change/replay?").text


def test_a_change_of_many_ends_in_time(shown, monkeypatch):
    """What one request does not get done is left, and the page says how much was done."""
    monkeypatch.setattr(letter_changes, "CHANGE_SECONDS", -1.0)
    ann = client(shown, operator("ann"))
    page = ann.get(confirmed(ann, "/change/drop?all=1").location)
    assert "1 of 2" in page.text
    assert "takes another go" in page.text
    assert shown.dead_letters.count() == 1
    assert "Drop 1 dead letter?" in ann.get("/change/drop?all=1").text


def test_live_parts_come_as_events(shown):
    """A browser that asks for events gets the live part; who has seen it gets nothing new."""
    ann = client(shown, operator("ann"))
    events = {"Accept": "text/event-stream"}
    first = ann.get("/dead", headers=events)
    assert first.mimetype == "text/event-stream"
    assert "event: part" in first.text
    assert "<!doctype" not in first.text
    seen = re.search(r"^id: (\w+)$", first.text, re.MULTILINE)[1]
    shown.dead_letters.flush("work")
    changed = ann.get("/dead", headers={**events, "Last-Event-ID": seen})
    assert "There are no dead letters" in changed.text
    seen = re.search(r"^id: (\w+)$", changed.text, re.MULTILINE)[1]
    same = ann.get("/dead", headers={**events, "Last-Event-ID": seen})
    assert "data:" not in same.text
    assert ann.get("/change/pause?queue=work", headers=events).status_code == 204
    assert client(shown, None).get("/", headers=events).status_code == 403
