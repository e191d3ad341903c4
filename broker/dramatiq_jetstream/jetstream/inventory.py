"""What exists on the server: streams, queues, consumers; read page by page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dramatiq_jetstream.wire.connection import Connection

from .names import Names

__all__ = ["consumers", "queue_names", "stream_names", "streams"]


def consumers(connection: Connection, stream: str) -> Iterator[dict[str, Any]]:
    """What the server knows of every consumer of a stream."""
    offset = 0
    while True:
        reply = connection.api(f"CONSUMER.LIST.{stream}", {"offset": offset})
        found = reply.get("consumers") or []
        yield from found
        offset += len(found)
        if not found or offset >= reply["total"]:
            return


def streams(connection: Connection) -> Iterator[dict[str, Any]]:
    """What the server knows of every stream of the account."""
    offset = 0
    while True:
        reply = connection.api("STREAM.LIST", {"offset": offset})
        found = reply.get("streams") or []
        yield from found
        offset += len(found)
        if not found or offset >= reply["total"]:
            return


def stream_names(connection: Connection, subject: str | None = None) -> list[str]:
    """The names of all streams of the account, or of those that keep something on `subject`."""
    found: list[str] = []
    body = {} if subject is None else {"subject": subject}
    while True:
        reply = connection.api("STREAM.NAMES", {**body, "offset": len(found)})
        page = reply.get("streams") or []
        found += page
        if not page or len(found) >= reply["total"]:
            return found


def queue_names(connection: Connection, names: Names) -> list[str]:
    """The queues of a namespace that exist on the server, declared here or elsewhere."""
    queues = map(names.queue_of_stream, stream_names(connection))
    return sorted(queue for queue in queues if queue is not None)
