"""The parser hands over what nats-py's would, however the bytes are cut."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from dramatiq_jetstream.wire.parser import DirectParser

OURS, THEIRS = 1, 2
WORDS = st.text("abc.$_é", min_size=1, max_size=8).map(str.encode)
BODIES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"\r\n", b"MSG a 1 3\r\nabc\r\n", b"PING\r\n", b"x" * 5_000]),
)
LINES = st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b'INFO {"a":1}\r\n', b"-ERR 'Slow'\r\n"])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    subject, sid = draw(WORDS), draw(st.sampled_from([OURS, OURS, OURS, THEIRS]))
    reply = draw(st.one_of(st.just(b""), WORDS.map(lambda word: word + b" ")))
    body = draw(BODIES)
    headers = draw(st.one_of(st.none(), st.just(b"NATS/1.0\r\nA: b\r\n\r\n")))
    if headers is None:
        return b"MSG %b %d %b%d\r\n%b\r\n" % (subject, sid, reply, len(body), body)
    size = len(headers)
    return b"HMSG %b %d %b%d %d\r\n%b%b\r\n" % (subject, sid, reply, size, size + len(body), headers, body)


class Client:
    """What a parser calls, noted in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def hand_over(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.calls.append((OURS, subject, reply, data, headers))

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        self.calls.append((sid, subject, reply, data, headers))

    async def _process_ping(self) -> None:
        self.calls.append("ping")

    async def _process_pong(self) -> None:
        self.calls.append("pong")

    async def _process_info(self, info: object) -> None:
        self.calls.append(info)

    async def _process_err(self, error: str) -> None:
        self.calls.append(error)


def parsed(parser: type[Parser], chunks: list[bytes]) -> list[Any]:
    client = Client()
    if parser is DirectParser:
        made = DirectParser(client, {OURS: client.hand_over})  # type: ignore[arg-type]
    else:
        made = parser(client)

    async def parse() -> None:
        for chunk in chunks:
            await made.parse(chunk)

    asyncio.run(parse())
    assert not made.buf
    return client.calls


@given(st.lists(st.one_of(messages(), messages(), LINES), max_size=12), st.data())
def test_what_arrives_is_what_nats_py_would_hand_over(parts, data):
    """Messages of ours and of nats-py's, and other lines, in one piece and cut anywhere."""
    wire = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    chunks = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert parsed(DirectParser, chunks) == parsed(Parser, [wire])


def test_messages_do_not_go_through_the_slow_way(monkeypatch):
    """All but the one that is cut are handed over without nats-py's parser, also after another line."""
    slow: list[bytes] = []
    original = Parser.parse

    async def parse(self: Parser, data: bytes = b"") -> None:
        slow.append(data)
        await original(self, data)

    monkeypatch.setattr(Parser, "parse", parse)
    message = b"MSG a 1 r 3\r\nabc\r\n"
    wire = b"PING\r\n" + message * 4 + message[:15]
    calls = parsed(DirectParser, [wire, message[15:] + message * 50 + message[:5], message[5:] * 1])
    assert len(calls) == 1 + 4 + 1 + 50 + 1
    assert slow == [wire, message[15:], message[:5]]


def test_a_wrong_line_is_an_error():
    """A size that is no number is for nats-py to refuse, and the reader to end."""
    with pytest.raises(ProtocolError):
        parsed(DirectParser, [b"MSG a 1 x\r\n"])
