"""Every name on the wire: streams, subjects, durables, buckets, headers.

Dramatiq allows any string as the name of a queue, an actor or a message id; JetStream reserves dots,
spaces, slashes and wildcards. `encode` maps any string to one subject token and back, one to one, and
leaves ordinary names as they are, so that `nats stream ls` stays readable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import InvalidName

#: Headers that the library puts on messages. All are copied by the server from a schedule to the message
#: that the schedule produces, other than the `Nats-*` ones (ADR-51).
HEADER_MESSAGE_ID = "Dramatiq-Message-Id"
HEADER_ACTOR = "Dramatiq-Actor"
HEADER_ENQUEUED_AT = "Dramatiq-Enqueued-At"
HEADER_TICK = "Dramatiq-Periodic"
HEADER_PARTS = "Dramatiq-Parts"

#: Headers of a dead letter.
HEADER_DEAD_REASON = "Dramatiq-Dead-Reason"
HEADER_DEAD_ERROR = "Dramatiq-Dead-Error"
HEADER_DEAD_QUEUE = "Dramatiq-Dead-Queue"
HEADER_DEAD_SUBJECT = "Dramatiq-Dead-Subject"
HEADER_DEAD_ACTOR = "Dramatiq-Dead-Actor"
HEADER_DEAD_DELIVERIES = "Dramatiq-Dead-Deliveries"
HEADER_DEAD_AT = "Dramatiq-Dead-At"
HEADER_DEAD_WORKER = "Dramatiq-Dead-Worker"
HEADER_DEAD_HISTORY = "Dramatiq-Dead-History"
HEADER_DEAD_EVENT = "Dramatiq-Dead-Event"

#: Headers of the server.
HEADER_MSG_ID = "Nats-Msg-Id"
HEADER_TTL = "Nats-TTL"
HEADER_SCHEDULE = "Nats-Schedule"
HEADER_SCHEDULE_TARGET = "Nats-Schedule-Target"
HEADER_SCHEDULE_ZONE = "Nats-Schedule-Time-Zone"
HEADER_SCHEDULER = "Nats-Scheduler"
HEADER_SCHEDULE_NEXT = "Nats-Schedule-Next"
HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"
HEADER_EXPECTED_STREAM = "Nats-Expected-Stream"
HEADER_BATCH_ID = "Nats-Batch-Id"
HEADER_BATCH_SEQUENCE = "Nats-Batch-Sequence"
HEADER_BATCH_COMMIT = "Nats-Batch-Commit"

#: A stream's name becomes a directory of the server's store, and directories end at 255 bytes.
MAX_NAME_BYTES = 200

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PLAIN = re.compile(rb"[A-Za-z0-9_-]")
_SUBJECT_TOKEN = re.compile(r"[^\s.*>\x00-\x1f\x7f]+")


def encode(name: str) -> str:
    """Return `name` as one subject token: other bytes than letters, digits, `_` and `-` become `=XX`."""
    raw = name.encode("utf-8", "surrogatepass")
    if name.isascii() and name.replace("-", "").replace("_", "").isalnum():
        return name
    return "".join(chr(byte) if _PLAIN.match(bytes((byte,))) else f"={byte:02X}" for byte in raw)


def decode(token: str) -> str:
    """Return the name that `encode` made `token` from."""
    if "=" not in token:
        return token
    raw = re.sub(rb"=([0-9A-F]{2})", lambda m: bytes((int(m[1], 16),)), token.encode("ascii"))
    return raw.decode("utf-8", "surrogatepass")


def check_subject(subject: str, *, wildcards: bool = False) -> str:
    """Return `subject` if NATS can carry it.

    Raises:
      InvalidName: When it is empty, has empty tokens, white space, or wildcards where none are allowed.
    """
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
        token = encode(queue)
        if len(token) > MAX_NAME_BYTES:
            raise InvalidName(
                f"queue name {queue[:40]!r}… is too long for JetStream: it takes {len(token)} bytes there, "
                f"{MAX_NAME_BYTES} are possible."
            )
        return token

    # Streams

    def queue_stream(self, queue: str) -> str:
        return f"{self.namespace}_q_{self._queue(queue)}"

    def queue_of_stream(self, stream: str) -> str | None:
        """Return the queue that `stream` holds, or None for a stream of another kind or namespace."""
        prefix = f"{self.namespace}_q_"
        return decode(stream[len(prefix) :]) if stream.startswith(prefix) else None

    @property
    def dead_stream(self) -> str:
        return f"{self.namespace}_dead"

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
        return f"{self.namespace}.q.{self._queue(queue)}.at.{encode(message_id)}.{unique}"

    def delayed_message(self, queue: str, message_id: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.at.{encode(message_id)}.*"

    def all_delayed(self, queue: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.at.>"

    def periodic(self, queue: str, name: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.cron.{encode(name)}"

    def all_periodic(self, queue: str) -> str:
        return f"{self.namespace}.q.{self._queue(queue)}.cron.>"

    # Durables

    def worker_durable(self, priority: int | None = None) -> str:
        return "worker" if priority is None else f"worker-{priority}"

    def subscription_durable(self, actor_name: str) -> str:
        return f"{self.namespace}-{encode(actor_name)}"

    # Dead letters

    def dead(self, queue: str, letter: str) -> str:
        return f"{self.namespace}.dead.{self._queue(queue)}.{letter}"

    def dead_of_queue(self, queue: str) -> str:
        return f"{self.namespace}.dead.{self._queue(queue)}.>"

    @property
    def all_dead(self) -> str:
        return f"{self.namespace}.dead.>"

    # Buckets

    def bucket(self, name: str) -> str:
        if not _NAMESPACE.fullmatch(name):
            raise InvalidName(
                f"bucket name {name!r} cannot be used: choose 1 to 64 letters, digits, '_' or '-'."
            )
        return f"{self.namespace}-{name}"


def bucket_stream(bucket: str) -> str:
    """The stream under a key-value bucket (ADR-8)."""
    return f"KV_{bucket}"


def bucket_subject(bucket: str, key: str) -> str:
    """The subject of one key; keys may hold any characters, `/` and `.` separate levels as they do in NATS.

    A key is encoded token by token, so that a prefix that ends in `.` can be watched.
    """
    return f"$KV.{bucket}.{encode_key(key)}"


def encode_key(key: str) -> str:
    if not key:
        raise InvalidName("a key must not be empty.")
    return ".".join(encode(part) if part else "=" for part in key.split("."))


def decode_key(token: str) -> str:
    return ".".join("" if part == "=" else decode(part) for part in token.split("."))
