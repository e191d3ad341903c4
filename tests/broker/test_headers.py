"""The block of headers of a message, read and written (ADR-4)."""

from __future__ import annotations

import pytest

from dramatiq_jetstream.wire.headers import BadHeader, Msg, encode_headers, parse_headers, sendable


@pytest.mark.parametrize(
    ("raw", "headers"),
    [
        (b"NATS/1.0\r\n\r\n", {}),
        (b"NATS/1.0\r\nA: b\r\nC:d\r\n\r\n", {"A": "b", "C": "d"}),
        (b"NATS/1.0\r\n A :  b c \r\nE:\r\n\r\n", {"A": "b c", "E": ""}),
        (b"NATS/1.0\r\nA: b: c\r\n\r\n", {"A": "b: c"}),
        (b"NATS/1.0\r\nno separator\r\nA: b\r\n\r\n", {"A": "b"}),
        (b"NATS/1.0\r\nA: b\nc\r\n\r\n", {"A": "b\nc"}),
        (b"NATS/1.0\r\nA: \xc3\xa9\xff\r\n\r\n", {"A": "é\N{REPLACEMENT CHARACTER}"}),
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (b"NATS/1.0  100 Idle Heartbeat \r\nNats-Last-Stream: 7\r\n\r\n",
         {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Stream": "7"}),
        (b"NATS/1.0 409 bad \xff\r\n\r\n", {"Status": "409", "Description": "bad \N{REPLACEMENT CHARACTER}"}),
        (b"NATS/1.0\r\nA: NATS/1.0 503\r\n\r\n", {"A": "NATS/1.0 503"}),
    ],
)  # fmt: skip
def test_a_block_of_headers_is_read(raw, headers):
    assert parse_headers(raw) == headers
    assert Msg("subject", "", b"", raw).headers == headers


@pytest.mark.parametrize(
    ("headers", "block"),
    [
        ({}, b"NATS/1.0\r\n\r\n"),
        ({"A": "b", "Content-Type": "c"}, b"NATS/1.0\r\nA: b\r\nContent-Type: c\r\n\r\n"),
        ({" A ": "  b c "}, b"NATS/1.0\r\nA: b c\r\n\r\n"),
        ({"A": "é"}, b"NATS/1.0\r\nA: \xc3\xa9\r\n\r\n"),
        ({"A": "b\nc"}, b"NATS/1.0\r\nA: b c\r\n\r\n"),
        ({"A": "b\rc"}, b"NATS/1.0\r\nA: b c\r\n\r\n"),
        ({"A": "b\r\nX: y\r\n\r\n"}, b"NATS/1.0\r\nA: b  X: y\r\n\r\n"),
        ({"!#$%&'*+-.^_`|~09azAZ": ""}, b"NATS/1.0\r\n!#$%&'*+-.^_`|~09azAZ: \r\n\r\n"),
    ],
)
def test_headers_are_written_and_a_line_break_in_a_value_becomes_a_space(headers, block):
    assert encode_headers(headers) == block


@pytest.mark.parametrize("name", ["", "a b", "a:", "a\r\nb", "é", "a@b"])
def test_a_name_that_is_no_token_is_refused_and_named(name):
    with pytest.raises(BadHeader) as refused:
        encode_headers({"A": "b", f" {name} ": "c"})
    assert str(refused.value) == name


def test_a_message_keeps_what_arrived():
    message = Msg("subject", "reply", b"data", b"NATS/1.0\r\nA: b\r\n\r\n", 7)
    assert (message.subject, message.reply, message.data, message.sid) == ("subject", "reply", b"data", 7)
    assert message.headers is message.headers, "they are read once"


@pytest.mark.parametrize("raw", [None, b""])
def test_a_message_without_headers_has_none(raw):
    message = Msg("subject", "", b"", raw)
    assert (message.headers, message.sid) == ({}, 0)
    assert message.mentions(b"A") is False


def test_whether_headers_mention_a_text_is_seen_without_reading_them():
    message = Msg("subject", "", b"Other", b"NATS/1.0\r\nDramatiq-Actor: a\r\n\r\n")
    assert message.mentions(b"Dramatiq-") is True
    assert message.mentions(b"Other") is False


def test_headers_whose_names_cannot_be_written_are_not_sent_again():
    assert sendable({"A": "1", "a b": "2", "é": "3", "": "4", "B-c": "5"}) == {"A": "1", "B-c": "5"}
