"""Recognises what says something about a customer or their orders in messages of any kind.

A message may name an order in its subject, in a header or anywhere in its body; the body may be compressed, and may
carry an event in base64. A customer is recognised where a program wrote them down as a value: quoted, or as the second
field of an event. A name that stands in the text of a person is not told from the same word of another.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Collection, Iterator
from typing import Final

from dramatiq_jetstream.streams import StoredMessage

_TOKEN: Final = re.compile(rb"[A-Za-z0-9._~-]+")
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/]{16,}={0,2}")

#: The most that a compressed body may have.
_MAX_BODY: Final = 16 * 1024 * 1024


class Traces:
    """What is looked for.

    Parameters:
      customer_id: A customer; empty when only their orders are looked for.
      order_ids: Their orders.
    """

    def __init__(self, customer_id: str, order_ids: Collection[str]) -> None:
        self._order_ids = {order_id.encode() for order_id in order_ids}
        name = customer_id.encode()
        plain, escaped = json.dumps(customer_id, ensure_ascii=False), json.dumps(customer_id)
        self._names = (
            {
                plain.encode("utf-8", "surrogatepass"),
                escaped.encode(),
                # Within a text that is JSON itself.
                json.dumps(escaped)[1:-1].encode(),
                repr(customer_id).encode("utf-8", "surrogatepass"),
                b"\x12" + _length(len(name)) + name,
            }
            if customer_id
            else set[bytes]()
        )

    def are_in(self, message: StoredMessage) -> bool:
        """Whether a message is about the customer or one of the orders."""
        headers = "\n".join(message.headers.values()).encode("utf-8", "surrogatepass")
        return any(map(self._found, (message.subject.encode(), headers, *_bodies(message.data))))

    def _found(self, text: bytes) -> bool:
        if any(name in text for name in self._names):
            return True
        if not self._order_ids:
            return False
        for token in _TOKEN.findall(text):
            # An id may have a suffix, and a length before it that looks like a letter.
            for part in (token, token[1:]):
                if part in self._order_ids or part.partition(b".")[0] in self._order_ids:
                    return True
        return False


def _bodies(data: bytes) -> Iterator[bytes]:
    """Yield a body and what is packed in it."""
    yield data
    try:
        data = zlib.decompressobj().decompress(data, _MAX_BODY)
        yield data
    except zlib.error:
        pass
    for packed in _BASE64.findall(data):
        try:
            yield base64.b64decode(packed, validate=True)
        except binascii.Error:
            continue


def _length(length: int) -> bytes:
    """Return a length as protobuf writes it."""
    return bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
