"""Reads streams with plain nats-py, and the gateway with plain HTTP: no code that is under test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nats
import requests
from nats.errors import TimeoutError as NatsTimeout
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError, ServiceUnavailableError

# One look may take this long altogether, in seconds.
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Stored:
    sequence: int
    subject: str
    data: bytes
    headers: Mapping[str, str]
    at: float


def read_gateway(gateway_url: str, what: str) -> list[dict[str, Any]]:
    """Read all charges, refunds or chargebacks from the gateway, page by page."""
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        answer = requests.get(f"{gateway_url}/{what}", params={"after": after, "limit": 5_000}, timeout=20)
        page = answer.json()
        found += page[what]
        after = page["next"]
    return found


def run(url: str, read: Any) -> Any:
    """Read with a connection of its own."""

    async def reading() -> Any:
        async def ignore(_error: Exception) -> None:
            pass

        client = await nats.connect(url.split(","), connect_timeout=5, allow_reconnect=False, error_cb=ignore)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while True:
                    try:
                        return await read(client.jetstream(timeout=10))
                    except ServiceUnavailableError:
                        # In a cluster a consumer may have been made on a node that the node which is asked
                        # has not heard yet. Nothing is taken by reading, so it is read again from the start.
                        await asyncio.sleep(0.1)
        finally:
            await client.close()

    return asyncio.run(reading())


async def read_stream(js: JetStreamContext, name: str, start: int = 1) -> list[Stored]:
    """Read a stream that reading takes nothing from."""
    try:
        state = (await js.stream_info(name)).state
    except NotFoundError:
        return []
    last = state.last_seq
    if state.messages == 0 or last < start:
        return []
    subscription = await js.pull_subscribe(
        ">",
        stream=name,
        config=ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=max(start, state.first_seq, 1),
            ack_policy=AckPolicy.NONE,
            num_replicas=1,
            mem_storage=True,
            inactive_threshold=10.0,
        ),
    )
    consumer = (await subscription.consumer_info()).name
    found: list[Stored] = []
    try:
        pending = True
        while pending:
            try:
                batch = await subscription.fetch(500, timeout=5)
            except NatsTimeout:
                raise TimeoutError(f"{name} could be read up to {len(found)} messages only") from None
            for message in batch:
                meta = message.metadata
                found.append(
                    Stored(
                        meta.sequence.stream,
                        message.subject,
                        message.data,
                        message.headers or {},
                        meta.timestamp.timestamp(),
                    )
                )
                pending = meta.num_pending > 0 and meta.sequence.stream < last
    finally:
        await subscription.unsubscribe()
        # One for each look would soon be hundreds, and a cluster is busy with them after a leader's death.
        with contextlib.suppress(NotFoundError):
            await js.delete_consumer(name, consumer)
    return found
