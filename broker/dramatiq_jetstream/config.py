"""Where the NATS servers are and who we are there, checked before anything is contacted."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nats.aio.client import RawCredentials

from .errors import InvalidOption

__all__ = ["ConnectOptions"]


@dataclass(frozen=True)
class ConnectOptions:
    """Where the servers are and who we are there.

    Parameters:
      servers: Addresses (`nats://`, `tls://` or `ws://`), tried in random order.
      credentials: A `.creds` file's path, or its content.
      user, password, token, nkey: Other ways to authenticate; `nkey` is a seed or the path of one.
      tls: A context for `tls://` servers; None uses the system's authorities.
      name: What the server shows for this connection.
      connect_timeout: Milliseconds for the first connection, all addresses together.
      inbox_prefix: First tokens of the subjects on which answers arrive, for accounts that restrict them.
    """

    servers: tuple[str, ...] = ("nats://localhost:4222",)
    credentials: str | None = None
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey: str | None = None
    tls: ssl.SSLContext | None = None
    name: str = "dramatiq-jetstream"
    connect_timeout: int = 5_000
    inbox_prefix: str = "_INBOX"

    @classmethod
    def of(
        cls,
        url: str | Iterable[str] | None = None,
        *,
        credentials: str | None = None,
        **others: Any,
    ) -> ConnectOptions:
        """Complete what was given with `NATS_URL` and `NATS_CREDS`, and check it.

        Raises:
          InvalidOption: When an address is not one.
        """
        source = "url"
        if url is None:
            url, source = os.environ.get("NATS_URL") or cls.servers, "NATS_URL"
        addresses = url.split(",") if isinstance(url, str) else list(url)
        servers = tuple(address.strip() for address in addresses if address.strip())
        if not servers:
            raise InvalidOption(f"{source} names no server: give an address such as nats://localhost:4222.")
        for address in servers:
            if not re.fullmatch(r"((nats|tls|ws|wss)://)?[^\s/]+(:\d{1,5})?/?", address):
                raise InvalidOption(
                    f"{source} has {address!r}, which is not the address of a server: "
                    "give one such as nats://localhost:4222."
                )
        if credentials is None:
            credentials = os.environ.get("NATS_CREDS") or None
        return cls(servers=servers, credentials=credentials, **others)

    @property
    def display(self) -> str:
        """The addresses without passwords, for messages to people."""
        return ", ".join(re.sub(r"//[^@/]*@", "//", server) for server in self.servers)

    def for_nats(self) -> dict[str, Any]:
        """The keyword arguments of `nats.connect` that these options stand for."""
        chosen: dict[str, Any] = {"servers": list(self.servers), "name": self.name}
        if self.credentials is not None:
            if "BEGIN NATS USER JWT" in self.credentials:
                chosen["user_credentials"] = RawCredentials(self.credentials)
            elif Path(self.credentials).exists():
                chosen["user_credentials"] = self.credentials
            else:
                raise InvalidOption(
                    f"credentials (or NATS_CREDS) name the file {self.credentials!r}, which does not exist: "
                    "give the path or the content of a .creds file."
                )
        if self.nkey is not None:
            chosen["nkeys_seed" if Path(self.nkey).exists() else "nkeys_seed_str"] = self.nkey
        for option in ("user", "password", "token", "tls"):
            if getattr(self, option) is not None:
                chosen[option] = getattr(self, option)
        chosen["inbox_prefix"] = self.inbox_prefix
        return chosen
