"""Messages as they arrive, and the block of headers that goes with them (ADR-4)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

__all__ = ["BadHeader", "Headers", "Msg", "encode_headers", "parse_headers", "sendable"]

Headers = Mapping[str, str]

_VERSION = b"NATS/1.0"
_STATUS = re.compile(rb"NATS/1\.0[ \t]+(\d{3})[ \t]*([^\r\n]*)")
# A token of RFC 9110.
_KEY = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BREAKS = {ord("\r"): " ", ord("\n"): " "}


class BadHeader(ValueError):
    """A header's name is not a token, so it cannot be sent."""


class Msg:
    """A message that arrived on the subscription `sid`; an empty `reply` means that its sender wants no reply."""

    __slots__ = ("_headers", "_raw_headers", "data", "reply", "sid", "subject")

    def __init__(
        self, subject: str, reply: str, data: bytes, raw_headers: bytes | None = None, sid: int = 0
    ) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self.sid = sid
        self._raw_headers = raw_headers
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """By name; a status line of the server gives `Status` and `Description`."""
        if self._headers is None:
            self._headers = parse_headers(self._raw_headers) if self._raw_headers else {}
        return self._headers

    def mentions(self, text: bytes) -> bool:
        """Whether the headers have this text somewhere; much cheaper than parsing them."""
        return self._raw_headers is not None and text in self._raw_headers


def parse_headers(raw: bytes) -> dict[str, str]:
    """The headers of a block as it goes over the wire."""
    headers: dict[str, str] = {}
    status = _STATUS.match(raw)
    if status is not None:
        headers["Status"] = status[1].decode()
        if status[2]:
            headers["Description"] = status[2].decode("utf-8", "replace").strip()
    for line in raw.decode("utf-8", "replace").split("\r\n")[1:]:
        name, separator, value = line.partition(":")
        if separator:
            headers[name.strip()] = value.strip()
    return headers


def sendable(headers: Headers) -> dict[str, str]:
    """The headers that can be sent again: those of another program may have names that are no tokens."""
    return {name: value for name, value in headers.items() if _KEY.fullmatch(name)}


@functools.lru_cache(maxsize=1_000)
def _encoded_key(key: str) -> bytes:
    stripped = key.strip()
    if not _KEY.fullmatch(stripped):
        raise BadHeader(stripped)
    return b"\r\n" + stripped.encode() + b": "


def encode_headers(headers: Headers) -> bytes:
    """A block of headers as it goes over the wire. A line break in a value becomes a space.

    Raises:
      BadHeader: For a name that is not a token.
    """
    parts = [_VERSION]
    for key, value in headers.items():
        parts.append(_encoded_key(key))
        if "\n" in value or "\r" in value:
            value = value.translate(_BREAKS)
        parts.append(value.strip().encode())
    parts.append(b"\r\n\r\n")
    return b"".join(parts)
