"""Opens a connection to NATS in bounded time, or says in one sentence why that does not work.

nats-py goes on trying and tells a callback what goes wrong. Here a refusal, or every address having failed twice,
ends the attempt at once, and silence ends it after `connect_timeout`. Nothing is left behind by a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import ConnectionFailed, ServerUnsupported

from .client import DirectClient

__all__ = ["Listener", "open_client"]

#: The first server with every feature the library builds on (cron schedules, ADR-51).
MINIMUM_SERVER: Final = (2, 14, 0)


@dataclass(frozen=True)
class Listener:
    """What is called, on the loop thread, as things happen to a connection; none of it may raise.

    nats-py's reader would end with an exception. A connection is heard of while it is opened, too.
    """

    failed: Callable[[DirectClient, Exception], None]
    lost: Callable[[DirectClient], None]
    back: Callable[[DirectClient], None]
    ended: Callable[[DirectClient], None]


async def open_client(options: ConnectOptions, listener: Listener) -> DirectClient:
    """Connect to one of the servers.

    Raises:
      ConnectionFailed: When none answered in time, or none accepted us.
      ServerUnsupported: When the one that did is too old or has no JetStream.
    """
    nc = DirectClient()
    refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    last_error = "no answer"
    failures = 0

    async def on_error(error: Exception) -> None:
        nonlocal failures, last_error
        listener.failed(nc, error)
        failures += 1
        last_error = str(error) or type(error).__name__
        if refused.done() or connecting.done():
            return
        if "authorization" in str(error).lower():
            refused.set_result(
                f"NATS at {options.display} refused us ({error}): check the user, password, token or credentials."
            )
        elif isinstance(error, OSError) and failures >= 2 * len(options.servers):
            refused.set_result(f"Could not connect to NATS at {options.display}: {error}.")

    async def on_disconnect() -> None:
        listener.lost(nc)

    async def on_reconnect() -> None:
        listener.back(nc)

    async def on_close() -> None:
        listener.ended(nc)

    connecting = asyncio.ensure_future(
        nc.connect(
            **options.for_nats(),
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            closed_cb=on_close,
            connect_timeout=2,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.2,  # type: ignore[arg-type]
            ping_interval=20,
            max_outstanding_pings=3,
            pending_size=0,
            skip_subject_validation=True,
        )
    )
    await asyncio.wait(
        cast("set[asyncio.Future[Any]]", {connecting, refused}),
        timeout=options.connect_timeout / 1000,
        return_when=asyncio.FIRST_COMPLETED,
    )
    try:
        if refused.done():
            raise ConnectionFailed(refused.result())
        if not connecting.done():
            raise ConnectionFailed(
                f"Could not connect to NATS at {options.display} within {options.connect_timeout} ms: {last_error}."
            )
        try:
            connecting.result()
        except BrokerError:
            raise
        except Exception as error:
            raise ConnectionFailed(f"Could not connect to NATS at {options.display}: {error}.") from error
        _check_server(options, nc)
    except BaseException:
        connecting.cancel()
        with contextlib.suppress(Exception):
            await nc.close()
        raise
    return nc


def _check_server(options: ConnectOptions, nc: DirectClient) -> None:
    version = nc.connected_server_version
    if (version.major, version.minor, version.patch) < MINIMUM_SERVER:
        raise ServerUnsupported(
            f"The NATS server at {options.display} is version {version.major}.{version.minor}."
            f"{version.patch}, but {'.'.join(map(str, MINIMUM_SERVER))} or newer is needed "
            "(message schedules): upgrade nats-server."
        )
    if not nc._server_info.get("jetstream"):
        raise ServerUnsupported(
            f"The NATS server at {options.display} has JetStream switched off: "
            "start it with --jetstream, or add a jetstream block to its configuration."
        )
