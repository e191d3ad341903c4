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
from dramatiq_jetstream.wire.protocol import (
    PING,
    Event,
    Pong,
    Protocol,
    ProtocolError,
    ServerError,
    ServerInfo,
    encode_connect,
    encode_publish,
    encode_subscribe,
    encode_unsubscribe,
)

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
    ("wire", "shown"),
    [
        (b"MSG a 1 x\r\n", "'MSG a 1 x'"),
        (b"MSG a\r\n", "'MSG a'"),
        (b"MSG a b 1\r\nx\r\n", "'MSG a b 1'"),
        (b"MSG a 1 -1\r\n\r\n", "'MSG a 1 -1'"),
        (b"HMSG a 1 9 3\r\nabc\r\n", "'HMSG a 1 9 3'"),
        (b"HMSG a 1 -1 3\r\nabc\r\n", "'HMSG a 1 -1 3'"),
        (b"MSG a 1 999999999999\r\n", "'MSG a 1 999999999999'"),
        (b"INFO {\r\n", "'INFO {'"),
        (b"INFO []\r\n", "'INFO []'"),
        (b"HELLO\r\n", "'HELLO'"),
        (b"\xff\xfe\r\n", "'\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}'"),
        (b"HTTP/1.1 400 Bad Request\r\n", "'HTTP/1.1 400 Bad Request'"),
        (b"x" * 61 + b"\r\n", repr("x" * 60)),
    ],
)
def test_what_is_not_nats_is_an_error(wire, shown):
    """The connection on which it arrived is then dropped; the error shows the first 60 bytes of the line."""
    with pytest.raises(ProtocolError) as error:
        Protocol().receive(wire)
    assert str(error.value) == f"the server sent {shown}"


def test_the_largest_message_is_taken_and_one_byte_more_is_not(monkeypatch):
    monkeypatch.setattr(protocol, "MAX_MESSAGE_BYTES", 3)
    (message,) = Protocol().receive(b"MSG a 1 3\r\nabc\r\n")
    assert message.data == b"abc"
    with pytest.raises(ProtocolError):
        Protocol().receive(b"MSG a 1 4\r\n")


def test_lines_of_the_server_become_what_they_say():
    """Quotes around an error are not part of it."""
    wire = b"+OK\r\n\r\nINFO {\"max_payload\":7}\r\n-ERR 'Slow Consumer'\r\n-ERR \xff\r\nPONG\r\n"
    assert Protocol().receive(wire) == [
        ServerInfo({"max_payload": 7}),
        ServerError("Slow Consumer"),
        ServerError("\N{REPLACEMENT CHARACTER}"),
        Pong(),
    ]


def test_of_a_message_under_way_the_beginning_and_what_has_arrived_are_known():
    reader = Protocol()
    assert reader.unfinished(10) == (b"", 0)
    reader.receive(b"MSG a")
    assert reader.unfinished(10) == (b"MSG a", 5)
    reader.receive(b"bc 1 8\r\n12")
    assert reader.unfinished(10) == (b"MSG abc 1 ", 15)
    reader.receive(b"345")
    assert reader.unfinished(5) == (b"MSG a", 18)
    assert reader.unfinished(100) == (b"MSG abc 1 8\r\n12345", 18)
    (message,) = reader.receive(b"678\r\n")
    assert message.data == b"12345678"
    assert reader.unfinished(10) == (b"", 0)


def test_what_a_client_says_is_encoded():
    assert PING == b"PING\r\n"
    assert encode_connect({"name": "é", "lang": "x"}) == b'CONNECT {"name":"\\u00e9","lang":"x"}\r\nPING\r\n'
    assert encode_subscribe("a.é", 7) == b"SUB a.\xc3\xa9 7\r\n"
    assert encode_unsubscribe(7) == b"UNSUB 7\r\n"
    assert encode_unsubscribe(7, 2) == b"UNSUB 7 2\r\n"
    assert encode_unsubscribe(7, after=0) == b"UNSUB 7 0\r\n"


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (("a.é", b"body", "r.é", None), b"PUB a.\xc3\xa9 r.\xc3\xa9 4\r\nbody\r\n"),
        (("a", b"", "", None), b"PUB a  0\r\n\r\n"),
        (("a", b"body", "r.é", {"K": "v"}), b"HPUB a r.\xc3\xa9 18 22\r\nNATS/1.0\r\nK: v\r\n\r\nbody\r\n"),
        (("a.é", b"body", "", b"NATS/1.0\r\n\r\n"), b"HPUB a.\xc3\xa9  12 16\r\nNATS/1.0\r\n\r\nbody\r\n"),
    ],
)
def test_a_publish_is_encoded_with_the_sizes_of_its_parts(message, wire):
    assert encode_publish(message) == wire


def test_a_line_without_an_end_is_bounded(monkeypatch):
    """A peer cannot make this process keep any amount of bytes."""
    monkeypatch.setattr(protocol, "MAX_LINE_BYTES", 1_000)
    reader = Protocol()
    for _ in range(10):
        assert reader.receive(b"x" * 100) == []
    with pytest.raises(ProtocolError, match=r"^the server sent a line of more than 1000 bytes$"):
        reader.receive(b"x")


def test_a_large_message_in_small_pieces_is_put_together_once():
    """Each piece is looked at once, so the cost does not grow with the square of the size."""
    body = b"x" * 3_000_000
    wire = b"MSG a 1 %d\r\n%b\r\n" % (len(body), body)
    reader = Protocol()
    events = [event for at in range(0, len(wire), 1_000) for event in reader.receive(wire[at : at + 1_000])]
    assert [event.data for event in events] == [body]
    assert not reader._parts
