"""Network namespaces in which the parts of a service can be cut off from each other.

Every node of the cluster has a namespace of its own, and so have the service's processes; a bridge in one more
namespace joins them. A cut is a wrong hardware address for the other side, on both sides: packets leave and
nobody takes them, as with a broken switch, and no error tells the sender. Needs root. Everything that is made
here is in namespaces that `close` deletes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from dramatiq_jetstream.testing import NatsCluster, NatsServer, find_executable
from tests.support.skips import find_program

NODES = ("n1", "n2", "n3")
CLIENTS = "clients"

_NOWHERE = "02:00:00:00:00:01"


def available() -> str | None:
    """Return why namespaces cannot be made here, None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if find_program("ip") is None:
        return "needs the program `ip` (Debian: iproute2)"
    return None


class Network:
    """Namespaces n1, n2, n3 and clients, which all reach each other, and which this process reaches too."""

    def __init__(self) -> None:
        self._prefix = f"chaos{os.getpid()}"
        self._ip = find_program("ip") or "ip"
        subnet = f"10.213.{os.getpid() % 250}"
        self.addresses = {
            **{name: f"{subnet}.{number}" for number, name in enumerate(NODES, start=11)},
            CLIENTS: f"{subnet}.2",
        }
        self._harness = f"{subnet}.1"
        other = f"10.214.{os.getpid() % 250}"
        #: Where this process reaches what listens in the namespace of the clients, whatever is cut.
        self.service_address = f"{other}.2"
        self._harness_beside = f"{other}.1"
        self._cuts: list[tuple[str, str]] = []

    def open(self) -> Network:
        """Make the namespaces and join them."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def _open(self) -> None:
        self._run("netns", "add", self._name("switch"))
        self._in("switch", "link", "add", "bridge", "type", "bridge")
        self._in("switch", "link", "set", "bridge", "up")
        for name, address in self.addresses.items():
            self._run("netns", "add", self._name(name))
            self._in(name, "link", "set", "lo", "up")
            self._run(
                *("link", "add", f"to-{name}", "netns", self._name("switch"), "type", "veth"),
                *("peer", "name", "eth0", "netns", self._name(name)),
            )
            self._join(name)
            self._in(name, "addr", "add", f"{address}/24", "dev", "eth0")
            self._in(name, "link", "set", "eth0", "up")
        # The end on this side disappears with its peer in the namespace.
        self._run(
            *("link", "add", "to-harness", "netns", self._name("switch"), "type", "veth"),
            *("peer", "name", f"{self._prefix}a"),
        )
        self._join("harness")
        self._run("addr", "add", f"{self._harness}/24", "dev", f"{self._prefix}a")
        self._run("link", "set", f"{self._prefix}a", "up")
        self._run(
            *("link", "add", f"{self._prefix}b", "type", "veth"),
            *("peer", "name", "eth1", "netns", self._name(CLIENTS)),
        )
        self._run("addr", "add", f"{self._harness_beside}/30", "dev", f"{self._prefix}b")
        self._run("link", "set", f"{self._prefix}b", "up")
        self._in(CLIENTS, "addr", "add", f"{self.service_address}/30", "dev", "eth1")
        self._in(CLIENTS, "link", "set", "eth1", "up")

    def close(self) -> None:
        """Delete every namespace; their links go with them."""
        for name in ("switch", *self.addresses):
            subprocess.run(
                [self._ip, "netns", "del", self._name(name)], capture_output=True, timeout=20, check=False
            )
        for end in ("a", "b"):
            subprocess.run(
                [self._ip, "link", "del", f"{self._prefix}{end}"],
                capture_output=True,
                timeout=20,
                check=False,
            )

    def command(self, name: str) -> list[str]:
        """Return what to put before a command that is to run in a namespace."""
        return [self._ip, "netns", "exec", self._name(name)]

    def cut(self, one: str, other: str) -> None:
        """Let nothing pass between two namespaces."""
        for here, there in ((one, other), (other, one)):
            self._in(
                here,
                *("neigh", "replace", self.addresses[there], "lladdr", _NOWHERE),
                *("dev", "eth0", "nud", "permanent"),
            )
        self._cuts.append((one, other))

    def heal(self) -> None:
        """Let everything pass again."""
        while self._cuts:
            one, other = self._cuts.pop()
            for here, there in ((one, other), (other, one)):
                self._in(here, "neigh", "del", self.addresses[there], "dev", "eth0")

    def _join(self, name: str) -> None:
        self._in("switch", "link", "set", f"to-{name}", "master", "bridge")
        self._in("switch", "link", "set", f"to-{name}", "up")

    def _name(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _in(self, name: str, *arguments: str) -> None:
        self._run("-n", self._name(name), *arguments)

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([self._ip, *arguments], capture_output=True, text=True, timeout=20, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class IsolatedCluster(NatsCluster):
    """A cluster whose nodes are in the namespaces of a network."""

    def __init__(self, store_dir: Path, network: Network) -> None:
        self._network = network
        super().__init__(store_dir)

    def _make_nodes(self) -> list[NatsServer]:
        self.store_dir.mkdir(parents=True, exist_ok=True)
        routes = ", ".join(f'"nats://{self._network.addresses[name]}:6222"' for name in NODES)
        return [
            NatsServer(
                self.store_dir / name,
                name=name,
                host=address,
                port=4222,
                monitor_port=8222,
                executable=self._wrapper(name),
                config=f'cluster {{ name: chaos, listen: "{address}:6222", routes: [{routes}] }}\n',
            )
            for name in NODES
            for address in (self._network.addresses[name],)
        ]

    def _wrapper(self, name: str) -> Path:
        script = self.store_dir / f"{name}.sh"
        command = " ".join([*self._network.command(name), str(find_executable())])
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
        return script


def remove(directory: Path) -> None:
    """Delete what a run has left on disk."""
    shutil.rmtree(directory, ignore_errors=True)
