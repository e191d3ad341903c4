"""Opens a connection with nats-py (TCP, TLS, greeting, login), then takes over its socket.

nats-py's client connects, negotiates TLS and logs in, as it does in every other program. The tasks with which it would
go on (its reader, its writer, its ping) are cancelled before they run, and the socket gets our own protocol (see
`client`). From then on nats-py does nothing: its reconnect task can end silently, and its buffer sends messages later
that callers were told had failed.

This is the one module that knows nats-py, and it uses parts of it that are not published. The dependency is therefore
pinned to a minor version, and importing this module fails with one sentence if a part is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any, Final

import nats
import nats.errors
from nats.aio.client import Client as NatsClient
from nats.aio.client import RawCredentials
from nats.aio.transport import TcpTransport

from dramatiq_jetstream.config import ConnectOptions

from .addresses import Address
from .client import Client, Lost, RefusedByServer
from .login import Login, read_login
from .tls import tls_name, wants_tls

__all__ = ["Identity", "Silent", "log_in_at"]

_TASKS: Final = ("_reading_task", "_ping_interval_task", "_flusher_task")
_USED: Final = (
    *_TASKS,
    "_process_info",
    "_server_info",
    "_signature_cb",
    "_user_jwt_cb",
    "_public_nkey",
    "_transport",
)

#: What a server said before it cut the connection.
_ERROR: Final = re.compile(rb"-ERR '([^'\r\n]*)'")

#: nats-py wants whole seconds for its own bounds; ours end an attempt first.
_PATIENCE_SECONDS: Final = 60


def _check_nats() -> None:
    client, transport = NatsClient(), TcpTransport()  # type: ignore[no-untyped-call]
    missing = [name for name in _USED if not hasattr(client, name)]
    missing += [name for name in ("_io_reader", "_io_writer") if not hasattr(transport, name)]
    if missing:
        raise ImportError(
            f"dramatiq-jetstream needs nats-py 2.16, and this one has no {', '.join(missing)}: "
            "pip install 'nats-py~=2.16.0'"
        )


_check_nats()


class Identity:
    """Who a connection is to its server; signs the greetings of further connections to it."""

    def __init__(self, login: Login, client: NatsClient) -> None:
        self._login = login
        self._client = client

    def fields(self, nonce: str) -> dict[str, str]:
        """What CONNECT says of who we are, to a server that greeted with `nonce`."""
        client = self._client
        if client._signature_cb is None:
            return self._login.words
        fields = {"sig": client._signature_cb(nonce).decode()}
        if client._user_jwt_cb is not None:
            fields["jwt"] = client._user_jwt_cb().decode()
        elif client._public_nkey is not None:
            fields["nkey"] = client._public_nkey
        return fields


class Silent(Lost):
    """A server that did not greet: it is dead, hangs, or waits for TLS."""


class _Opening(NatsClient):
    """A client for one attempt at one server, which decides about TLS before anything secret is sent."""

    def __init__(self, options: ConnectOptions, address: Address, patience: asyncio.Timeout) -> None:
        super().__init__()
        self._connect_options = options
        self._address = address
        self._patience = patience
        self.greeted = False

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        self.greeted = True
        self._patience.reschedule(None)
        info["tls_required"] = wants_tls(self._connect_options, self._address, info)


async def log_in_at(
    options: ConnectOptions, address: Address, peer: tuple[str, int], greeting_seconds: float | None
) -> Client:
    """Connect to the server at `peer` and log in; the caller bounds the time.

    Parameters:
      greeting_seconds: How long the server may take to greet.

    Raises:
      Silent: When it did not greet.
      LoginUnreadable: When a file with credentials is missing or incomplete.
      Refused: When the server offers no TLS although it has to; nothing secret was sent.
      RefusedByServer: When it answered with an error.
      Lost, OSError: When the connection could not be made, or ended.
    """
    login = read_login(options, address)
    patience = asyncio.timeout(greeting_seconds)
    opening = _Opening(options, address, patience)
    try:
        async with patience:
            await _connect(opening, options, address, peer, login)
        return _take_over(opening, address, peer, Identity(login, opening))
    except BaseException as error:
        _abort(opening)
        if isinstance(error, TimeoutError) and patience.expired():
            raise Silent(f"{peer[0]} did not answer") from None
        if isinstance(error, Lost) and not opening.greeted:
            raise Silent(str(error)) from None
        raise


async def _connect(
    opening: _Opening,
    options: ConnectOptions,
    address: Address,
    peer: tuple[str, int],
    login: Login,
) -> None:
    failures: list[Exception] = []

    async def failed(error: Exception) -> None:
        failures.append(error)

    host = f"[{peer[0]}]" if ":" in peer[0] else peer[0]
    credentials = None if login.credentials is None else RawCredentials(login.credentials)
    try:
        await opening.connect(
            servers=[f"nats://{host}:{peer[1]}"],
            name=options.name,
            user=login.words.get("user"),
            password=login.words.get("pass"),
            token=login.words.get("auth_token"),
            user_credentials=credentials,
            nkeys_seed_str=login.seed,
            tls=options.tls,
            tls_hostname=tls_name(address),
            tls_handshake_first=address.tls_first,
            error_cb=failed,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=_PATIENCE_SECONDS,
        )
    except nats.errors.NoServersError:
        raise next((error for error in failures if isinstance(error, OSError)), Lost("no answer")) from None
    except nats.errors.Error as error:
        text = str(error).removeprefix("nats: ").strip("'\r\n ")
        if "empty response" in text or "json parse error" in text:
            raise Lost("the server closed the connection" if "empty" in text else text) from None
        raise RefusedByServer(text) from None
    except OSError as error:  # a certificate that is not accepted is a ValueError, too
        reader = getattr(opening._transport, "_io_reader", None)
        said = _ERROR.search(bytes(reader._buffer)) if reader else None
        if said is not None:
            raise RefusedByServer(said[1].decode("utf-8", "replace")) from None
        raise (reader and reader.exception()) or error from None  # a TLS alert of the server says more
    except (ValueError, asyncio.IncompleteReadError) as error:  # a line that is longer than any greeting
        raise Lost(str(error)) from None
    if not opening.is_connected:
        raise Lost("the server closed the connection")


def _take_over(opening: _Opening, address: Address, peer: tuple[str, int], identity: Identity) -> Client:
    """Give nats-py's socket, and what it has read beyond the handshake, to a client of ours."""
    for name in _TASKS:
        getattr(opening, name).cancel()
    stream: Any = opening._transport
    client = Client(address, peer, identity)
    client.info = dict(opening._server_info)
    transport = stream._io_writer.transport
    transport.set_protocol(client)
    client.use(transport)
    early = bytes(stream._io_reader._buffer)
    if stream._io_reader.at_eof() or transport.is_closing():
        raise Lost("the server closed the connection")
    if early:
        client.data_received(early)
    if not transport.is_reading():
        transport.resume_reading()
    return client


def _abort(opening: _Opening) -> None:
    """Clean up after a failed attempt."""
    for name in _TASKS:
        task = getattr(opening, name)
        if task is not None:
            task.cancel()
    writer = getattr(opening._transport, "_io_writer", None)
    if writer is not None:
        with contextlib.suppress(Exception):
            writer.transport.abort()
