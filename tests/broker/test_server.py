"""NatsServer and NatsCluster: what is stored stays, what goes wrong is said."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.errors import APIError

from dramatiq_jetstream.testing import NatsCluster, NatsServer, PortInUse, ServerError, free_port
from tests.support.polling import eventually, holds
from tests.support.processes import children, python

T = TypeVar("T")


def jetstream(
    urls: str | list[str],
    work: Callable[[JetStreamContext], Awaitable[T]],
    timeout: float = 10,
    **options: Any,
) -> T:
    """Run `work` on a connection of its own."""

    async def run() -> T:
        connection = await nats.connect(urls, connect_timeout=5, allow_reconnect=False, **options)
        try:
            return await work(connection.jetstream(timeout=timeout))
        finally:
            await connection.close()

    return asyncio.run(run())


async def store_ten(js: JetStreamContext) -> None:
    await js.add_stream(name="S", subjects=["s"])
    for number in range(10):
        await js.publish("s", str(number).encode())


async def count(js: JetStreamContext) -> int:
    return (await js.stream_info("S")).state.messages


def process_is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_started_server_has_jetstream_and_knows_its_version(own_nats_server: NatsServer) -> None:
    """After start, JetStream answers at once, and the version is the one a client is told."""
    jetstream(own_nats_server.url, store_ten)
    assert jetstream(own_nats_server.url, count) == 10
    assert tuple(map(int, own_nats_server.version.split("."))) >= (2, 14, 0)
    assert NatsServer(own_nats_server.store_dir).version == own_nats_server.version


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restarted_server_has_the_same_port_and_data(own_nats_server: NatsServer, end: str) -> None:
    """Whether it stopped or was killed, the server comes back at its address with everything stored."""
    url, pid = own_nats_server.url, own_nats_server.pid
    jetstream(url, store_ten)
    getattr(own_nats_server, end)()
    assert not own_nats_server.running
    own_nats_server.start()
    assert own_nats_server.url == url
    assert own_nats_server.pid != pid
    assert jetstream(url, count) == 10


def test_another_object_on_the_same_directory_finds_the_data(tmp_path: Path) -> None:
    """The directory alone makes the server, as for a second `make up`."""
    with NatsServer(tmp_path / "data") as first:
        jetstream(first.url, store_ten)
    with NatsServer(tmp_path / "data") as second:
        assert jetstream(second.url, count) == 10


def test_a_suspended_server_is_silent_until_resumed(own_nats_server: NatsServer) -> None:
    """While suspended the port accepts and nothing answers; after resume it does."""
    own_nats_server.suspend()
    with socket.create_connection(("127.0.0.1", own_nats_server.port), timeout=1) as connection:
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(10)
        own_nats_server.resume()
        connection.settimeout(10)
        assert connection.recv(10).startswith(b"INFO")


def test_a_suspended_server_stops(own_nats_server: NatsServer) -> None:
    """Stop works on a frozen process too, and cleanly."""
    own_nats_server.suspend()
    own_nats_server.stop()
    assert not own_nats_server.running
    assert own_nats_server.wait() == 0


def test_fsync_before_every_acknowledgement_is_the_default(
    own_nats_server: NatsServer, tmp_path: Path
) -> None:
    """The server itself reports sync_always, and not when another interval was asked for."""
    with NatsServer(tmp_path / "a", monitor_port=0) as server:
        assert server.monitor("/jsz")["config"]["sync_always"] is True
    with NatsServer(tmp_path / "b", monitor_port=0, sync="1m") as server:
        config = server.monitor("/jsz")["config"]
        assert not config.get("sync_always")
        assert config["sync_interval"] == 60 * 10**9


def test_limits_and_further_configuration_reach_the_server(tmp_path: Path) -> None:
    """max_payload, max_file_store and the free text are what the server works with."""
    config = "authorization { user: u, password: p }"
    with NatsServer(tmp_path, max_payload=2048, max_file_store=100_000, config=config) as server:

        async def fill(js: JetStreamContext) -> int:
            await js.add_stream(name="S", subjects=["s"])
            for _ in range(200):
                await js.publish("s", b"x" * 2000)
            return js._nc.max_payload

        with pytest.raises(APIError, match=r"insufficient|maximum"):
            jetstream(server.url, fill, user="u", password="p")

        async def payload(js: JetStreamContext) -> int:
            return js._nc.max_payload

        assert jetstream(server.url, payload, user="u", password="p") == 2048


def test_a_port_in_use_is_one_clear_error(own_nats_server: NatsServer, tmp_path: Path) -> None:
    """The error names the port and what to do, in one line, and nothing is left running."""
    second = NatsServer(tmp_path / "second", port=own_nats_server.port)
    with pytest.raises(PortInUse) as error:
        second.start()
    assert str(own_nats_server.port) in str(error.value)
    assert "choose another port" in str(error.value)
    assert "\n" not in str(error.value)
    assert not second.running


def test_a_port_taken_by_a_stranger_is_not_mistaken_for_the_server(tmp_path: Path) -> None:
    """Something else that greets like a nats-server on the port does not pass as this one."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        with pytest.raises(PortInUse):
            NatsServer(tmp_path, port=stranger.getsockname()[1]).start()


def test_a_free_port_that_was_lost_is_replaced(
    own_nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When someone takes the chosen port first, start tries another one."""
    ports = iter([own_nats_server.port, free_port()])
    monkeypatch.setattr("dramatiq_jetstream.testing.server.free_port", lambda host: next(ports))
    with NatsServer(tmp_path / "second") as second:
        assert second.port != own_nats_server.port


def test_two_servers_cannot_use_one_directory(own_nats_server: NatsServer) -> None:
    """The second is refused with the pid of the first, which goes on undisturbed."""
    with pytest.raises(ServerError, match=rf"pid {own_nats_server.pid}\b.*uses the directory"):
        NatsServer(own_nats_server.store_dir).start()
    jetstream(own_nats_server.url, store_ten)


def test_a_directory_is_free_again_after_a_kill(own_nats_server: NatsServer) -> None:
    """The lock goes with the process, however it went."""
    own_nats_server.kill()
    with NatsServer(own_nats_server.store_dir) as second:
        assert second.running


def test_an_unusable_directory_is_a_clear_error(tmp_path: Path) -> None:
    """A file where the directory should be is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match=r"cannot use the directory .*/file"):
        NatsServer(tmp_path / "file").start()


def test_a_configuration_error_shows_the_servers_own_words(tmp_path: Path) -> None:
    """What nats-server says about its configuration is in the error."""
    with pytest.raises(ServerError, match="nonsense_key"):
        NatsServer(tmp_path, config="nonsense_key: true").start()


def test_a_server_that_never_gets_ready_is_given_up_and_ended(tmp_path: Path) -> None:
    """A program that is alive but does not come up fails the start within start_timeout, and is killed."""
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\necho only this; exec sleep 600\n")
    program.chmod(0o755)
    server = NatsServer(tmp_path / "data", executable=program, start_timeout=300)
    with pytest.raises(ServerError, match=r"not ready .* within 300 ms(.|\n)*only this"):
        server.start()
    assert not server.running


def test_a_missing_program_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel and without a program on the PATH, the error names the extra to install."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"dramatiq-jetstream\[server\]"):
        NatsServer(tmp_path / "data").start()


def test_a_server_that_is_not_running_says_so(tmp_path: Path) -> None:
    """Operations on a stopped server are errors, except stop, which has nothing to do."""
    server = NatsServer(tmp_path)
    server.stop()
    with pytest.raises(ServerError, match="not running"):
        server.kill()
    with server, pytest.raises(ServerError, match="already running"):
        server.start()


def test_a_temporary_directory_is_removed(tmp_path: Path) -> None:
    """Without a store_dir the data lives in a temporary directory until the context ends."""
    with NatsServer() as server:
        assert server.store_dir.exists()
    assert not server.store_dir.exists()


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel binds a child to the starting thread; the server is bound to the process instead."""
    server = NatsServer(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join(30)
    try:
        holds(lambda: server.running, 0.5)
    finally:
        server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("forked", [False, True], ids=["started", "started after a fork"])
def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path, forked: bool) -> None:
    """kill -9 of the owner takes the server along, also when the owner is a forked child."""
    program = tmp_path / "owner.py"
    program.write_text(
        textwrap.dedent(f"""
            import os, sys, time
            from dramatiq_jetstream.testing import NatsServer
            if {forked}:
                with NatsServer({str(tmp_path / "first")!r}):
                    pass
                if os.fork():
                    os.wait()
                    sys.exit()
            server = NatsServer({str(tmp_path / "data")!r}).start()
            print("owner", os.getpid(), "server", server.pid, flush=True)
            time.sleep(600)
        """)
    )
    with python(program, log=tmp_path / "log") as owner:
        [line] = owner.wait_for_output(r"owner \d+ server \d+")
        owner_pid, server_pid = (int(word) for word in line.split()[1::2])
        assert server_pid in children(owner_pid)
        os.kill(owner_pid, signal.SIGKILL)
        eventually(lambda: process_is_gone(server_pid))


def test_a_server_is_in_no_session_of_the_terminal(own_nats_server: NatsServer) -> None:
    """Ctrl-C in the terminal does not reach it: its owner decides when it stops."""
    assert os.getsid(own_nats_server.pid) == own_nats_server.pid


def test_a_cluster_replicates_and_knows_its_leaders(nats_cluster: NatsCluster) -> None:
    """Three nodes form, a stream with three replicas has a leader, which is also what JetStream says."""

    async def make(js: JetStreamContext) -> str:
        await js.add_stream(name="R3", subjects=["r3"], num_replicas=3)
        await js.publish("r3", b"kept")
        info = await js.stream_info("R3")
        return str(info.cluster.leader if info.cluster else None)

    def agreed() -> bool:
        # A new stream has no leader at first, and may change it.
        try:
            return jetstream(nats_cluster.urls, make) == nats_cluster.leader_of("R3").name
        except nats.errors.Error:
            return False

    assert nats_cluster.leader() in nats_cluster.nodes
    assert eventually(agreed)


def test_a_cluster_survives_the_death_of_a_leader(nats_cluster: NatsCluster) -> None:
    """After kill -9 of a stream's leader another node leads with the data, and the dead one comes back."""

    async def make(js: JetStreamContext) -> None:
        await js.add_stream(name="SURVIVES", subjects=["survives"], num_replicas=3)
        await js.publish("survives", b"kept")

    async def read(js: JetStreamContext) -> bytes | None:
        return (await js.get_last_msg("SURVIVES", "survives")).data

    def is_readable_through(node: NatsServer) -> None:
        # A leader just elected may drop a request; the client is to ask again.
        try:
            assert jetstream(node.url, read, timeout=2) == b"kept"
        except nats.errors.TimeoutError as error:
            raise AssertionError("no answer") from error

    def is_stored() -> bool:
        try:
            jetstream(nats_cluster.urls, make)
        except nats.errors.Error:
            return False
        return True

    eventually(is_stored)
    dead = nats_cluster.kill(nats_cluster.leader_of("SURVIVES"))
    try:
        leader = nats_cluster.leader_of("SURVIVES", timeout=30_000)
        assert leader is not dead
        eventually(lambda: is_readable_through(leader) is None)
    finally:
        nats_cluster.restart(dead)
    assert all(node.running for node in nats_cluster.nodes)
    eventually(lambda: is_readable_through(dead) is None)


def test_an_unknown_node_or_stream_is_a_clear_error(nats_cluster: NatsCluster) -> None:
    """The errors name what is missing."""
    with pytest.raises(ServerError, match="no node 'n9'; it has n1, n2, n3"):
        nats_cluster.kill("n9")
    with pytest.raises(ServerError, match="stream 'NONE' has no leader within 100 ms"):
        nats_cluster.leader_of("NONE", timeout=100)
