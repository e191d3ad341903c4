"""Looks for people who were erased in everything that is stored: streams, buckets, queues, archive, logs, the disk.

A name is looked for as it stands, in compressed bodies, and in base64, as far as those can be told. Only the words of
people who were erased are looked for, and those stand nowhere else, because they are random.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from nats.js.api import RetentionPolicy
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError

from tests.chaos import files, reading

_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")

#: Streams whose messages are overwritten on the disk when they are erased. Of a bucket that is not promised.
_OVERWRITTEN = ("ORDERS", "dramatiq_dead", "dramatiq_history", "dramatiq_q_*")


def traces(nats_url: str, words: Collection[str], archive: Path, logs: Path) -> list[str]:
    """Return where one of the words stands.

    Parameters:
      logs: Where the logs of the processes are.
    """
    if not words:
        return []
    pattern = _pattern(words)

    async def read(js: JetStreamContext) -> list[str]:
        found = []
        for info in await js.streams_info():
            name = str(info.config.name)
            queue = info.config.retention == RetentionPolicy.WORK_QUEUE
            stored = await (_queue(js, name) if queue else reading.read_stream(js, name))
            for one in stored:
                text = b"\n".join(
                    [one.subject.encode(), *(value.encode() for value in one.headers.values()), one.data]
                )
                # The mark of a key that was purged is gone within a minute.
                if not ("KV-Operation" in one.headers and "Nats-TTL" in one.headers) and is_in(pattern, text):
                    found.append(f"{name}: {one.subject}")
        return found

    found: list[str] = reading.run(nats_url, read)
    found += [name for name, text in files.texts(archive) if is_in(pattern, text)]
    found += [path.name for path in logs.glob("*.log") if is_in(pattern, path.read_bytes())]
    return sorted(set(found))


def on_disk(words: Collection[str], store: Path) -> list[str]:
    """Return in which streams on a server's disk one of the words stands, of those that promise that none does.

    An event that left for the archive is not overwritten, so people whose orders did must not be among the words. Nor
    is what the servers of a cluster keep in their logs.
    """
    if not words:
        return []
    pattern = _pattern(words)
    blocks = (path for name in _OVERWRITTEN for path in store.rglob(f"streams/{name}/msgs/*.blk"))
    return [f"{path.parent.parent.name} on the disk" for path in blocks if pattern.search(path.read_bytes())]


def _pattern(words: Collection[str]) -> re.Pattern[bytes]:
    return re.compile(b"|".join(re.escape(word.encode()) for word in words))


def is_in(pattern: re.Pattern[bytes], text: bytes) -> bool:
    """Whether a text has a word, plain, compressed or in base64."""
    return any(pattern.search(body) for body in _bodies(text))


def _bodies(text: bytes) -> Iterator[bytes]:
    yield text
    for start in (0, text.find(b"\x78\x9c")):
        if start >= 0:
            try:
                text = zlib.decompressobj().decompress(text[start:], 2**24)
                yield text
            except zlib.error:
                continue
    for packed in _BASE64.findall(text):
        try:
            yield base64.b64decode(packed, validate=True)
        except binascii.Error:
            continue


async def _queue(js: JetStreamContext, name: str) -> list[reading.Stored]:
    """Read a queue one by one, because a second consumer would take its messages."""
    found, sequence = [], 1
    while True:
        try:
            message = await js.get_msg(name, sequence, next=True, subject=">")
        except NotFoundError:
            return found
        assert message.seq is not None
        found.append(
            reading.Stored(
                message.seq, message.subject or "", message.data or b"", message.headers or {}, 0.0
            )
        )
        sequence = message.seq + 1
