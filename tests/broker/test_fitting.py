"""What was added to a message is made smaller until the message fits, in a fixed order and not before it has to be."""

from __future__ import annotations

import base64
import json
import random
import zlib

import pytest
from dramatiq import Message
from dramatiq.errors import DecodeError

from dramatiq_jetstream.sending import fitting
from dramatiq_jetstream.sending.fitting import fields_of, fit, is_enlarged, unfolded

FOLDED = {"Dramatiq-Body": "deflate"}
#: The bytes of the header that says how a body is encoded.
HEADER = len(b"Dramatiq-Body: deflate\r\n")


def text(size):
    """Text that compresses as little as JSON text can."""
    return base64.b64encode(random.Random(size).randbytes(size)).decode()[:size]


def never(message):
    raise AssertionError("the event is left where it is")


def with_options(**options):
    return Message("mails", "post", (text(500),), {}, options, "m-1", 1)


def fitted(message, room, refer=never):
    headers = {}
    return fit(message, room, headers, refer), headers


def test_what_has_just_room_stays_as_it_is():
    message = with_options(traceback="x" * 5_000)
    assert fitted(message, len(message.encode())) == (message.encode(), {})


def test_of_a_traceback_that_is_too_long_beginning_and_end_are_kept():
    long = "".join(map(chr, range(1_000, 6_000)))
    message = with_options(traceback=long, retries=3)
    body, headers = fitted(message, len(message.encode()) - 1)
    assert headers == {}
    assert Message.decode(body) == with_options(traceback=f"{long[:1_000]}\n…\n{long[-1_000:]}", retries=3)


@pytest.mark.parametrize("traceback", ["x" * 2_000, 5, ["frame"]])
def test_a_traceback_that_is_short_or_no_text_is_not_cut(traceback):
    message = with_options(traceback=traceback, dead_history=["y" * 4_000])
    body, headers = fitted(message, len(message.encode()) - 1)
    assert headers == FOLDED
    assert unfolded(body, headers) == message.encode()


def test_a_body_is_compressed_when_the_cut_one_has_one_byte_too_many():
    message = with_options(traceback="x" * 5_000)
    cut = with_options(traceback="x" * 1_000 + "\n…\n" + "x" * 1_000).encode()
    assert fitted(message, len(cut) + HEADER) == (cut, {})
    assert fitted(message, len(cut) + HEADER - 1) == (zlib.compress(cut), FOLDED)


def test_traceback_and_history_go_when_the_compressed_body_has_one_byte_too_many():
    message = with_options(traceback=text(1_500), dead_history=[text(1_000)], retries=2)
    bare = with_options(retries=2).encode()
    folded = zlib.compress(message.encode())
    assert fitted(message, len(folded) + HEADER) == (folded, FOLDED)
    assert fitted(message, len(folded) + HEADER - 1) == (bare, {})


def test_an_event_is_referred_to_when_nothing_else_helps():
    """What refers to it has a cut traceback."""
    asked = []

    def refer(message):
        asked.append(message)
        return with_options(event="there")

    message = with_options(event=text(3_000), traceback="x" * 5_000)
    assert fitted(message, 100, refer) == (with_options(event="there").encode(), {})
    assert asked == [with_options(event=text(3_000), traceback="x" * 1_000 + "\n…\n" + "x" * 1_000)]


def test_a_message_that_is_too_large_by_itself_is_left_as_it_is():
    message = with_options(traceback="x" * 5_000)
    assert fitted(message, 100, lambda message: None) == (message.encode(), {})


@pytest.mark.parametrize("added", ["retries", "traceback", "requeue_timestamp", "dead_history", "event"])
def test_what_was_sent_again_is_larger_than_it_was(added):
    assert is_enlarged(with_options(**{added: 1}))
    assert not is_enlarged(with_options(max_retries=1))


@pytest.mark.parametrize("headers", [{}, {"Dramatiq-Body": "gzip"}, {"Other": "deflate"}])
def test_a_body_that_is_not_compressed_is_what_it_is(headers):
    assert unfolded(b"body", headers) == b"body"


def test_a_body_that_is_not_what_its_header_says_is_refused():
    with pytest.raises(DecodeError) as refused:
        unfolded(b"plain", FOLDED)
    assert str(refused.value) == "The body of this message is not compressed as its header says."
    assert refused.value.data == b"plain"
    assert isinstance(refused.value.error, zlib.error)


@pytest.mark.parametrize(
    ("body", "most"), [(zlib.compress(b"body")[:-1], 100), (zlib.compress(b"x" * 101), 100)]
)
def test_a_compressed_body_that_is_cut_off_or_too_large_is_refused(body, most, monkeypatch):
    """Little data can become very much, so what is kept of it is bounded."""
    monkeypatch.setattr(fitting, "MAX_BODY_BYTES", most)
    with pytest.raises(DecodeError) as refused:
        unfolded(body, FOLDED)
    assert str(refused.value) == "The compressed body of this message is cut off or too large."
    assert (refused.value.data, refused.value.error) == (body, None)


@pytest.mark.parametrize(
    ("body", "headers", "fields"),
    [
        (b'{"a": 1}', {}, {"a": 1}),
        (zlib.compress(b'{"a": 1}'), FOLDED, {"a": 1}),
        (b"[1]", {}, None),
        (b"\x80\x04N.", {}, None),
        (b"{", {}, None),
        (b"[" * 200_000, {}, None),
        (b'{"a": 1}', FOLDED, None),
    ],
)
def test_people_are_told_what_a_message_says_as_far_as_it_is_json(body, headers, fields):
    assert fields_of(body, headers) == fields


def test_fields_are_those_of_the_message():
    message = with_options(retries=1)
    assert fields_of(message.encode(), {}) == json.loads(message.encode())
