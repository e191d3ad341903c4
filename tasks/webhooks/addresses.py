"""The addresses of receivers: which ones may be given, and which ones may be connected to.

Customers choose where we send requests, so an address could lead into our own network: by a private address, by one of
the forms in which an IPv4 address hides (`::ffff:10.0.0.1`, `64:ff9b::a00:1`, `0x0a000001`, `0.0.0.0`), or by a name
that means a public address when it is checked and a private one when it is used. So a name is resolved once for each
request, every address that it has is checked, and the connection goes to one that was checked.

The allowed networks of WEBHOOK_NETWORKS are exceptions. Plain HTTP goes nowhere else.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL: Final = 500

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?)"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/[!$-;=?-\[\]_a-z|~]*|\?[!$-;=?-\[\]_a-z|~]*)?",
    re.ASCII,
)
_PORTS: Final = {"https": 443, "http": 80}

# What is routed to the whole Internet; the rest of IPv6 is local, reserved, or stands for something else.
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
# IPv4 behind a translator (RFC 6052).
_TRANSLATED: Final = IPv6Network("64:ff9b::/96")


class InvalidAddress(ValueError):
    """A receiver cannot have this address; the message is the end of a sentence about it."""


class NoAddress(Exception):
    """There is no address that may be connected to; the message says why in a few words."""


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of a receiver's URL: they are what is checked and what is connected to."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Return the host, with its port unless that is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse(url: str) -> Target:
    """Return the parts of a URL.

    Raises:
      InvalidAddress: When it is none that a receiver can have.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    port = int(match["port"] or _PORTS[match["scheme"]]) if match else 0
    if match is None or not 0 < port < 65_536:
        raise InvalidAddress(
            f"must be an address such as https://example.com/orders, of {MAX_URL} characters at most, "
            "without a user, a password or a #fragment."
        )
    path = match["path"] or "/"
    return Target(
        match["scheme"],
        match["host"].strip("[]").lower(),
        port,
        path if path.startswith("/") else f"/{path}",
    )


def check(url: str, allowed: Sequence[Network]) -> None:
    """Check what can be told of an address without resolving its name.

    Raises:
      InvalidAddress: When it is none, or one that would never be connected to.
    """
    target = parse(url)
    if target.scheme == "http" and not allowed:
        raise InvalidAddress("must begin with https://.")
    literal = _literal(target.host)
    if literal is None:
        if "." not in target.host and not allowed:
            raise InvalidAddress("must have the full name of a server on the public Internet.")
    elif not _may_connect(target, literal, allowed):
        raise InvalidAddress("must be that of a server on the public Internet.")


def resolve(target: Target, allowed: Sequence[Network], seconds: float) -> list[str]:
    """Return the addresses of a target that may be connected to, resolving its name once.

    Raises:
      NoAddress: When there are none, or they are not known within `seconds`.
    """
    found = [_address(text) for text in _look_up(target, seconds)]
    # One text for a name that is not there and for one that leads inside: it says nothing about our network.
    usable = [str(one) for one in found if one is not None and _may_connect(target, one, allowed)]
    if not usable:
        raise NoAddress("no public address was found for its name")
    return list(dict.fromkeys(usable))


def is_public(address: Address) -> bool:
    """Whether an address is one of the public Internet, whatever form it has."""
    if isinstance(address, IPv6Address):
        inner = _inner(address)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST or address.sixtofour is not None or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


def _may_connect(target: Target, address: Address, allowed: Sequence[Network]) -> bool:
    inner = _inner(address) or address
    if any(inner in network for network in allowed):
        return True
    return target.scheme == "https" and is_public(address)


def _inner(address: Address) -> IPv4Address | None:
    """Return the IPv4 address that an IPv6 address stands for."""
    if not isinstance(address, IPv6Address):
        return None
    if address in _TRANSLATED:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def _literal(host: str) -> Address | None:
    """Return the address that a host is already, also in the forms of C: 127.1, 0x7f000001, 2130706433."""
    address = _address(host)
    if address is not None:
        return address
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _look_up(target: Target, seconds: float) -> list[str]:
    """Resolve a name on a thread of its own: how long the system's resolver takes is not ours to say."""
    found: list[str] = []

    def ask() -> None:
        try:
            known = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        found.extend(str(address[4][0]) for address in known)

    thread = threading.Thread(target=ask, name="resolve", daemon=True)
    thread.start()
    thread.join(seconds)
    return list(found)
