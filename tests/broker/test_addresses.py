"""Addresses of servers: what is secret in them is used as it was meant, and shown nowhere."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from urllib.parse import quote

import pytest
from dramatiq import Message
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import BrokerError, InvalidOption
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.wire.addresses import Address, NotAnAddress, parse_address, split_addresses

SECRETS = st.text(string.ascii_letters + string.digits + "@:/#?%,&=+ !é", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nats://host", Address("host")),
        ("host:1234", Address("host", 1234)),
        ("tls://host/", Address("host", tls=True)),
        ("nats://[::1]:4223", Address("::1", 4223)),
        ("nats://u:p@host", Address("host", user="u", password="p")),
        ("u:p@host", Address("host", user="u", password="p")),
        ("nats://u:a@b@host:1", Address("host", 1, user="u", password="a@b")),
        ("nats://u:a%40b%2Fc@host", Address("host", user="u", password="a@b/c")),
        ("nats://u:@host", Address("host", user="u", password="")),
        ("nats://token@host", Address("host", token="token")),
        ("nats://u:a/b#c?d@host", Address("host", user="u", password="a/b#c?d")),
    ],
)
def test_an_address_is_taken_apart(text, address):
    """The host begins behind the last @, and what stands before it is percent-decoded."""
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        ("nats://a:1, nats://b:2", ["nats://a:1", "nats://b:2"]),
        ("nats://u:p@a,b", ["nats://u:p@a", "b"]),
        ("nats://u:x,y,z@a:1,b:2", ["nats://u:x,y,z@a:1", "b:2"]),
        ("nats://u:x,y@a,tls://u:v,w@b", ["nats://u:x,y@a", "tls://u:v,w@b"]),
        (" , ", []),
    ],
)
def test_a_comma_in_a_password_separates_nothing(text, parts):
    assert split_addresses(text) == parts


@given(SECRETS, SECRETS)
def test_any_password_comes_out_as_it_was_encoded(user, password):
    """Percent-encoded as other NATS clients want it."""
    text = f"nats://{quote(user, safe='')}:{quote(password, safe='')}@host:4222,other"
    first, second = ConnectOptions.of(text).addresses
    assert (first.user, first.password, first.host) == (user, password, "host")
    assert second.host == "other"


@given(SECRETS.filter(lambda text: "://" not in text))
def test_a_password_that_is_not_encoded_is_not_shown(password):
    """Neither by the options nor by an error, whatever characters it has."""
    secret = f"{password}s3cret"
    for text in (
        f"nats://u:{secret}@host",
        f"u:{secret}@host",
        f"tls://u:{secret}@host:99999",
        f"u:{secret}@",
    ):
        try:
            options = ConnectOptions.of([text])
        except InvalidOption as error:
            shown = [str(error)]
        else:
            shown = [options.display, repr(options), repr(options.addresses)]
            assert options.addresses[0].password is not None
        assert not any("s3cret" in each for each in shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nats://a b", "nats://a b"),
        ("host:0", "nats://host:…"),
        ("host:65536", "nats://host:…"),
        ("HTTP://host", "http://host"),
        ("tls://u:p@host:port", "tls://…@host:…"),
        ("u:p@", "nats://…@"),
    ],
)
def test_what_is_no_address_is_named_without_its_secrets(text, shown):
    with pytest.raises(NotAnAddress) as caught:
        parse_address(text)
    assert (
        str(caught.value)
        == f"{shown!r} is not the address of a server: give one such as nats://localhost:4222"
    )


@pytest.mark.parametrize("scheme", ["ws", "WSS"])
def test_an_address_of_websockets_names_what_to_use(scheme):
    with pytest.raises(NotAnAddress) as caught:
        parse_address(f"{scheme}://localhost:8080")
    assert str(caught.value) == (
        f"{scheme.lower()}:// (NATS over WebSocket) is not supported: use the server's nats:// or tls:// port"
    )


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("host", user="u", password="p"), "nats://host:4222"),
        (Address("::1", 1, tls=True, token="t"), "tls://[::1]:1"),
    ],
)
def test_an_address_is_shown_without_its_secrets(address, text):
    assert str(address) == text


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [("10.0.0.2:4333", "10.0.0.2", 4333), ("[fd00::2]:1", "fd00::2", 1), ("other", "other", 4222)],
)
def test_a_neighbour_is_who_we_are_there_under_the_same_certificate(url, host, port):
    """However far the way from the first server."""
    first = Address("first", 1, tls=True, user="u", password="p", tls_first=True)
    neighbour = first.neighbour(url)
    assert neighbour == replace(first, host=host, port=port, certified="first")
    assert neighbour.neighbour("third").certified == "first"


def test_a_neighbour_whose_address_is_none_is_left_out():
    assert Address("first").neighbour("a b") is None


@pytest.mark.parametrize(
    "text",
    [
        "nats://app:s3cret",
        "nats://app:s3cret@",
        "nats://app:s3cret@host:port",
        "nats://app:s3cret@a b",
        "http://app:s3cret@host",
        "ws://app:s3cret@host",
        "nats://app:s3cret@host:70000",
    ],
)
def test_a_wrong_address_shows_no_secret(text):
    """The error says what is wrong without the part that may be a password."""
    with pytest.raises(InvalidOption) as caught:
        JetStreamBroker(text)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_websockets_are_refused(scheme):
    """A clear sentence instead of a connection that sends nothing."""
    with pytest.raises(InvalidOption, match=r"WebSocket.* not supported"):
        JetStreamBroker(f"{scheme}://localhost:8080")


def test_the_error_names_where_the_address_came_from(monkeypatch):
    monkeypatch.setenv("NATS_URL", "nats://a b")
    with pytest.raises(InvalidOption, match=r"^NATS_URL: "):
        JetStreamBroker()


@pytest.mark.parametrize(
    "options",
    [
        {"domain": "hub", "api_prefix": "JS.acc.API"},
        {"domain": "a b"},
        {"api_prefix": "JS.>"},
        {"inbox_prefix": ""},
        {"tls_handshake_first": True},
    ],
)
def test_settings_that_can_never_work_are_refused(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        JetStreamBroker("nats://localhost", **options)


def test_a_password_of_all_kinds_of_characters_logs_in(tmp_path):
    """On the connection and on its lanes."""
    password = "p@ss/w:o#r%d, 1"
    config = f'authorization {{ users = [ {{ user: "a:b", password: {json.dumps(password)} }} ] }}\n'
    with NatsServer(store_dir=tmp_path, config=config, sync="2m") as server:
        url = f"nats://{quote('a:b', safe='')}:{quote(password, safe='')}@127.0.0.1:{server.port}"
        broker = JetStreamBroker(url)
        broker.declare_queue("default")
        broker.enqueue(Message("default", "work", (), {}, {}))
        assert broker.connection._link.lane_failures == 0
        broker.close()


def test_a_refusal_shows_no_password(tmp_path, caplog):
    caplog.set_level("DEBUG")
    config = "authorization { users = [ { user: u, password: right } ] }\n"
    with NatsServer(store_dir=tmp_path, config=config, sync="2m") as server:
        for url in (f"nats://u:s3cret@127.0.0.1:{server.port}", f"u:s3cret@127.0.0.1:{server.port}"):
            broker = JetStreamBroker(url)
            with pytest.raises(BrokerError, match="refused us") as caught:
                broker.connection.connect()
            assert "s3cret" not in str(caught.value)
            broker.close()
    assert "s3cret" not in caplog.text
