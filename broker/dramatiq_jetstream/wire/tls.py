"""Decides whether to use TLS with a server, and which name its certificate must have."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import ConnectionFailed

from .addresses import Address

__all__ = ["Refused", "tls_context", "tls_name", "wants_tls"]


class Refused(ConnectionFailed):
    """A server answered, and refuses us."""


def wants_tls(options: ConnectOptions, address: Address, info: Mapping[str, Any]) -> bool:
    """Whether a server that said `info` is spoken to through TLS.

    Raises:
      Refused: When it offers none although its address is `tls://`; nothing secret was sent.
    """
    offered = bool(info.get("tls_required") or info.get("tls_available"))
    if address.tls_first:
        return True
    if address.tls and not offered:
        raise Refused(
            f"NATS at {address} offers no TLS: use a nats:// address, or configure TLS on the server."
        )
    return bool(info.get("tls_required")) or (offered and (address.tls or options.tls is not None))


def tls_context(options: ConnectOptions) -> ssl.SSLContext:
    """The context that was given, or one that trusts the system's authorities."""
    return options.tls or ssl.create_default_context()


def tls_name(address: Address) -> str:
    """The name that the server's certificate has to have."""
    return address.certified or address.host
