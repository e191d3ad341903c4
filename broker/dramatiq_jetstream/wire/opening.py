"""Opens a connection to one of the servers in bounded time, or says in one sentence why that does not work.

Each attempt tries every server once, and every address that a server's name has, so that a dead one costs a second and
no more. Nothing is left behind by a failure or an interrupt.
"""

from __future__ import annotations

import asyncio

# Modules that a host lookup imports when it is first needed, on any thread. A process that is forked in the middle of
# that import would find the module's lock taken for ever.
import concurrent.futures.thread  # noqa: F401
import contextlib
import encodings.idna  # noqa: F401
import ipaddress
import json
import os
import random
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import ConnectionFailed, ServerUnsupported

from . import error_numbers
from .addresses import Address
from .client import Client, Lost, NoRoom, RefusedByServer, is_full
from .handshake import Silent, log_in_at
from .headers import Msg
from .ids import new_id
from .login import LoginUnreadable
from .protocol import encode_publish, encode_subscribe, encode_unsubscribe
from .tls import Refused

__all__ = ["Servers", "open_client"]

#: The first server with every feature the library builds on (cron schedules, ADR-51).
MINIMUM_SERVER: Final = (2, 14, 0)

#: Seconds until the next address is tried.
NEXT_ADDRESS_SECONDS: Final = 1.0

#: Seconds that JetStream has to answer at all; without a leader it cannot.
JETSTREAM_SECONDS: Final = 2.0

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_LOGIN = re.compile(r"authori[sz]ation|authentication|expired|revoked", re.IGNORECASE)


class Servers:
    """The servers to choose from: the given ones, and those that they announced."""

    def __init__(self, options: ConnectOptions) -> None:
        self._given = options.addresses
        self._learned: tuple[Address, ...] = ()
        self._last: Address | None = None

    def learn(self, address: Address, info: Mapping[str, Any]) -> None:
        """Take in how the server at `address` was reached, and what it says of its cluster."""
        self._last = address
        self._given = tuple(address if each.netloc == address.netloc else each for each in self._given)
        told = (address.neighbour(str(url)) for url in info.get("connect_urls") or ())
        self._learned = tuple(each for each in told if each is not None)

    def in_order(self) -> list[Address]:
        """Each server once: the given ones in random order before the learned, the one that was lost last."""
        given = random.sample(self._given, len(self._given))
        learned = random.sample(self._learned, len(self._learned))
        chosen = {address.netloc: address for address in (*learned, *given)}  # the given ones prevail
        order = list(dict.fromkeys(address.netloc for address in (*given, *learned)))
        if self._last is not None and self._last.netloc in chosen:
            order.remove(self._last.netloc)
            order.append(self._last.netloc)
        return [chosen[netloc] for netloc in order]


async def open_client(options: ConnectOptions, servers: Servers) -> Client:
    """Connect to one of the servers and log in.

    Raises:
      Refused: When a server answered and does not accept us.
      ServerUnsupported: When one that accepts us is too old or has no JetStream.
      ConnectionFailed: When none answered in time.
    """
    failure: BrokerError = _unreachable(options, "no answer")
    try:
        async with asyncio.timeout(options.connect_timeout / 1000):
            addresses = servers.in_order()
            for position, address in enumerate(addresses):
                last = position == len(addresses) - 1
                try:
                    client = await _open_at(options, address, last=last)
                except (Refused, ServerUnsupported, LoginUnreadable) as error:
                    failure = error
                except ConnectionFailed as error:
                    if not isinstance(failure, (Refused, ServerUnsupported)):
                        failure = error
                else:
                    servers.learn(client.address, client.info)
                    return client
    except TimeoutError:
        if type(failure) is ConnectionFailed:
            failure = _unreachable(options, f"no answer within {options.connect_timeout} ms")
    raise failure


async def _open_at(options: ConnectOptions, address: Address, *, last: bool) -> Client:
    """Try each address of a server's name."""
    try:
        peers = await _look_up(address)
    except OSError as error:
        raise _unreachable(options, f"{address.host}: {_reason(error)}") from None
    if options.tls_handshake_first:
        address = replace(address, tls_first=True)
    ways = [(address, peer) for peer in peers]
    failure: BrokerError = _unreachable(options, f"{address.host} has no address")
    while ways:
        way, peer = ways.pop(0)
        try:
            return await _open_way(
                options, way, peer, only=last and not ways and (way.tls_first or not way.tls)
            )
        except Silent as error:
            if way.tls and not way.tls_first:
                ways.append((replace(way, tls_first=True), peer))
            if way.tls_first == address.tls_first:  # not while guessing
                failure = _unreachable(options, str(error))
        except (Refused, ServerUnsupported, LoginUnreadable):
            raise
        except ConnectionFailed as error:
            if way.tls_first == address.tls_first:
                failure = error
    raise failure


async def _open_way(
    options: ConnectOptions, address: Address, peer: tuple[str, int], *, only: bool
) -> Client:
    client = None
    try:
        client = await log_in_at(options, address, peer, None if only else NEXT_ADDRESS_SECONDS)
        await _check_server(options, client)
    except BaseException as error:
        if client is not None:
            client.abort("it was given up")
        explained = _explain(options, address, error)
        if explained is error:
            raise
        raise explained from None
    return client


def _explain(options: ConnectOptions, address: Address, error: BaseException) -> BaseException:
    """What went wrong, in one sentence; other errors, and silence, as they are."""
    if isinstance(error, RefusedByServer):
        if is_full(str(error)):
            return NoRoom(
                f"NATS at {options.display} takes no further connection ({error}): raise the server's or the account's "
                "limit, or give programs a smaller max_connections."
            )
        if _LOGIN.search(str(error)):
            return Refused(
                f"NATS at {options.display} refused us ({error}): check the user, password, token or credentials."
            )
        return _unreachable(options, str(error))
    if isinstance(error, Lost) and not isinstance(error, Silent):
        return _unreachable(options, str(error))
    if isinstance(error, ssl.SSLCertVerificationError):
        return Refused(
            f"The certificate of NATS at {address} was not accepted ({error.verify_message}): give a context "
            "that trusts its authority as tls, and the name that the certificate has."
        )
    if isinstance(error, OSError):
        return _unreachable(options, _reason(error))
    return error


async def _look_up(address: Address) -> list[tuple[str, int]]:
    with contextlib.suppress(ValueError):
        return [(str(ipaddress.ip_address(address.host)), address.port)]
    # Not the loop's own, which with uvloop is another resolver than Python's.
    found = await asyncio.get_running_loop().run_in_executor(
        None, socket.getaddrinfo, address.host, address.port, 0, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    return list(dict.fromkeys((str(sockaddr[0]), address.port) for *_, sockaddr in found))


async def _check_server(options: ConnectOptions, client: Client) -> None:
    where, version = f"The NATS server at {options.display}", str(client.info.get("version"))
    found = _VERSION.match(version)
    if found is None or tuple(map(int, found.groups())) < MINIMUM_SERVER:
        raise ServerUnsupported(
            f"{where} is version {version}, but {'.'.join(map(str, MINIMUM_SERVER))} or newer is needed "
            "(message schedules): upgrade nats-server."
        )
    # Its greeting only says whether this node runs JetStream; another one of its cluster may serve it.
    inbox = f"{options.inbox_prefix}.{new_id()}"
    client.write(
        encode_subscribe(inbox, 0)
        + encode_unsubscribe(0, after=1)
        + encode_publish((f"{options.api}.INFO", b"", inbox, None))
    )
    try:
        async with asyncio.timeout(JETSTREAM_SECONDS):
            reply = await client.expect(Msg)
    except RefusedByServer as error:
        if "permissions violation" in str(error).lower():
            client.reason = None
            return  # we may not ask; what we may do shows later
        raise
    except TimeoutError:
        if client.info.get("jetstream"):
            return  # it has no leader now
        raise ServerUnsupported(
            f"{where} does not run JetStream, and no other node of its cluster answers."
        ) from None
    refusal = {} if reply.headers.get("Status") == "503" else json.loads(reply.data or b"{}").get("error")
    if refusal == {} or (refusal is not None and refusal.get("err_code") in error_numbers.NO_JETSTREAM):
        raise ServerUnsupported(
            f"{where} has JetStream switched off: start it with --jetstream, add a jetstream block to its "
            "configuration, enable JetStream for this account, or name its domain."
        )


def _unreachable(options: ConnectOptions, reason: str) -> ConnectionFailed:
    return ConnectionFailed(f"Could not connect to NATS at {options.display}: {reason}.")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return str(error)
    if error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno).lower()
    return error.strerror or str(error) or type(error).__name__
