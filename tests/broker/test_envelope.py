"""Bytes become the message that Dramatiq makes of them, or the same refusal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.encoder import JSONEncoder, PickleEncoder
from dramatiq.errors import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream.sending.envelope import decode

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = {
    "queue_name": st.text(max_size=8),
    "actor_name": st.text(max_size=8),
    "args": st.lists(JSON, max_size=3),
    "kwargs": st.dictionaries(st.text(max_size=4), JSON, max_size=2),
    "options": st.dictionaries(st.text(max_size=4), JSON, max_size=2),
    "message_id": st.text(max_size=8),
    "message_timestamp": st.integers(),
}


#: What Dramatiq makes up, differently each time, where a message has none.
MADE_UP = ("message_id", "message_timestamp")


def outcome(of: Any, data: bytes, made_up: Iterable[str] = ()) -> Any:
    try:
        message = dataclasses.replace(of(data), **dict.fromkeys(made_up))
    except DecodeError as error:
        return str(error), type(error.error)
    # As text, because a NaN is not equal to itself; the types, because 1 is equal to True.
    return type(message), repr(message), type(message.args)


@given(
    st.one_of(
        st.fixed_dictionaries(FIELDS),
        st.fixed_dictionaries(dict.fromkeys(FIELDS, JSON)),
        st.fixed_dictionaries({}, optional={**FIELDS, "other": JSON}),
        JSON,
    ),
    st.sampled_from(["{}", " {}\n", "{} {}", "{}x", "﻿{}"]),
)
def test_json_becomes_the_message_that_dramatiq_makes_of_it(value, around):
    """Right and wrong fields, types and surroundings."""
    data = around.replace("{}", json.dumps(value)).encode("utf-8", "surrogatepass")
    made_up = [name for name in MADE_UP if isinstance(value, dict) and name not in value]
    assert outcome(decode, data, made_up) == outcome(Message.decode, data, made_up)


@given(st.binary(max_size=30))
def test_bytes_that_are_no_json_are_refused_as_by_dramatiq(data):
    assert outcome(decode, data) == outcome(Message.decode, data)


def test_a_decoded_message_is_frozen_as_any_other():
    """It is a whole message: equal, hashable by its parts, and not to be assigned to."""
    message = Message("q", "a", (1,), {}, {})
    copy = decode(message.encode())
    assert copy == message
    assert copy.copy(queue_name="other") == message.copy(queue_name="other")
    with pytest.raises(AttributeError):
        copy.queue_name = "other"  # type: ignore[misc]


class Reversed(JSONEncoder):
    """An encoder made from Dramatiq's own, which reads other bytes."""

    def decode(self, data: bytes) -> Any:
        return super().decode(data[::-1])


@pytest.mark.parametrize("encoder", [PickleEncoder(), Reversed()])
def test_another_encoder_is_asked(encoder, monkeypatch):
    monkeypatch.setattr(dramatiq.message, "global_encoder", encoder)
    message = Message("q", "a", (1,), {}, {})
    data = message.encode() if isinstance(encoder, PickleEncoder) else message.encode()[::-1]
    assert decode(data) == message


@given(st.fixed_dictionaries(FIELDS))
def test_the_order_of_fields_is_lost(fields):
    """What was decoded is encoded as Dramatiq does it, in whatever order its fields came."""
    backwards = decode(json.dumps(dict(reversed(fields.items()))).encode())
    assert backwards.encode() == Message.decode(Message(**fields).encode()).encode()
