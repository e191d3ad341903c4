"""Every setting of a broker, checked once, before anything is contacted."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .errors import InvalidOption
from .jetstream.names import Names
from .wire.addresses import Address, NotAnAddress, parse_address, split_addresses

__all__ = [
    "DUPLICATE_WINDOW_MS",
    "HIGHEST_PRIORITY",
    "MAX_CONNECTIONS",
    "BrokerConfig",
    "ConnectOptions",
    "Storage",
]

#: The most priorities: each is a durable consumer here. (RabbitMQ advises ten at most.)
HIGHEST_PRIORITY = 32

_TOKENS = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")

#: How many connections a process opens at most, unless it is told otherwise.
MAX_CONNECTIONS = 9

#: How long JetStream remembers a `Nats-Msg-Id`, in milliseconds; longer than any publish is repeated.
DUPLICATE_WINDOW_MS = 120_000


@dataclass(frozen=True)
class Storage:
    """What all streams of a program have in common; `JetStreamBroker` explains each setting. Times are milliseconds.

    Examples:
      >>> from dramatiq_jetstream.config import BrokerConfig
      >>> BrokerConfig(replicas=3).storage.replicas
      3
    """

    replicas: int = 1
    duplicate_window: int = DUPLICATE_WINDOW_MS
    max_bytes: int | None = None


@dataclass(frozen=True)
class ConnectOptions:
    """Where the servers are and who we are there.

    Parameters:
      servers: Addresses (`nats://` or `tls://`), tried in random order. A user, password or token in one of them is
        percent-decoded.
      credentials: A `.creds` file's path, or its content. Files are read again at each connection.
      user, password, token, nkey: Other ways to authenticate; `nkey` is a seed or the path of one.
      tls: A context for servers that use TLS; None uses the system's authorities.
      tls_handshake_first: Begin with TLS, before the server says anything (its `handshake_first`).
      name: What the server shows for this connection.
      connect_timeout: Milliseconds for one attempt to connect, all addresses together.
      inbox_prefix: First tokens of the subjects on which replies arrive, for accounts that restrict them.
      domain: The JetStream domain to use, for instance of the hub behind a leaf node.
      api_prefix: First tokens of the JetStream API in place of `$JS.API`, for accounts that import it.
      max_connections: The most connections at a time. With 1, threads that wait for an answer share the one.

    Raises:
      InvalidOption: When an address is not one, or settings exclude each other.

    Examples:
      >>> from dramatiq_jetstream.config import ConnectOptions
      >>> ConnectOptions.of("nats://ann:secret@one:4222,nats://two:4222").display
      'nats://one:4222, nats://two:4222'
    """

    servers: tuple[str, ...] = field(default=("nats://localhost:4222",), repr=False)
    credentials: str | None = field(default=None, repr=False)
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    name: str = "dramatiq-jetstream"
    connect_timeout: int = 5_000
    inbox_prefix: str = "_INBOX"
    tls_handshake_first: bool = False
    domain: str | None = None
    api_prefix: str | None = None
    max_connections: int = MAX_CONNECTIONS

    def __post_init__(self) -> None:
        _at_least("max_connections", self.max_connections, 1)
        if not self.servers:
            raise InvalidOption("url names no server: give an address such as nats://localhost:4222.")
        try:
            addresses = self.addresses
        except NotAnAddress as error:
            raise InvalidOption(f"url: {error}.") from None
        if self.domain is not None and self.api_prefix is not None:
            raise InvalidOption(
                "domain and api_prefix exclude each other: a domain's prefix is $JS.<domain>.API."
            )
        for option in ("domain", "api_prefix", "inbox_prefix"):
            value = getattr(self, option)
            if value is not None and not _TOKENS.fullmatch(value):
                raise InvalidOption(
                    f"{option}={value!r} cannot be used: give tokens of a NATS subject, without wildcards."
                )
        if self.tls_handshake_first and self.tls is None and not any(address.tls for address in addresses):
            raise InvalidOption("tls_handshake_first needs TLS: give a tls:// address, or a context as tls.")

    @classmethod
    def of(
        cls,
        url: str | Iterable[str] | None = None,
        *,
        credentials: str | None = None,
        **others: Any,
    ) -> ConnectOptions:
        """Complete what was given with `NATS_URL` and `NATS_CREDS`, and check it.

        Parameters:
          url: One address, or several: a list, or separated by commas.

        Raises:
          InvalidOption: When an address is not one.
        """
        source = "url"
        if url is None:
            url, source = os.environ.get("NATS_URL") or cls.servers, "NATS_URL"
        servers = (
            split_addresses(url) if isinstance(url, str) else [each.strip() for each in url if each.strip()]
        )
        if not servers:
            raise InvalidOption(f"{source} names no server: give an address such as nats://localhost:4222.")
        if credentials is None:
            credentials = os.environ.get("NATS_CREDS") or None
        try:
            return cls(servers=tuple(servers), credentials=credentials, **others)
        except InvalidOption as error:
            if source == "NATS_URL" and str(error).startswith("url: "):
                raise InvalidOption(f"NATS_URL: {str(error).removeprefix('url: ')}") from None
            raise

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(map(parse_address, self.servers))

    @property
    def display(self) -> str:
        """The addresses without passwords, for messages to people."""
        return ", ".join(map(str, self.addresses))

    @property
    def api(self) -> str:
        """The first tokens of the JetStream API's subjects."""
        if self.domain is not None:
            return f"$JS.{self.domain}.API"
        return self.api_prefix or "$JS.API"


@dataclass(frozen=True)
class BrokerConfig:
    """The settings of a `JetStreamBroker`, which explains each. All times are milliseconds.

    Attributes:
      names: Every name on the wire, made from the namespace.

    Raises:
      InvalidName, InvalidOption: When a setting can never work.

    Examples:
      >>> from dramatiq_jetstream.config import BrokerConfig
      >>> BrokerConfig(namespace="shop").names.queue_stream("mail")
      'shop_q_mail'
    """

    connect: ConnectOptions = field(default_factory=ConnectOptions)
    namespace: str = "dramatiq"
    replicas: int = 1
    declare: bool = True
    ack_wait: int = 30_000
    max_deliveries: int = 10
    unknown_actor_grace: int = 300_000
    dead_message_ttl: int = 7 * 86_400_000
    enqueue_timeout: int = 10_000
    max_priority: int | None = None
    max_in_flight: Mapping[str, int] = field(default_factory=dict)
    duplicate_window: int = DUPLICATE_WINDOW_MS
    max_stream_bytes: int | None = None
    history: str | float | None = "failures"
    history_ttl: int = 7 * 86_400_000
    history_bytes: int = 1_000_000_000
    names: Names = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", Names(self.namespace))
        object.__setattr__(self, "max_in_flight", MappingProxyType(dict(self.max_in_flight)))
        _at_least("replicas", self.replicas, 1)
        _at_least("ack_wait", self.ack_wait, 1_000)
        _at_least("max_deliveries", self.max_deliveries, 1)
        _at_least("unknown_actor_grace", self.unknown_actor_grace, 0)
        _at_least("dead_message_ttl", self.dead_message_ttl, 1_000)
        _at_least("enqueue_timeout", self.enqueue_timeout, 100)
        _at_least("history_ttl", self.history_ttl, 1_000)
        _at_least("history_bytes", self.history_bytes, 1_000_000)
        _check_history(self.history)
        _at_least("duplicate_window", self.duplicate_window, 100)
        if self.duplicate_window < self.enqueue_timeout:
            raise InvalidOption(
                f"duplicate_window={self.duplicate_window} cannot be used: it must be no shorter than "
                f"enqueue_timeout={self.enqueue_timeout}, or a repeated publish could be stored twice."
            )
        if self.max_stream_bytes is not None:
            _at_least("max_stream_bytes", self.max_stream_bytes, 1_000_000)
        if self.max_priority is not None and not 1 <= self.max_priority <= HIGHEST_PRIORITY:
            raise InvalidOption(
                f"max_priority={self.max_priority!r} cannot be used: choose 1 to {HIGHEST_PRIORITY}, "
                "or None for no priorities."
            )
        for queue_name, limit in self.max_in_flight.items():
            _at_least(f"max_in_flight[{queue_name!r}]", limit, 1)
            if self.max_priority is not None:
                raise InvalidOption(
                    "max_in_flight and max_priority cannot be used together: JetStream counts messages in "
                    "flight for each priority, so the limit of a queue would not hold."
                )

    @property
    def recorded_successes(self) -> float:
        """The share of successful attempts that the history records."""
        if isinstance(self.history, str) or self.history is None:
            return 1.0 if self.history == "all" else 0.0
        return float(self.history)

    @property
    def storage(self) -> Storage:
        """What all streams of the broker have in common."""
        return Storage(self.replicas, self.duplicate_window, self.max_stream_bytes)

    @property
    def priorities(self) -> list[int | None]:
        """The priorities of a queue, highest first; None is 0."""
        return [*range(self.max_priority or 0, 0, -1), None]


def _check_history(value: object) -> None:
    is_share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if value not in ("failures", "all", None) and not is_share:
        raise InvalidOption(
            f'history={value!r} cannot be used: give "failures", "all", a share of successes from 0 to 1, or None.'
        )


def _at_least(option: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidOption(f"{option}={value!r} cannot be used: give a whole number from {minimum} up.")
