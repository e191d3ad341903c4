"""What JetStream replies becomes a value or an error that says what to do, and what it would not take is not sent."""

from __future__ import annotations

import pytest
from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import (
    ApiError,
    InvalidName,
    InvalidOption,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    StoreFull,
    StoreTimeout,
    TopologyMissing,
)
from dramatiq_jetstream.wire.headers import Msg
from dramatiq_jetstream.wire.replies import (
    PubAck,
    Publication,
    check,
    check_subject,
    is_no_responders,
    permission_denied,
    read_permission_error,
    read_puback,
    translate,
)

NO_RESPONDERS = b"NATS/1.0 503\r\n\r\n"


def reply(data=b"", raw=None):
    return Msg("inbox", "", data, raw)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('Permissions Violation for Publish to "a.b"', ("publish", "a.b")),
        ('permissions violation for subscription to "_INBOX.>"', ("subscription", "_INBOX.>")),
        ('-ERR Permissions Violation for Publish to "" now', ("publish", "")),
        ("Authorization Violation", None),
        ('Permissions Violation for Import to "a"', None),
    ],
)
def test_a_permission_violation_names_what_was_refused(text, found):
    assert read_permission_error(text) == found


@pytest.mark.parametrize(("verb", "action"), [("publish", "publish to"), ("subscription", "subscribe to")])
def test_the_error_of_a_refused_subject_says_where_to_look(verb, action):
    error = permission_denied(verb, "a.b")
    assert type(error) is PermissionDenied
    assert str(error) == (
        f"This account may not {action} 'a.b': extend its permissions "
        "(dramatiq_jetstream/permissions.conf lists what each role needs)."
    )


@pytest.mark.parametrize("subject", ["a", "a.*.>", "é" * 1_750])
def test_a_subject_of_up_to_3500_bytes_is_sent(subject):
    check_subject(subject)


def test_a_subject_that_is_too_long_is_refused_by_its_beginning():
    with pytest.raises(InvalidName) as refused:
        check_subject("é" * 1_750 + "a")
    assert str(refused.value) == (
        f"subject {'é' * 60}… of 3501 bytes is too long for NATS: 3500 are possible."
    )


@pytest.mark.parametrize("subject", ["", "a b", " a", "a\r\n", "\t"])
def test_a_subject_that_would_end_within_its_line_is_refused(subject):
    with pytest.raises(InvalidName) as refused:
        check_subject(subject)
    assert str(refused.value) == (
        f"subject {subject!r} cannot be sent: it must not be empty or contain whitespace."
    )


def test_headers_are_encoded_once_and_count_as_size():
    item = Publication("a", b"12345", {"K": "v"})
    assert item.block is None
    check(item, 23)
    assert item.block == b"NATS/1.0\r\nK: v\r\n\r\n"
    with pytest.raises(MessageTooLarge) as refused:
        check(item, 22)
    assert str(refused.value) == (
        "A message of 23 bytes for a is over the server's max_payload of 22 bytes: "
        "store large data elsewhere and send a reference, or raise max_payload."
    )


@pytest.mark.parametrize("headers", [None, {}])
def test_a_message_without_headers_has_no_block(headers):
    item = Publication("a", b"12345", headers)
    check(item, 5)
    assert (item.subject, item.payload, item.headers, item.block) == ("a", b"12345", headers, None)


def test_the_subject_of_a_message_is_checked():
    with pytest.raises(InvalidName):
        check(Publication("a b", b""), 100)


@pytest.mark.parametrize("headers", [{"a b": "c"}, {"K": 1}, {"K": None}, {"K": "\ud800"}, {1: "v"}])
def test_headers_that_are_no_text_are_refused(headers):
    with pytest.raises(InvalidOption) as refused:
        check(Publication("a", b"", headers), 100)
    assert str(refused.value) == (
        f"the headers {headers!r} cannot be sent: names must be tokens such as Content-Type, "
        "and values Unicode text."
    )


@pytest.mark.parametrize(
    ("answer", "is_one"),
    [
        (reply(raw=NO_RESPONDERS), True),
        (reply(b"body", NO_RESPONDERS), False),
        (reply(raw=b"NATS/1.0 408\r\n\r\n"), False),
        (reply(raw=b"NATS/1.0\r\n\r\n"), False),
        (reply(), False),
    ],
)
def test_nobody_answers_where_an_empty_message_says_503(answer, is_one):
    assert is_no_responders(answer) is is_one


@pytest.mark.parametrize(
    ("data", "ack"),
    [
        (b'{"stream":"mails","seq":42}', PubAck("mails", 42)),
        (b'{"stream":"my-mails_1", "seq":7}', PubAck("my-mails_1", 7)),
        (b'{"stream":"mails","seq":42,"duplicate":true}', PubAck("mails", 42, duplicate=True)),
        (b'{"seq":42,"stream":"mails"}', PubAck("mails", 42, duplicate=False)),
        ('{"stream":"é","domain":"hub","seq":1}'.encode(), PubAck("é", 1)),
    ],
)
@pytest.mark.parametrize("patient", [True, False])
def test_an_acknowledgement_says_where_the_message_is(data, ack, patient):
    assert read_puback("a", reply(data), patient=patient) == ack


def test_where_no_stream_listens_the_patient_try_again_and_others_are_told():
    assert read_puback("a.b", reply(raw=NO_RESPONDERS), patient=True) is None
    error = read_puback("a.b", reply(raw=NO_RESPONDERS), patient=False)
    assert type(error) is TopologyMissing
    assert str(error) == "No stream takes a.b: prepare it with `fleet setup`, or let the broker declare it."


@pytest.mark.parametrize("number", [10008, 10009, 10118, 10158, 10210])
def test_a_refusal_that_passes_by_itself_means_to_try_again(number):
    body = b'{"error":{"code":503,"err_code":%d,"description":"soon"}}' % number
    assert read_puback("a", reply(body), patient=False) is None


def test_any_other_refusal_is_an_error():
    body = b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"stream":"a"}'
    error = read_puback("a", reply(body), patient=True)
    assert type(error) is ApiError
    assert error.err_code == 10071


def test_what_failed_in_the_connection_is_handed_on():
    """As it is, if it is an error of a broker; as one, if it is not."""
    known = StoreTimeout("late")
    assert read_puback("a", known, patient=True) is known
    other = read_puback("a", ValueError("odd"), patient=True)
    assert (type(other), str(other)) == (BrokerError, "odd")


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        (
            {"code": 503, "err_code": 10077, "description": "maximum bytes exceeded"},
            StoreFull,
            "JetStream has no room (maximum bytes exceeded): raise its limits or let workers catch up.",
        ),
        (
            {"code": 400, "err_code": 10054, "description": "message size exceeds maximum allowed"},
            MessageTooLarge,
            "JetStream refused the message: message size exceeds maximum allowed.",
        ),
        (
            {"code": 404, "err_code": 10059, "description": "stream not found"},
            NotFound,
            "JetStream refused the request: stream not found (code 404, error 10059).",
        ),
        (
            {"code": 400, "err_code": 10014, "description": "consumer not found"},
            NotFound,
            "JetStream refused the request: consumer not found (code 400, error 10014).",
        ),
        (
            {"code": 404, "description": "page not found"},
            NotFound,
            "JetStream refused the request: page not found (code 404, error 0).",
        ),
        (
            {"code": "400", "err_code": "10058", "description": "stream name already in use"},
            ApiError,
            "JetStream refused the request: stream name already in use (code 400, error 10058).",
        ),
        ({}, ApiError, "JetStream refused the request: unknown error (code 0, error 0)."),
    ],
)
def test_each_kind_of_refusal_has_an_error_of_its_own(fields, kind, text):
    error = translate(fields)
    assert (type(error), str(error)) == (kind, text)
    if isinstance(error, ApiError):
        assert (error.code, error.err_code) == (int(fields.get("code", 0)), int(fields.get("err_code", 0)))
        assert error.description == fields.get("description", "unknown error")
