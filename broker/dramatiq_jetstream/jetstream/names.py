"""Every name on the wire: streams, subjects, durables, buckets, headers.

Dramatiq allows any string as the name of a queue, an actor or a message id; JetStream reserves dots,
spaces, slashes and wildcards. `encode` maps any string to one subject token and back, one to one, and
leaves ordinary names as they are, so that `nats stream ls` stays readable.

Streams, buckets and durables are called `{namespace}_q_{queue}`, `{namespace}-{bucket}` and `{namespace}-{actor}`.
A namespace that itself contains such a separator has it marked, so that no two namespaces ever share a name.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dramatiq_jetstream.errors import InvalidName

#: Headers that the library puts on messages. All are copied by the server from a schedule to the message
#: that the schedule produces, other than the `Nats-*` ones (ADR-51).
#: What the names of this library's own headers begin with.
OWN_HEADERS = b"Dramatiq-"

HEADER_MESSAGE_ID = "Dramatiq-Message-Id"
HEADER_ACTOR = "Dramatiq-Actor"
HEADER_ENQUEUED_AT = "Dramatiq-Enqueued-At"
HEADER_TICK = "Dramatiq-Periodic"
HEADER_PARTS = "Dramatiq-Parts"
HEADER_BODY = "Dramatiq-Body"

# On a message that was requeued with a delay: what it was before, so that its runs and follow-ups are recognised. They
# stay on the queue; dead letters and follow-ups do not have them.
HEADER_ORIGIN = "Dramatiq-Origin"
HEADER_EARLIER_DELIVERIES = "Dramatiq-Earlier-Deliveries"
HEADER_UNKNOWN_SINCE = "Dramatiq-Unknown-Since"
HEADER_MOMENT = "Dramatiq-Moment"
REQUEUE_HEADERS = frozenset({HEADER_ORIGIN, HEADER_EARLIER_DELIVERIES, HEADER_UNKNOWN_SINCE, HEADER_MOMENT})

#: Headers of a dead letter.
HEADER_DEAD_REASON = "Dramatiq-Dead-Reason"
HEADER_DEAD_ERROR = "Dramatiq-Dead-Error"
HEADER_DEAD_TRACEBACK = "Dramatiq-Dead-Traceback"
HEADER_DEAD_QUEUE = "Dramatiq-Dead-Queue"
HEADER_DEAD_SUBJECT = "Dramatiq-Dead-Subject"
HEADER_DEAD_ACTOR = "Dramatiq-Dead-Actor"
HEADER_DEAD_DELIVERIES = "Dramatiq-Dead-Deliveries"
HEADER_DEAD_AT = "Dramatiq-Dead-At"
HEADER_DEAD_WORKER = "Dramatiq-Dead-Worker"
HEADER_DEAD_HISTORY = "Dramatiq-Dead-History"
HEADER_DEAD_EVENT = "Dramatiq-Dead-Event"
HEADER_DEAD_BODY = "Dramatiq-Dead-Body"

#: What follows a dead letter's subject in that of its body, where it is stored apart.
BODY_SUFFIX = ".body"

#: Headers of the server.
HEADER_MSG_ID = "Nats-Msg-Id"
HEADER_TTL = "Nats-TTL"
HEADER_SCHEDULE = "Nats-Schedule"
HEADER_SCHEDULE_TARGET = "Nats-Schedule-Target"
HEADER_SCHEDULE_ZONE = "Nats-Schedule-Time-Zone"
HEADER_SCHEDULER = "Nats-Scheduler"
HEADER_SCHEDULE_NEXT = "Nats-Schedule-Next"
HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"
HEADER_EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence-Subject"
HEADER_EXPECTED_STREAM = "Nats-Expected-Stream"
HEADER_BATCH_ID = "Nats-Batch-Id"
HEADER_BATCH_SEQUENCE = "Nats-Batch-Sequence"
HEADER_BATCH_COMMIT = "Nats-Batch-Commit"

#: The message option that carries the trace context, and the W3C headers in it. On the wire they are headers as well,
#: so that other programs find them.
OPTION_TRACE_CONTEXT = "trace_context"
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")

#: Metadata of a subscription's durable: the namespace and queue of its actor.
METADATA_SUBSCRIBER = "dramatiq-subscriber"

#: Metadata of a durable that started at the position of its actor's earlier durable.
METADATA_AFTER = "dramatiq-after"

#: Metadata of a consumer whose `ack_wait` is about to become shorter: the new value, in milliseconds.
METADATA_ACK_WAIT = "dramatiq-ack-wait"

#: The longest name of a stream or consumer that the server takes: it becomes a directory of its store.
MAX_NAME_BYTES = 255

#: A longer subject would break the server's limit for one line of its protocol (4 KiB, with reply and
#: sizes); the server then closes the connection.
MAX_SUBJECT_BYTES = 1_000

#: A message id takes up to this many bytes of a subject; a longer one is represented by its hash.
MAX_ID_BYTES = 200

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PLAIN = re.compile(rb"[A-Za-z0-9_-]")
_SUBJECT_TOKEN = re.compile(r"[^\s.*>\x00-\x1f\x7f]+")


def trace_headers(context: object) -> dict[str, str]:
    """The headers in the option OPTION_TRACE_CONTEXT; what no header can carry is left out."""
    if not isinstance(context, Mapping):
        return {}
    found = {name: context.get(name) for name in TRACE_HEADERS}
    return {
        name: text for name, text in found.items() if isinstance(text, str) and text and text.isprintable()
    }


def encode(name: str) -> str:
    """Return `name` as one subject token: other bytes than letters, digits, `_` and `-` become `=XX`.

    The empty name becomes a lone `=`.
    """
    if not name:
        return "="
    raw = name.encode("utf-8", "surrogatepass")
    if name.isascii() and name.replace("-", "").replace("_", "").isalnum():
        return name
    return "".join(chr(byte) if _PLAIN.match(bytes((byte,))) else f"={byte:02X}" for byte in raw)


def decode(token: str) -> str:
    """Return the name that `encode` made `token` from."""
    if "=" not in token:
        return token
    if token == "=":
        return ""
    raw = re.sub(rb"=([0-9A-F]{2})", lambda m: bytes((int(m[1], 16),)), token.encode("ascii"))
    return raw.decode("utf-8", "surrogatepass")


def _before_queue(namespace: str) -> str:
    """A namespace as it stands before `_q_` and `_dead`: the first `_q_` of the whole name is the separator.

    `shop_q` becomes `shop=5Fq`, and `KV_shop`, with which a bucket's stream could begin, `KV=5Fshop`; all others stay
    as they are.
    """
    return re.sub(r"(?<=\AKV)_|_(?=q(_|$))", "=5F", namespace)


def _before_dash(namespace: str) -> str:
    """A namespace as it stands before `-`: the separator is the first dash after an even number of underscores.

    `shop-eu` becomes `shop_-eu`. Tools restrict a bucket's name to letters, digits, `-` and `_`.
    """
    return re.sub(r"(_*)(-|$)", lambda found: found[1] * 2 + ("_-" if found[2] else ""), namespace)


def id_token(message_id: str) -> str:
    """A message id as a subject token of limited length; ids may come from anywhere and be of any length."""
    token = encode(message_id)
    if len(token) <= MAX_ID_BYTES:
        return token
    return f"=~{hashlib.sha256(message_id.encode('utf-8', 'surrogatepass')).hexdigest()}"


def check_subject(subject: str, *, wildcards: bool = False) -> str:
    """Return `subject` if NATS can carry it.

    Raises:
      InvalidName: When it is empty, has empty tokens, white space, or wildcards where none are allowed, or
        is longer than 1,000 bytes.
    """
    return _checked_subject(subject, wildcards)


@functools.lru_cache(maxsize=1_000)
def _checked_subject(subject: str, wildcards: bool) -> str:
    if len(subject.encode("utf-8", "surrogatepass")) > MAX_SUBJECT_BYTES:
        raise InvalidName(
            f"the subject {subject[:40]!r}… is too long for NATS: {MAX_SUBJECT_BYTES} bytes are possible."
        )
    tokens = subject.split(".")
    for position, token in enumerate(tokens):
        if wildcards and (token == "*" or (token == ">" and position == len(tokens) - 1)):
            continue
        if not _SUBJECT_TOKEN.fullmatch(token):
            raise InvalidName(
                f"{subject!r} is not a subject that NATS can carry: tokens between dots must be non-empty "
                "and free of white space and wildcards."
            )
    return subject


def covers(kept: str, wanted: str) -> bool:
    """Whether everything on subject `wanted` is also on `kept`; both may have wildcards."""
    kept_tokens, wanted_tokens = kept.split("."), wanted.split(".")
    for position, token in enumerate(kept_tokens):
        if token == ">":
            return len(wanted_tokens) > position
        if position >= len(wanted_tokens):
            return False
        if token != "*" and token != wanted_tokens[position]:
            return False
        if token == "*" and wanted_tokens[position] == ">":
            return False
    return len(kept_tokens) == len(wanted_tokens)


@functools.lru_cache(maxsize=1_000)
def _queue_token(namespace: str, queue: str) -> str:
    token = encode(queue)
    possible = MAX_NAME_BYTES - len(f"{_before_queue(namespace)}_q_")
    if len(token) > possible:
        raise InvalidName(
            f"queue name {queue[:40]!r}… is too long for JetStream: it takes {len(token)} bytes there, "
            f"{possible} are possible beside the namespace."
        )
    return token


@dataclass(frozen=True)
class Names:
    """The wire names of one namespace; two programs that share it share their queues."""

    namespace: str = "dramatiq"

    def __post_init__(self) -> None:
        if not isinstance(self.namespace, str) or not _NAMESPACE.fullmatch(self.namespace):
            raise InvalidName(
                f"namespace {self.namespace!r} cannot be used: choose 1 to 64 letters, digits, '_' or '-'."
            )

    def _queue(self, queue: str) -> str:
        if not isinstance(queue, str) or not queue:
            raise InvalidName(f"queue name {queue!r} cannot be used: it must be a non-empty string.")
        return _queue_token(self.namespace, queue)

    # Streams

    def queue_stream(self, queue: str) -> str:
        return f"{_before_queue(self.namespace)}_q_{self._queue(queue)}"

    def queue_of_stream(self, stream: str) -> str | None:
        """Return the queue that `stream` holds, or None for a stream of another kind or namespace."""
        prefix = f"{_before_queue(self.namespace)}_q_"
        return decode(stream[len(prefix) :]) if stream.startswith(prefix) else None

    @property
    def dead_stream(self) -> str:
        return f"{_before_queue(self.namespace)}_dead"

    @property
    def history_stream(self) -> str:
        return f"{_before_queue(self.namespace)}_history"

    # Subjects of a queue

    def queue_subjects(self, queue: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.>"

    def task(self, queue: str, priority: int | None = None) -> str:
        """The subject on which ready messages of a queue wait; one per priority where there are several."""
        subject = f"{self.namespace}.q.{self._queue(queue)}.task"
        return subject if priority is None else f"{subject}.{priority}"

    def tasks(self, queue: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.task.>"

    def delayed(self, queue: str, message_id: str, unique: str) -> str:
        """The subject of one schedule; `unique` keeps two delays of the same message apart."""
        return f"{self.namespace}.q.{self._queue(queue)}.at.{id_token(message_id)}.{unique}"

    def delayed_message(self, queue: str, message_id: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.at.{id_token(message_id)}.*"

    def in_line(self, queue: str, line: str) -> str:
        """The delayed messages that wait in one line for a turn."""
        return f"{self.namespace}.q.{self._queue(queue)}.at.*.{line}"

    def all_delayed(self, queue: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.at.>"

    def periodic(self, queue: str, name: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.cron.{encode(name)}"

    def all_periodic(self, queue: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.cron.>"

    # Durables

    def worker_durable(self, priority: int | None = None) -> str:
        return "worker" if priority is None else f"worker-{priority}"

    def priority_of_durable(self, durable: str) -> int | None:
        """Return the priority that a durable of a queue is for, or None for 0 and for another program's."""
        base, _, priority = durable.partition("-")
        return int(priority) if base == self.worker_durable() and priority.isdecimal() else None

    def subscription_durable(self, actor_name: str) -> str:
        durable = f"{_before_dash(self.namespace)}-{encode(actor_name)}"
        if len(durable) > MAX_NAME_BYTES:
            raise InvalidName(
                f"the name {actor_name[:40]!r}… of an actor that subscribes to events is too long for JetStream: "
                f"it takes {len(durable)} bytes with the namespace, {MAX_NAME_BYTES} are possible."
            )
        return durable

    def subscriber(self, queue: str) -> str:
        return f"{self.namespace}/{queue}"

    # Dead letters

    def dead(self, queue: str, letter: str) -> str:
        return f"{self.namespace}.dead.{self._queue(queue)}.{letter}"

    def dead_at(self, letter: str) -> str:
        """The subject of a dead letter whose queue is not known."""
        return f"{self.namespace}.dead.*.{letter}"

    def dead_body(self, queue: str, letter: str) -> str:
        """The subject of a dead letter's body that is too large for one message with the letter's headers."""
        return f"{self.dead(queue, letter)}{BODY_SUFFIX}"

    def is_dead_body(self, subject: str) -> bool:
        """Whether a subject of the dead letters is that of a body, which has one token more than its letter."""
        return subject.count(".") > self.all_dead.count(".")

    def dead_of_queue(self, queue: str) -> str:
        return f"{self.namespace}.dead.{self._queue(queue)}.*"

    def dead_with_bodies(self, queue: str) -> str:
        return f"{self.namespace}.dead.{self._queue(queue)}.>"

    @property
    def all_dead(self) -> str:
        return f"{self.namespace}.dead.*.*"

    @property
    def all_dead_with_bodies(self) -> str:
        return f"{self.namespace}.dead.>"

    # History

    def history(self, queue: str, actor: str, message_id: str) -> str:
        """Where the attempts of one message are recorded."""
        return f"{self.namespace}.history.{self._queue(queue)}.{id_token(actor)}.{id_token(message_id)}"

    def history_of(self, queue: str | None = None, actor: str | None = None) -> str:
        """The records of a queue, of an actor, or all."""
        queue_token = "*" if queue is None else self._queue(queue)
        return f"{self.namespace}.history.{queue_token}.{'*' if actor is None else id_token(actor)}.*"

    def history_of_message(self, message_id: str) -> str:
        return f"{self.namespace}.history.*.*.{id_token(message_id)}"

    @property
    def all_history(self) -> str:
        return f"{self.namespace}.history.>"

    # Activity

    @property
    def activity_stream(self) -> str:
        return f"{_before_queue(self.namespace)}_activity"

    def activity(self, minute: int, queue: str, what: str, bits: int) -> str:
        """The counter of something that happened on a queue within a minute since 1970."""
        return f"{self.namespace}.activity.{minute}.{self._queue(queue)}.{what}.{bits}"

    def activity_of(self, minute: int | None = None) -> str:
        return f"{self.namespace}.activity.{'*' if minute is None else minute}.*.*.*"

    # Audit

    @property
    def audit_stream(self) -> str:
        return f"{_before_queue(self.namespace)}_audit"

    @property
    def all_audits(self) -> str:
        return f"{self.namespace}.audit.*"

    def audit(self, change: str) -> str:
        """The subject of one change."""
        return f"{self.namespace}.audit.{change}"

    # Buckets

    def bucket(self, name: str) -> str:
        if not _NAMESPACE.fullmatch(name):
            raise InvalidName(
                f"bucket name {name!r} cannot be used: choose 1 to 64 letters, digits, '_' or '-'."
            )
        return f"{_before_dash(self.namespace)}-{name}"

    def bucket_of_stream(self, stream: str) -> str | None:
        """Return the bucket of this namespace that `stream` holds, or None."""
        prefix = bucket_stream(f"{_before_dash(self.namespace)}-")
        return stream[len(prefix) :] if stream.startswith(prefix) else None


def bucket_stream(bucket: str) -> str:
    """The stream under a key-value bucket (ADR-8)."""
    return f"KV_{bucket}"


def queue_key(queue: str, name: str) -> str:
    """The key of something that belongs to a queue."""
    return f"{encode(queue)}/{name}"


def bucket_subject(bucket: str, key: str) -> str:
    """The subject of one key; keys may hold any characters, `/` and `.` separate levels as they do in NATS.

    A key is encoded token by token, so that a prefix that ends in `.` can be watched.
    """
    return f"$KV.{bucket}.{encode_key(key)}"


def encode_key(key: str) -> str:
    if not key:
        raise InvalidName("a key must not be empty.")
    return ".".join(encode(part) for part in key.split("."))


def short_key(key: str) -> str:
    """A key made from another program's text; a hash replaces one that is too long for a subject."""
    if len(encode_key(key)) <= MAX_SUBJECT_BYTES:
        return key
    return f"=~{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def decode_key(token: str) -> str:
    return ".".join(decode(part) for part in token.split("."))
