"""The connection is kept by facts: whatever ends it or stands in its way, it is there again when it can be."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nkeys
import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import (
    BrokerConnectionError,
    ConnectionFailed,
    MessageTooLarge,
    ServerUnsupported,
)
from dramatiq_jetstream.testing import NatsServer, find_executable
from dramatiq_jetstream.wire.addresses import Address
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.login import LoginUnreadable, read_login
from tests.support.polling import eventually, holds
from tests.support.ports import free_port


def message() -> Message:
    return Message("default", "work", (), {}, {})


@pytest.fixture
def connection(proxy) -> Iterator[Connection]:
    connection = Connection(ConnectOptions.of(proxy.url))
    yield connection
    connection.close()


GREETING = b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"headers":true}\r\n'


def closes(client: socket.socket) -> None:
    """Accepts and closes."""


def greets_and_resets(client: socket.socket) -> None:
    client.sendall(GREETING)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def greets_and_closes_at_once(client: socket.socket) -> None:
    client.sendall(GREETING)


def closes_after_connect(client: socket.socket) -> None:
    client.sendall(GREETING)
    client.recv(4096)


def speaks_http(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def sends_a_broken_greeting(client: socket.socket) -> None:
    client.sendall(b'INFO {"server_id": \r\n')


def never_ends_its_line(client: socket.socket) -> None:
    client.sendall(b"INFO " + b"x" * 2_000_000)


def sends_binary(client: socket.socket) -> None:
    client.sendall(bytes(range(256)) * 20 + b"\r\n")


def refuses(client: socket.socket) -> None:
    client.sendall(GREETING)
    client.recv(4096)
    client.sendall(b"-ERR 'Maximum Connections Exceeded'\r\n")


def says_a_size_that_is_none(client: socket.socket) -> None:
    """Lets us in, and then nothing fits."""
    client.sendall(GREETING.replace(b"1048576", b'"much"') + b"PONG\r\n")
    words = b""
    while b"$JS.API.INFO" not in words:
        more = client.recv(4096)
        if not more:
            return
        words += more
    inbox = words.partition(b"SUB ")[2].split()[0]
    client.sendall(b"MSG %s 0 2\r\n{}\r\n" % inbox)
    while client.recv(4096):
        pass


OBSTACLES: list[Callable[[socket.socket], None]] = [
    closes,
    greets_and_resets,
    greets_and_closes_at_once,
    closes_after_connect,
    speaks_http,
    sends_a_broken_greeting,
    never_ends_its_line,
    sends_binary,
    refuses,
    says_a_size_that_is_none,
]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_whatever_answers_meanwhile_the_connection_comes_back(connection, proxy, obstacle):
    """A proxy that is starting, another service on the port, a server that gives up: none of them is the end."""
    connection.connect()
    met: list[int] = []

    def instead(client: socket.socket) -> None:
        met.append(1)
        obstacle(client)

    proxy.impostor = instead
    proxy.cut()
    eventually(lambda: len(met) >= 3)
    proxy.impostor = None
    eventually(lambda: connection.is_connected)
    assert connection.api("INFO")


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_whatever_answers_at_first_is_an_error_with_a_reason(connection, proxy, obstacle):
    """The first connect says in one sentence what was met, and a later call connects when it can."""
    proxy.impostor = obstacle
    with pytest.raises(ConnectionFailed) as caught:
        connection.connect()
    assert "None" not in str(caught.value)
    assert proxy.url in str(caught.value)
    proxy.impostor = None
    assert connection.api("INFO")


def test_attempts_are_not_a_storm(connection, proxy):
    """The pause grows, up to two seconds."""
    connection.connect()
    met: list[float] = []

    def note(client: socket.socket) -> None:
        met.append(time.monotonic())

    proxy.impostor = note
    proxy.cut()
    holds(lambda: len(met) <= 9, 6)
    assert len(met) >= 4


def test_a_connection_that_never_lasts_is_no_storm_either(connection, proxy, caplog):
    """One that is opened and ended again at once is tried less and less often, and its reason is logged once."""
    connection.connect()
    stop = time.monotonic() + 5
    while time.monotonic() < stop:
        proxy.say(b"-ERR 'Maximum Connections Exceeded'\r\n")
        time.sleep(0.02)
    assert connection.state.reconnects <= 10
    assert caplog.text.count("ended the connection (Maximum Connections Exceeded)") == 1


def reload_configuration(server: NatsServer, config: str) -> None:
    server.config = config
    (server.store_dir / "nats-server.conf").write_text(server._configuration())
    os.kill(server.pid, signal.SIGHUP)


def test_a_refused_login_is_said_once_and_ends_when_it_is_right_again(tmp_path, caplog):
    """A rotated password: the reason is in the log once, the server is not hammered, and all comes back."""

    def users(password: str) -> str:
        return f"authorization {{ users = [ {{ user: u, password: {password} }} ] }}\n"

    with NatsServer(store_dir=tmp_path, config=users("one"), sync="2m") as server:
        broker = JetStreamBroker(server.url, user="u", password="one", enqueue_timeout=500)
        broker.declare_queue("default")
        broker.enqueue(message())
        reload_configuration(server, users("two"))
        eventually(lambda: not broker.connection.is_open)
        with pytest.raises(BrokerConnectionError, match="refused us"):
            broker.enqueue(message())
        with pytest.raises(BrokerConnectionError, match="refused us"):
            broker.consume("default")
        holds(lambda: not broker.connection.is_open, 4)
        assert server.log_tail(1_000).count("authentication error") <= 8
        assert caplog.text.count("refused us") == 1
        assert "None" not in caplog.text
        reload_configuration(server, users("one"))
        eventually(lambda: broker.connection.is_connected)
        broker.enqueue(message())
        eventually(lambda: broker.queue_stats("default").ready == 2)  # the server counts a moment later
        broker.close()


def make_nkey() -> tuple[str, str]:
    seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode(), nkeys.from_seed(bytearray(seed)).public_key.decode()


@pytest.mark.parametrize("state", ["missing", "empty", "half", "directory", "binary"])
def test_a_credentials_file_that_is_being_replaced_while_the_server_restarts(tmp_path, caplog, state):
    """The attempts meanwhile fail with a sentence about the file; with the whole file the process is back."""
    seed, public = make_nkey()
    path = tmp_path / "user.nk"
    path.write_text(seed)
    config = f"authorization {{ users = [ {{ nkey: {public} }} ] }}\n"
    with NatsServer(store_dir=tmp_path / "nats", config=config, sync="2m") as server:
        broker = JetStreamBroker(server.url, nkey=str(path))
        broker.declare_queue("default")
        broker.enqueue(message())
        path.unlink()
        if state == "directory":
            path.mkdir()
        elif state != "missing":
            path.write_bytes({"empty": b"", "half": seed[:20].encode(), "binary": bytes(range(256))}[state])
        server.restart()
        eventually(lambda: "nkey" in caplog.text)
        holds(lambda: not broker.connection.is_open, 0.5)
        if state == "directory":
            path.rmdir()
        path.write_text(seed)
        broker.enqueue(message())
        broker.close()
    assert seed not in caplog.text


@pytest.mark.parametrize("broken", ["", "-----BEGIN NATS USER JWT-----\n", "{jwt}", "{seed}"])
def test_credentials_that_are_not_whole_are_named(tmp_path, broken):
    """A file that has the JWT alone, the seed alone, or neither."""
    seed, _ = make_nkey()
    parts = {
        # As long as real ones: longer than the name of a file may be.
        "jwt": f"-----BEGIN NATS USER JWT-----\neyJ0.{'eyJq' * 200}.c2ln\n------END NATS USER JWT------\n",
        "seed": f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n",
    }
    path = tmp_path / "user.creds"
    path.write_text(broken.format(**parts))
    with pytest.raises(LoginUnreadable, match="complete user JWT and seed"):
        read_login(ConnectOptions(credentials=str(path)), Address("host"))
    whole = "".join(parts.values())
    path.write_text(whole)
    for credentials in (str(path), whole):
        login = read_login(ConnectOptions(credentials=credentials), Address("host"))
        assert login.credentials == whole
        assert seed not in repr(login)


@pytest.mark.parametrize("setting", ["credentials", "nkey"])
@pytest.mark.parametrize("spoil", [str.lower, "{}\n".format, lambda seed: f"{seed[:20]} {seed[20:]}"])
def test_an_error_about_credentials_shows_no_secret(setting, spoil):
    """What is not the content of a file is taken for its path, and may be a seed that was pasted in a wrong way."""
    seed, _ = make_nkey()
    spoiled = spoil(seed.replace("SU", "SV"))
    with pytest.raises(LoginUnreadable) as caught:
        read_login(ConnectOptions(**{setting: spoiled}), Address("host"))
    assert spoiled[20:].strip() not in str(caught.value)


@pytest.mark.parametrize("setting", ["credentials", "nkey"])
def test_a_file_with_credentials_that_is_missing_is_named(setting):
    with pytest.raises(
        LoginUnreadable, match=f"{setting}.* name the file 'user.creds', which does not exist"
    ):
        read_login(ConnectOptions(**{setting: "user.creds"}), Address("host"))


def test_a_name_with_a_dead_address_connects_to_the_next(own_nats_server, monkeypatch):
    """Its first address accepts and is silent, as behind a broken load balancer."""
    port = own_nats_server.port

    original = socket.getaddrinfo

    def look_up(host: str, *args: Any) -> list[tuple[Any, ...]]:
        if host != "two.example":
            return original(host, *args)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)  # no resolver here gives a name two addresses
    with socket.create_server(("127.0.0.2", port)):
        broker = JetStreamBroker(f"nats://two.example:{port}", enqueue_timeout=4_000)
        broker.declare_queue("default")
        broker.enqueue(message())
        broker.close()


def test_a_dead_server_of_several_is_passed_over(own_nats_server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"nats://127.0.0.1:{silent.getsockname()[1]}", own_nats_server.url]
        for _ in range(3):  # in random order
            broker = JetStreamBroker(urls, enqueue_timeout=4_000)
            broker.declare_queue("default")
            broker.enqueue(message())
            broker.close()


def test_a_name_that_does_not_exist_is_named(caplog):
    broker = JetStreamBroker("nats://no-such-host.invalid", enqueue_timeout=500)
    with pytest.raises(ConnectionFailed, match=r"nats://no-such-host\.invalid:4222: no-such-host\.invalid: "):
        broker.connection.connect()
    broker.close()


def test_received_bytes_are_a_sign_of_life(connection, proxy, monkeypatch):
    """A message that takes longer to arrive than silence is allowed is received, on the connection that it began on."""
    monkeypatch.setattr("dramatiq_jetstream.wire.link.FENCE_SECONDS", 0.5)
    monkeypatch.setattr("dramatiq_jetstream.wire.link.SILENT_FENCES", 6)
    arrived = []
    connection.connect()
    inbox = connection.new_inbox()
    connection.subscribe(inbox, arrived.append)
    proxy.rate = 100_000
    began = time.monotonic()
    connection.send(inbox, bytes(500_000))
    eventually(lambda: arrived)
    assert time.monotonic() - began > 4
    assert connection.state.reconnects == 0


def test_an_interrupted_first_connect_leaves_one_connection(connection, proxy):
    """Ctrl-C while a slow server is awaited, then another call: one connection, not two."""
    proxy.hold()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            connection.api("INFO")
    finally:
        signal.signal(signal.SIGALRM, previous)
    threading.Timer(0.3, proxy.release).start()
    connection.max_payload  # noqa: B018 - connects
    assert connection.is_connected
    eventually(lambda: len(proxy._pairs) == 1)
    holds(lambda: len(proxy._pairs) == 1, 0.5)
    assert connection.state.reconnects == 0


def test_threads_that_start_it_at_once_share_one_connection(connection, proxy):
    threads = [threading.Thread(target=connection.connect) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert connection.is_connected
    assert len(proxy._pairs) == 1
    assert (
        sum(
            thread.name == "dramatiq-jetstream" and thread is connection._link.loop.thread
            for thread in threading.enumerate()
        )
        == 1
    )


def test_closing_while_others_post_says_nothing(connection, caplog, monkeypatch):
    """A worker's threads still settle what they did while the connection ends."""
    # Four threads that do nothing but post leave the loop little of a busy machine.
    monkeypatch.setattr("dramatiq_jetstream.wire.loop.CLOSE_SECONDS", 60)
    connection.connect()
    stop = threading.Event()

    def post() -> None:
        while not stop.is_set():
            connection.post(connection.write, "nowhere", b"x")
            connection.post_lazily(connection.write, "nowhere", b"x")

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    connection.close()
    time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join(5)
    assert not caplog.records
    assert not connection._link.loop._mailbox


def test_close_may_be_called_from_anywhere_and_twice(connection):
    """From the connection's own thread, from several at once, and again."""
    connection.connect()
    connection.post(connection.close)
    threads = [threading.Thread(target=connection.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    connection.close()
    assert not connection.is_connected


def test_a_subscription_too_many_is_said_and_ends_nothing(tmp_path, caplog):
    """The server keeps the connection; so do we."""
    with NatsServer(store_dir=tmp_path, config="max_subscriptions: 2\n", sync="2m") as server:
        connection = Connection(ConnectOptions.of(server.url))
        for number in range(3):
            connection.subscribe(f"x.{number}", lambda message: None)
        eventually(lambda: "maximum subscriptions exceeded" in caplog.text)
        assert connection.api("INFO")
        assert connection.state.reconnects == 0
        connection.close()


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Runs nats-servers with configurations of their own."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(name: str, config: str) -> None:
        path = tmp_path / f"{name}.conf"
        path.write_text(f"server_name: {name}\n{config}")
        with (tmp_path / f"{name}.log").open("wb") as log:
            processes.append(
                subprocess.Popen([str(find_executable()), "-c", str(path)], stdout=log, stderr=log)
            )

    yield run
    for process in processes:
        process.kill()
        process.wait()


def stores(url: str, **options: object) -> bool:
    broker = JetStreamBroker(url, enqueue_timeout=2_000, **options)
    broker.declare_queue("default")
    try:
        broker.enqueue(message())
        return broker.queue_stats("default").ready > 0
    except (BrokerConnectionError, ServerUnsupported):
        return False
    finally:
        broker.close()


def test_a_leaf_node_without_jetstream_uses_that_of_its_hub(run_server, tmp_path):
    """With the hub's domain as a setting; without it the error says what to do."""
    hub, leaf, listen = free_port(), free_port(), free_port()
    run_server(
        "hub",
        f'listen: "127.0.0.1:{hub}"\njetstream {{ store_dir: "{tmp_path}/js", domain: hub }}\n'
        f'leafnodes {{ listen: "127.0.0.1:{listen}" }}\n',
    )
    run_server(
        "leaf",
        f'listen: "127.0.0.1:{leaf}"\nleafnodes {{ remotes: [ {{ url: "nats://127.0.0.1:{listen}" }} ] }}\n',
    )
    url = f"nats://127.0.0.1:{leaf}"
    eventually(lambda: stores(url, domain="hub"))
    assert stores(url, api_prefix="$JS.hub.API")
    broker = JetStreamBroker(url)
    with pytest.raises(ServerUnsupported, match="name its domain"):
        broker.connection.connect()
    broker.close()


def test_a_node_without_jetstream_in_a_cluster_that_has_it(nats_cluster, run_server):
    """Its greeting says that it has none; the cluster serves it all the same."""
    port, route = free_port(), free_port()
    cluster = nats_cluster.nodes[0].cluster
    routes = json.dumps([f"nats://127.0.0.1:{each}" for each in cluster.routes])
    run_server(
        "edge",
        f'listen: "127.0.0.1:{port}"\n'
        f'cluster {{ name: "{cluster.cluster}", listen: "127.0.0.1:{route}", routes: {routes} }}\n',
    )
    eventually(lambda: stores(f"nats://127.0.0.1:{port}", namespace=f"e{secrets.token_hex(4)}"))


def test_a_message_over_a_lowered_max_payload_ends_the_connection_once(tmp_path, make_broker):
    """It is refused after that, and not sent again over every new connection until its time is up."""
    with NatsServer(tmp_path / "nats", sync="2m", max_payload=900_000) as server:
        broker = make_broker(server.url)
        broker.declare_queue("default")
        broker.setup()
        large = Message("default", "work", ("x" * 500_000,), {}, {})
        broker.enqueue(large)
        server.max_payload = 100_000
        (server.store_dir / "nats-server.conf").write_text(server._configuration())
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: _max_payload(server) == 100_000)
        with pytest.raises(MessageTooLarge):
            broker.enqueue(large)
        assert broker.connection.state.reconnects <= 1
        broker.enqueue(message())
        broker.close()


def _max_payload(server: NatsServer) -> int:
    """What the server tells a new client."""
    with socket.create_connection((server.host, server.port), timeout=10) as client:
        line = client.makefile("rb").readline()
    return int(json.loads(line.removeprefix(b"INFO "))["max_payload"])
