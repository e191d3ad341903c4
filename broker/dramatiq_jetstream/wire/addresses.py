"""Addresses of NATS servers: parsed, and shown without their secrets.

`nats://user:password@host:4222`; the scheme, the user, the password and the port may be left out, and a name alone
before the `@` is a token. User, password and token are percent-decoded, as other NATS clients do. The host begins
behind the last `@`, so a password may contain any character even when it is not percent-encoded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

__all__ = ["Address", "NotAnAddress", "parse_address", "split_addresses"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s/:@\[\],?#]+)(?::(\d{1,5}))?/?")

DEFAULT_PORT = 4222


class NotAnAddress(ValueError):
    """The text is not the address of a server; the message says why, and shows no secret."""


@dataclass(frozen=True)
class Address:
    """One server, and who we are there if its address says so."""

    host: str
    port: int = DEFAULT_PORT
    tls: bool = False
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    #: The name in the server's certificate; for servers that the first one told us of, that of the first.
    certified: str | None = None
    #: Whether TLS begins before the server says anything.
    tls_first: bool = False

    def __str__(self) -> str:
        """The address without secrets."""
        return f"{'tls' if self.tls else 'nats'}://{self.netloc}"

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def neighbour(self, url: str) -> Address | None:
        """The address of another server of the same cluster, as this one's INFO gives it: `host:port`."""
        found = _HOST.fullmatch(url)
        if found is None:
            return None
        certified = self.certified or self.host
        return replace(
            self, host=found[1].strip("[]"), port=int(found[2] or DEFAULT_PORT), certified=certified
        )


def split_addresses(text: str) -> list[str]:
    """Split a list of addresses at its commas, except commas in a password.

    Each address with a password needs its scheme, unless it is the first.
    """
    found: list[str] = []
    for part in re.split(r",(?=\s*[A-Za-z][A-Za-z0-9+.-]*://)", text):
        secret, at, rest = part.rpartition("@")
        first, *others = rest.split(",")
        found += [secret + at + first, *others]
    return [address.strip() for address in found if address.strip()]


def parse_address(text: str) -> Address:
    """Parse an address.

    Raises:
      NotAnAddress: When it is not an address, or of a kind that is not supported.
    """
    text = text.strip()
    scheme = _SCHEME.match(text)
    kind = scheme[1].lower() if scheme else "nats"
    if kind in ("ws", "wss"):
        raise NotAnAddress(
            f"{kind}:// (NATS over WebSocket) is not supported: use the server's nats:// or tls:// port"
        )
    secret, at, rest = text[scheme.end() if scheme else 0 :].rpartition("@")
    found = _HOST.fullmatch(rest)
    port = int(found[2] or DEFAULT_PORT) if found else 0
    if kind not in ("nats", "tls") or found is None or not 0 < port < 65_536:
        # The text in place of a port may be a password whose host was forgotten.
        host = rest.partition(":")[0]
        shown = f"{kind}://{'…@' if at else ''}{host}{':…' if ':' in rest else ''}"
        raise NotAnAddress(
            f"{shown!r} is not the address of a server: give one such as nats://localhost:4222"
        )
    user, colon, password = secret.partition(":")
    return Address(
        host=found[1].strip("[]"),
        port=port,
        tls=kind == "tls",
        user=unquote(user) if colon else None,
        password=unquote(password) if colon else None,
        token=unquote(user) if user and not colon else None,
    )
