"""The protocol without I/O: it understands what nats-py's parser does, however the bytes are cut."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.protocol.parser import Parser

from dramatiq_jetstream.wire import protocol
from dramatiq_jetstream.wire.headers import Msg
from dramatiq_jetstream.wire.protocol import Event, Pong, Protocol, ProtocolError, ServerError, ServerInfo

WORDS = st.text("abc.$_é", min_size=1, max_size=8).map(str.encode)
BODIES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"\r\n", b"MSG a 1 3\r\nabc\r\n", b"PING\r\n", b"x" * 5_000]),
)
LINES = st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b'INFO {"a":1}\r\n', b"-ERR 'Slow'\r\n"])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    subject, sid = draw(WORDS), draw(st.integers(1, 99))
    reply = draw(st.one_of(st.just(b""), WORDS.map(lambda word: word + b" ")))
    body = draw(BODIES)
    headers = draw(st.one_of(st.none(), st.just(b"NATS/1.0\r\nA: b\r\n\r\n")))
    if headers is None:
        return b"MSG %b %d %b%d\r\n%b\r\n" % (subject, sid, reply, len(body), body)
    size = len(headers)
    return b"HMSG %b %d %b%d %d\r\n%b%b\r\n" % (subject, sid, reply, size, size + len(body), headers, body)


class Reference:
    """What nats-py's parser calls, noted in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        self.calls.append((sid, subject.decode(), reply.decode(), data, headers))

    async def _process_ping(self) -> None:
        self.calls.append("ping")

    async def _process_pong(self) -> None:
        self.calls.append("pong")

    async def _process_info(self, info: object) -> None:
        self.calls.append(info)

    async def _process_err(self, error: str) -> None:
        self.calls.append(error.strip("'").lower())


def expected(wire: bytes) -> list[Any]:
    reference = Reference()
    asyncio.run(Parser(reference).parse(wire))
    return reference.calls


def said(event: Event) -> Any:
    match event:
        case Msg():
            return (event.sid, event.subject, event.reply, event.data, event._raw_headers)
        case ServerInfo(fields):
            return fields
        case ServerError(text):
            return text.lower()
        case Pong():
            return "pong"


@given(st.lists(st.one_of(messages(), messages(), LINES), max_size=12), st.data())
def test_what_arrives_is_what_nats_py_would_hand_over(parts, data):
    """Messages and other lines, in one piece and cut anywhere; a PING is answered instead."""
    wire = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    chunks = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    reader = Protocol()
    arrived = [said(event) for chunk in chunks for event in reader.receive(chunk)]
    calls = expected(wire)
    assert arrived == [call for call in calls if call != "ping"]
    assert reader.pongs() == b"PONG\r\n" * calls.count("ping")
    assert reader.pongs() == b""


@pytest.mark.parametrize(
    "wire",
    [
        b"MSG a 1 x\r\n",
        b"MSG a\r\n",
        b"MSG a 1 -1\r\n\r\n",
        b"HMSG a 1 9 3\r\nabc\r\n",
        b"MSG a 1 999999999999\r\n",
        b"INFO {\r\n",
        b"INFO []\r\n",
        b"HELLO\r\n",
        b"\xff\xfe\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
    ],
)
def test_what_is_not_nats_is_an_error(wire):
    """The connection on which it arrived is then dropped."""
    with pytest.raises(ProtocolError):
        Protocol().receive(wire)


def test_a_line_without_an_end_is_bounded(monkeypatch):
    """A peer cannot make this process keep any amount of bytes."""
    monkeypatch.setattr(protocol, "MAX_LINE_BYTES", 1_000)
    reader = Protocol()
    for _ in range(10):
        reader.receive(b"x" * 100)
    with pytest.raises(ProtocolError, match="more than 1000 bytes"):
        reader.receive(b"x" * 100)


def test_a_large_message_in_small_pieces_is_put_together_once():
    """Each piece is looked at once, so the cost does not grow with the square of the size."""
    body = b"x" * 3_000_000
    wire = b"MSG a 1 %d\r\n%b\r\n" % (len(body), body)
    reader = Protocol()
    events = [event for at in range(0, len(wire), 1_000) for event in reader.receive(wire[at : at + 1_000])]
    assert [event.data for event in events] == [body]
    assert not reader._parts
