"""The credentials that the service itself hands out: API keys of programs and passwords of operators.

Both live in the bucket `access`: `keys.<id>`, `used.<id>` (when a key was last used) and `operators.<name>`. Neither
a key's secret nor a password is stored: of a secret, which is random, its SHA-256; of a password its Argon2 hash.

Every process of the front end remembers what it read for `REMEMBERED_SECONDS`, so a credential that is revoked is
refused everywhere after that time. A crash between making a key and showing it leaves a key that no program knows:
`list` shows it, `revoke` ends it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import KeyExists

from .parsing import check_customer_id
from .ports import Bucket

BUCKET: Final = "access"

#: Every scope with those that it includes.
SCOPES: Final[dict[str, frozenset[str]]] = {
    "order": frozenset({"order"}),
    "read": frozenset({"read"}),
    "operate": frozenset({"operate", "read", "order"}),
    "admin": frozenset({"admin", "operate", "read", "order"}),
}

#: For how long a process acts on what it read of a credential.
REMEMBERED_SECONDS: Final = 5.0
#: How many credentials a process remembers; unknown ones count too, so that guessing costs no memory.
REMEMBERED: Final = 4_096

#: How often the last use of a key is noted, in milliseconds.
NOTED_EVERY_MS: Final = 60_000

#: For how many days a key that expires is valid at most.
MAX_DAYS: Final = 3_650

MIN_PASSWORD: Final = 12
MAX_PASSWORD: Final = 256

_PREFIX = "ord"
_KEY = re.compile(rf"{_PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}", re.ASCII)


class InvalidCredential(ValueError):
    """A key or an operator cannot be made like this; the message says why in one sentence."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A program's key. With a customer it acts for that customer alone. Times are milliseconds."""

    id: str
    name: str
    scopes: tuple[str, ...]
    customer_id: str | None
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    digest: str = ""

    def is_valid(self, now: int) -> bool:
        """Whether the key opens anything at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class Operator:
    """A person who signs in with a password; `changed_at` is when the password or the scopes were set."""

    name: str
    scopes: tuple[str, ...]
    password: str
    changed_at: int


class Remembered:
    """Reads a bucket through a small memory of what was read a moment ago; any thread may use it."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._entries: OrderedDict[str, tuple[float, bytes | None]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """Return the key's value as it was at most `REMEMBERED_SECONDS` ago."""
        now = time.monotonic()
        with self._lock:
            known = self._entries.get(key)
        if known is not None and now - known[0] < REMEMBERED_SECONDS:
            return known[1]
        entry = self._bucket.get(key)
        value = None if entry is None else entry.value
        with self._lock:
            self._entries[key] = (now, value)
            self._entries.move_to_end(key)
            while len(self._entries) > REMEMBERED:
                self._entries.popitem(last=False)
        return value


class Keys:
    """The API keys.

    Parameters:
      bucket: Where they are kept.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._now = now
        self._remembered = Remembered(bucket)
        self._noted: OrderedDict[str, int] = OrderedDict()

    def add(
        self, name: str, scopes: Iterable[str], customer_id: str | None = None, expires_at: int | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns it, and its text, which cannot be had again.

        Raises:
          InvalidCredential: For a name, scope or customer that a key cannot have.
        """
        chosen = _scopes(scopes)
        if customer_id is not None:
            try:
                customer_id = check_customer_id(customer_id)
            except ValueError as error:
                raise InvalidCredential(f"The customer cannot be used: {error}") from None
            if set(chosen) - {"order", "read"}:
                raise InvalidCredential("A key for one customer has the scopes order and read at most.")
        now = self._now()
        if expires_at is not None and expires_at <= now:
            raise InvalidCredential("The key would have expired already.")
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        key = ApiKey(
            key_id, _checked_name(name), chosen, customer_id, now, expires_at, digest=_digest(secret)
        )
        self._bucket.create(f"keys.{key_id}", _encode(key))
        return key, f"{_PREFIX}_{key_id}_{secret}"

    def find(self, text: str) -> ApiKey | None:
        """Return the key with this text, None when there is none or it is over."""
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        value = self._remembered.get(f"keys.{match[1]}")
        if value is None:
            return None
        key = _key(value)
        if not hmac.compare_digest(key.digest, _digest(match[2])) or not key.is_valid(self._now()):
            return None
        self._note(key)
        return key

    def list(self) -> list[tuple[ApiKey, int | None]]:
        """Return all keys, oldest first, each with when it was last used (to the minute)."""
        used = {entry.key.removeprefix("used."): int(entry.value) for entry in self._bucket.items("used.")}
        keys = [_key(entry.value) for entry in self._bucket.items("keys.")]
        return [(key, used.get(key.id)) for key in sorted(keys, key=lambda key: (key.created_at, key.id))]

    def revoke(self, key_id: str) -> bool:
        """End a key; False when there is none with this id. A key stays listed for the record."""
        entry = self._bucket.get(f"keys.{key_id}")
        if entry is None:
            return False
        stored = json.loads(entry.value)
        if stored["revoked_at"] is None:
            stored["revoked_at"] = self._now()
            self._bucket.update(f"keys.{key_id}", _dump(stored), revision=entry.revision)
        return True

    def _note(self, key: ApiKey) -> None:
        """Note that the key was used, unless this process did so a moment ago; that it fails stops no request."""
        now = self._now()
        if now - self._noted.get(key.id, 0) < NOTED_EVERY_MS:
            return
        self._noted[key.id] = now
        if len(self._noted) > REMEMBERED:
            self._noted.popitem(last=False)
        try:
            entry = self._bucket.get(f"used.{key.id}")
            revision = 0 if entry is None else entry.revision
            if entry is None:
                self._bucket.create(f"used.{key.id}", b"%d" % now)
            elif int(entry.value) < now - NOTED_EVERY_MS:
                self._bucket.update(f"used.{key.id}", b"%d" % now, revision=revision)
        except BrokerError:
            pass  # another process noted it at the same time, or the store is away


class Operators:
    """The people who sign in with a password.

    Parameters:
      bucket: Where they are kept.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._now = now
        self._remembered = Remembered(bucket)
        self._hasher = PasswordHasher()
        # A hash takes 64 MiB while it is computed: two at a time, whatever comes in.
        self._turns = threading.BoundedSemaphore(2)
        self._no_such_person = self._hasher.hash(secrets.token_urlsafe(16))

    def set(self, name: str, password: str, scopes: Iterable[str]) -> Operator:
        """Make an operator, or give one a new password and scopes, which ends the sessions of the old.

        Raises:
          InvalidCredential: For a name, password or scope that cannot be used.
        """
        if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
            raise InvalidCredential(f"A password has {MIN_PASSWORD} to {MAX_PASSWORD} characters.")
        operator = Operator(_checked_name(name), _scopes(scopes), self._hasher.hash(password), self._now())
        key, value = f"operators.{operator.name}", _encode(operator)
        try:
            self._bucket.create(key, value)
        except KeyExists:
            entry = self._bucket.get(key)
            self._bucket.update(key, value, revision=0 if entry is None else entry.revision)
        return operator

    def remove(self, name: str) -> bool:
        """Remove an operator, which ends their sessions; False when there is none."""
        if self._bucket.get(f"operators.{name}") is None:
            return False
        self._bucket.delete(f"operators.{name}")
        return True

    def list(self) -> list[Operator]:
        """Return all operators by name."""
        return sorted(
            map(_operator, (e.value for e in self._bucket.items("operators."))), key=lambda o: o.name
        )

    def find(self, name: str) -> Operator | None:
        """Return the operator of this name as it was a moment ago."""
        value = self._remembered.get(f"operators.{name}") if _NAME.fullmatch(name) else None
        return None if value is None else _operator(value)

    def check(self, name: str, password: str) -> Operator | None:
        """Return the operator if the password is theirs. It takes as long for a name that does not exist."""
        operator = self.find(name)
        with self._turns:
            try:
                self._hasher.verify(
                    self._no_such_person if operator is None else operator.password, password[:MAX_PASSWORD]
                )
            except (VerificationError, InvalidHashError):
                return None
        return operator


def _scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    given = set(scopes)
    if not given or given - SCOPES.keys():
        raise InvalidCredential(f"Scopes are one or more of {', '.join(SCOPES)}.")
    return tuple(scope for scope in SCOPES if scope in given)


def _checked_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise InvalidCredential("A name has 1 to 64 letters, digits, '.', '_', '@', '+' or '-'.")
    return name


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _encode(record: ApiKey | Operator) -> bytes:
    return _dump(asdict(record))


def _dump(stored: dict[str, Any]) -> bytes:
    return json.dumps(stored, separators=(",", ":")).encode()


def _key(value: bytes) -> ApiKey:
    stored = json.loads(value)
    return ApiKey(**{**stored, "scopes": tuple(stored["scopes"])})


def _operator(value: bytes) -> Operator:
    stored = json.loads(value)
    return Operator(**{**stored, "scopes": tuple(stored["scopes"])})
