"""Writes a long history quickly, as many workers would have in days."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from itertools import islice
from urllib.parse import urlsplit

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.history import Record
from tests.support.polling import eventually

#: The server buffers up to 10,000 messages of a stream.
_CHUNK = 5_000


def write_history(url: str, broker: JetStreamBroker, records: Iterable[Record]) -> int:
    """Store records on the stream of a broker's history, without asking for an acknowledgement of each.

    Returns:
      How many there are when all are stored.
    """
    broker.declarations.ensure_history()
    address = urlsplit(url)
    remaining, written = iter(records), 0
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\n')
        while chunk := list(islice(remaining, _CHUNK)):
            written += len(chunk)
            connection.sendall(b"".join(_publish(broker, record) for record in chunk))
            eventually(lambda: _stored(broker) == written, timeout=60)  # noqa: B023 - called at once
    return written


def _publish(broker: JetStreamBroker, record: Record) -> bytes:
    data = record.encode()
    subject = broker.names.history(record.queue, record.actor, record.message_id)
    return b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(data), data)


def _stored(broker: JetStreamBroker) -> int:
    state = broker.connection.api(f"STREAM.INFO.{broker.names.history_stream}")["state"]
    return int(state["messages"])
