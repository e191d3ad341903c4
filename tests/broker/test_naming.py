"""Names on the wire: any queue, actor, message id or key maps to something NATS can carry, and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dramatiq_jetstream.errors import InvalidName
from dramatiq_jetstream.jetstream.names import (
    Names,
    bucket_stream,
    check_subject,
    decode,
    decode_key,
    encode,
    encode_key,
    queue_key,
)

#: What nats-server takes as one token of a subject, and as a name of a stream or consumer.
TOKEN = re.compile(r"[^\s.*>/\\\x00-\x1f\x7f]+", re.ASCII)

#: Any text, and text that is likely to trip an encoding.
any_text = st.text() | st.text(alphabet="=.AF09~-_ é\x00*>/")
namespaces = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(any_text)
def test_encode_and_decode_are_one_to_one(name):
    """What was encoded decodes to what it was, so that no two names share a token."""
    assert decode(encode(name)) == name


@given(any_text)
def test_an_encoded_name_is_one_token(name):
    """Whatever the name, NATS takes its encoding as one token."""
    assert TOKEN.fullmatch(encode(name))


@given(st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True))
def test_ordinary_names_stay_readable(name):
    """Names that NATS can carry are left as they are."""
    assert encode(name) == name


def test_lone_surrogates_survive():
    """Text that came from undecodable bytes is carried as well."""
    assert decode(encode("\udcff")) == "\udcff"


@given(any_text.filter(bool))
def test_keys_keep_their_levels(key):
    """A key is encoded token by token and comes back as it was."""
    encoded = encode_key(key)
    assert decode_key(encoded) == key
    assert encoded.count(".") == key.count(".")
    assert all(TOKEN.fullmatch(token) for token in encoded.split("."))


@given(
    namespaces,
    st.text(min_size=1, max_size=20),
    any_text | st.text(min_size=300, max_size=2000),
    st.integers(1, 32),
)
def test_subjects_of_a_queue_are_legal_and_inside_its_stream(namespace, queue, message_id, priority):
    """Every subject of a queue is a legal one of moderate length, and no other stream takes it."""
    names = Names(namespace)
    inside = names.queue_subjects(queue).removesuffix(">")
    for subject in (
        names.task(queue),
        names.task(queue, priority),
        names.delayed(queue, message_id, "0" * 32),
        names.periodic(queue, "nightly report"),
    ):
        assert check_subject(subject) == subject
        assert subject.startswith(inside)
        assert len(subject) <= 1_000
    assert names.delayed(queue, message_id, "u").startswith(
        names.delayed_message(queue, message_id).removesuffix("*")
    )


@given(namespaces, st.text(min_size=1, max_size=20))
def test_a_stream_tells_its_queue(namespace, queue):
    """The queue is found again from the name of its stream, and streams of other kinds are not queues."""
    names = Names(namespace)
    assert names.queue_of_stream(names.queue_stream(queue)) == queue
    assert names.queue_of_stream(names.dead_stream) is None
    assert len(names.queue_stream(queue)) <= 255


#: Namespaces, queues, buckets and actors that are made of separators, so that two pairs could easily be confused.
parts = st.lists(
    st.sampled_from(["shop", "q", "_", "-", "__", "_-", "_q", "_q_", "dead", "_dead", "eu", "KV_"]),
    min_size=1,
    max_size=5,
).map("".join)
pairs = st.lists(
    st.tuples(namespaces | parts, parts | st.text(min_size=1, max_size=8)),
    min_size=2,
    max_size=2,
    unique=True,
)


def stream_names(namespace, name):
    names = Names(namespace)
    return {
        names.queue_stream(name),
        names.dead_stream,
        names.history_stream,
        names.activity_stream,
        names.audit_stream,
    }


def bucket_name(namespace, name):
    try:
        return Names(namespace).bucket(name)
    except InvalidName:
        return None


@given(pairs)
@example([("shop", "q_mail"), ("shop_q", "mail")])
@example([("shop", "dead"), ("shop_q", "mail")])
@example([("shop", "eu-results"), ("shop-eu", "results")])
@example([("shop_-eu", "results"), ("shop-eu", "results")])
@example([("a", "_-b"), ("a_", "b")])
@example([("KV_shop-eu", "mail"), ("shop", "eu_q_mail")])
@example([("KV_shop-eu", "mail"), ("shop", "eu_dead")])
def test_no_two_pairs_give_one_name(pairs):
    """Different namespaces share no stream, bucket or consumer, and neither do two names in one namespace."""
    (one, name), (other, other_name) = pairs
    if one == other:
        assert Names(one).queue_stream(name) != Names(one).queue_stream(other_name)
        assert Names(one).dead_stream not in (
            Names(one).queue_stream(name),
            Names(one).queue_stream(other_name),
        )
    else:
        assert stream_names(one, name).isdisjoint(stream_names(other, other_name))
        assert Names(other).queue_of_stream(Names(one).queue_stream(name)) is None
    buckets = bucket_name(one, name), bucket_name(other, other_name)
    assert buckets == (None, None) or buckets[0] != buckets[1]
    streams = stream_names(one, name) | stream_names(other, other_name)
    assert streams.isdisjoint(bucket_stream(bucket) for bucket in buckets if bucket is not None)
    if one != other and buckets[0] is not None:
        assert Names(other).bucket_of_stream(bucket_stream(buckets[0])) is None
        assert Names(one).bucket_of_stream(bucket_stream(buckets[0])) == name
    assert Names(one).subscription_durable(name) != Names(other).subscription_durable(other_name)
    assert queue_key(one, name) != queue_key(other, other_name)


def test_ordinary_names_on_the_wire():
    """What an operator types stays what was declared."""
    for namespace in ("dramatiq", "my_app", "shop-2"):
        assert Names(namespace).queue_stream("mail") == f"{namespace}_q_mail"
        assert Names(namespace).dead_stream == f"{namespace}_dead"
    for namespace in ("dramatiq", "my_app"):
        assert Names(namespace).bucket("results") == f"{namespace}-results"
        assert Names(namespace).subscription_durable("reserve") == f"{namespace}-reserve"
    assert Names("shop-eu").bucket("results") == "shop_-eu-results"
    assert Names("shop_q").queue_stream("mail") == "shop=5Fq_q_mail"


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=2, unique=True))
def test_two_queues_share_nothing(queues):
    """Different queues have different streams and subjects, and so have different message ids."""
    names = Names("shop")
    one, other = queues
    assert names.queue_stream(one) != names.queue_stream(other)
    assert names.task(one) != names.task(other)
    assert names.delayed_message("default", one) != names.delayed_message("default", other)
    assert names.subscription_durable(one) != names.subscription_durable(other)


@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "a*", "é", "x" * 65, None, 7])
def test_a_namespace_that_nats_cannot_carry_is_refused(namespace):
    """The error names the namespace and says what is possible."""
    with pytest.raises(InvalidName, match=r"namespace .* cannot be used: choose"):
        Names(namespace)


@pytest.mark.parametrize("queue", ["", None, 7])
def test_a_queue_without_a_name_is_refused(queue):
    """A queue needs a name that is text."""
    with pytest.raises(InvalidName, match="non-empty string"):
        Names().queue_stream(queue)


def test_the_longest_queue_name_depends_on_the_namespace():
    """A stream's name ends at 255 bytes, its namespace included."""
    assert len(Names("n" * 64).queue_stream("q" * 188)) == 255
    with pytest.raises(InvalidName, match="189 bytes there, 188 are possible"):
        Names("n" * 64).queue_stream("q" * 189)
    with pytest.raises(InvalidName, match="too long"):
        Names("shop").queue_stream("é" * 100)


def test_an_actor_name_too_long_for_a_durable_is_refused():
    """An actor that subscribes to events needs a name that fits."""
    with pytest.raises(InvalidName, match="actor that subscribes"):
        Names("shop").subscription_durable("a" * 300)


@pytest.mark.parametrize("subject", ["", ".", "a..b", "a b", "a.*", "a.>", "a\n", "a.\x00", "a" * 1001])
def test_a_subject_that_nats_cannot_carry_is_refused(subject):
    """Empty tokens, white space, wildcards and endless subjects are refused before anything is sent."""
    with pytest.raises(InvalidName):
        check_subject(subject)


@pytest.mark.parametrize("subject", ["*", ">", "a.*.b", "a.>"])
def test_wildcards_are_for_subscriptions(subject):
    """Where a pattern is wanted, `*` stands for one token and `>` for the rest."""
    assert check_subject(subject, wildcards=True) == subject


@pytest.mark.parametrize("subject", [">.a", "a*", "a.>.b", "**"])
def test_wildcards_in_the_wrong_place_are_refused(subject):
    """A wildcard is a whole token, and `>` the last one."""
    with pytest.raises(InvalidName):
        check_subject(subject, wildcards=True)


def test_message_ids_of_any_length_have_a_subject_of_their_own():
    """Long ids are represented by their hash, and different ones still differ."""
    names = Names()
    long, other = "m" * 5_000, "m" * 4_999 + "n"
    assert len(names.delayed("q", long, "u")) < 200
    assert names.delayed_message("q", long) != names.delayed_message("q", other)


@pytest.mark.parametrize("bucket", ["", "a.b", "a b", "é"])
def test_a_bucket_name_that_nats_cannot_carry_is_refused(bucket):
    """Bucket names are chosen by programmers, who get an error at once."""
    with pytest.raises(InvalidName, match="bucket name"):
        Names().bucket(bucket)
