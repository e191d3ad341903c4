"""Messages on their way to callbacks and to the socket, in the clear and through TLS."""

from __future__ import annotations

import asyncio
import ssl
import string
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dramatiq import Message
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import ConnectionFailed, InvalidName
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.wire.connection import Connection, ConnectOptions
from dramatiq_jetstream.wire.headers import Msg, encode_headers, parse_headers
from dramatiq_jetstream.wire.outbox import CHUNK_BYTES
from tests.support.polling import eventually
from tests.support.skips import needs

KEYS = st.text(string.ascii_letters + string.digits + "-_.!", min_size=1, max_size=20)
VALUES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)


@pytest.fixture
def connection(nats_url):
    connection = Connection(ConnectOptions.of(nats_url))
    yield connection
    connection.close()


def listen(connection: Connection) -> tuple[str, list[Msg]]:
    inbox, arrived = connection.new_inbox(), []
    connection.subscribe(inbox, arrived.append)
    return inbox, arrived


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_headers_survive_the_wire(headers):
    """What is encoded is parsed again, but for space at the ends, which the protocol does not keep."""
    block = encode_headers(headers)
    assert parse_headers(block) == {key: value.strip() for key, value in headers.items()}


@pytest.mark.parametrize(
    "block",
    [
        b"NATS/1.0\r\n\r\n",
        b"NATS/1.0\r\nA: 1\r\nb:2\r\n\r\n",
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 404 No Messages\r\n\r\n",
        b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 1\r\nNats-Pending-Bytes: 0\r\n\r\n",
        b"NATS/1.0 409 Leadership Change\r\n\r\n",
        b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 12\r\n\r\n",
    ],
)
def test_headers_are_parsed_as_nats_py_parses_them(block):
    """Status lines of the server and ordinary headers, on their own and together."""
    theirs = asyncio.run(Client()._process_headers(block))
    assert parse_headers(block) == dict(theirs or {})


def test_messages_arrive_in_order_beyond_what_the_socket_takes(connection):
    """More than the socket takes at once: nothing is lost or overtaken, and headers come with it."""
    inbox, arrived = listen(connection)
    body = b"x" * 50_000
    count = 30 * CHUNK_BYTES // len(body) + 10
    for number in range(count):
        connection.send(inbox, body, {"Number": str(number)})
    eventually(lambda: len(arrived) == count)
    assert [int(message.headers["Number"]) for message in arrived] == list(range(count))
    assert {len(message.data) for message in arrived} == {len(body)}


def test_a_callback_that_fails_does_not_end_the_reader(connection, caplog):
    """Its error is a line in the log; the next message arrives."""
    inbox, arrived = connection.new_inbox(), []

    def fails_once(message: Msg) -> None:
        arrived.append(message)
        if len(arrived) == 1:
            raise RuntimeError("broken")

    connection.subscribe(inbox, fails_once)
    connection.send(inbox)
    connection.send(inbox)
    eventually(lambda: len(arrived) == 2)
    assert "broken" in caplog.text


def test_a_line_break_in_a_header_ends_nothing(connection):
    """It would start a header, or a command of the protocol."""
    inbox, arrived = listen(connection)
    connection.send(inbox, b"1", {"A": "x\r\nB: y\r\n\r\nPUB evil 0"})
    eventually(lambda: arrived)
    assert arrived[0].headers == {"A": "x  B: y    PUB evil 0"}
    assert arrived[0].data == b"1"


def test_a_message_that_cannot_be_sent_takes_nothing_with_it(connection, caplog):
    """Too large, or with a header that is none: left out, and said."""
    inbox, arrived = listen(connection)
    connection.send(inbox, b"1")
    connection.send(inbox, b"x" * (connection.max_payload + 1))
    connection.send(inbox, b"2", {"not a token": "x"})
    connection.send(inbox, b"3")
    eventually(lambda: len(arrived) == 2)
    assert [message.data for message in arrived] == [b"1", b"3"]
    assert caplog.text.count("could not be sent") == 2


@pytest.mark.parametrize("subject", ["x" * 5_000, "é" * 2_500, "a b", "a\r\nPUB evil 0", ""])
def test_a_subject_that_would_end_the_connection_is_left_out(connection, caplog, subject):
    """The server cuts at a line of 4,096 bytes, and reads words; what cannot be written is said instead."""
    inbox, arrived = listen(connection)
    connection.send(subject, b"x")
    connection.send(inbox, b"1")
    eventually(lambda: arrived)
    assert "could not be sent" in caplog.text
    with pytest.raises(InvalidName):
        connection.publish(subject, b"x")
    with pytest.raises(InvalidName):
        connection.request(subject, b"x")
    assert connection.state.reconnects == 0


def test_a_transport_that_was_closed_behind_our_back(connection):
    """uvloop raises RuntimeError for it; what was written is lost with the connection, what comes later is not."""
    inbox, arrived = listen(connection)
    client = connection._link._client

    class Closed:
        """A transport whose handle is gone."""

        abort = client.transport.abort
        get_write_buffer_size = client.transport.get_write_buffer_size

        def write(self, chunk: bytes) -> None:
            raise RuntimeError("the handler is closed")

    client.transport = Closed()
    connection.send(inbox, b"lost")
    eventually(lambda: client.lost.done() and connection.is_connected)
    connection.send(inbox, b"later")
    eventually(lambda: arrived)
    assert [message.data for message in arrived] == [b"later"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and its certificate, which is its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    options = "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *options.split(), *files], check=True, capture_output=True)
    return key, certificate


@contextmanager
def tls_server(store: Path, certificate: tuple[Path, Path], *, first: bool = False) -> Iterator[str]:
    """A server that wants TLS, at once or after it has greeted; gives its address."""
    key, chain = certificate
    config = f'tls {{ cert_file: "{chain}", key_file: "{key}", handshake_first: {str(first).lower()} }}\n'
    with NatsServer(store_dir=store, sync="2m", config=config, monitor_port=0) as server:
        yield server.url.replace("nats://", "tls://")


def trusting(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[1]))


@needs("openssl")
@pytest.mark.parametrize("scheme", ["tls", "nats"])
def test_tls(tmp_path, certificate, scheme):
    """The connection and its lanes are encrypted, with a certificate that is checked."""
    with tls_server(tmp_path / "nats", certificate) as url:
        broker = JetStreamBroker(url.replace("tls://", f"{scheme}://"), tls=trusting(certificate))
        broker.declare_queue("q")
        for _ in range(3):
            broker.enqueue(Message("q", "actor", (), {}, {}))
        assert broker.queue_stats("q").ready == 3
        assert broker.connection._link._client.transport.get_extra_info("cipher")
        (lane,) = broker.connection._link.lanes._lanes
        assert isinstance(lane._socket, ssl.SSLSocket)
        broker.close()


@needs("openssl")
def test_a_certificate_of_another_authority_is_refused_by_name(tmp_path, certificate):
    """The error says that it is the certificate, and what to give."""
    with tls_server(tmp_path / "nats", certificate) as url:
        broker = JetStreamBroker(url)
        with pytest.raises(ConnectionFailed, match=r"certificate of NATS .* was not accepted .*self-signed"):
            broker.enqueue(Message("q", "actor", (), {}, {}))
        broker.close()


@needs("openssl")
def test_a_secret_is_not_sent_in_the_clear_to_a_tls_address(nats_url):
    """A server that offers no TLS does not get to see the password that was meant for an encrypted connection."""
    broker = JetStreamBroker(nats_url.replace("nats://", "tls://u:secret@"))
    with pytest.raises(ConnectionFailed, match="offers no TLS"):
        broker.connection.connect()
    broker.close()


@needs("openssl")
@pytest.mark.parametrize("told", [True, False], ids=["told", "found out"])
def test_a_server_that_wants_tls_before_it_greets(tmp_path, certificate, told, monkeypatch):
    """With the setting at once; without it after the usual way was tried."""
    # NatsServer waits for a greeting in the clear.
    monkeypatch.setattr(NatsServer, "_read_info", lambda self: {"jetstream": True, "version": "2.15.1"})
    with tls_server(tmp_path / "nats", certificate, first=True) as url:
        broker = JetStreamBroker(url, tls=trusting(certificate), tls_handshake_first=told)
        broker.declare_queue("q")
        for _ in range(3):
            broker.enqueue(Message("q", "actor", (), {}, {}))
        assert broker.queue_stats("q").ready == 3
        (lane,) = broker.connection._link.lanes._lanes
        assert isinstance(lane._socket, ssl.SSLSocket)
        broker.close()
