"""Keeps payment tokens: encrypted, apart from the orders, and only until they have been used.

An event or a record names a token by its *reference*, a digest, so it may be stored for any length of time. The
token itself lies in the bucket `tokens` under its order's id, encrypted with TOKEN_KEY, from before the order is
published until its payment is decided or the order is rejected. What is never decided expires.

A crash after a token was kept and before its order was published leaves an entry that expires. A crash after the
payment was decided and before the token was dropped is mended when the step is done again.

``python -m tasks.token_key`` prints a new key. Several keys stand after one another with commas: the first encrypts,
all decrypt, so a new one is put in front and the old one is taken away when what it encrypted has expired.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Final

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import KeyExists

from .ports import Bucket

BUCKET: Final = "tokens"

#: For how long a token is kept whose payment was never decided, in milliseconds: beyond PAYMENT_PATIENCE and, where
#: offers are made, OFFER_DEADLINE.
KEPT_MS: Final = 7 * 86_400_000

_REFERENCE = re.compile(r"sealed_[0-9a-f]{40}", re.ASCII)


class TokenMissing(Exception):
    """The token of an order that is still to be paid is not kept any more."""


class TokenUnreadable(Exception):
    """A token was encrypted with a key that is not among those of TOKEN_KEY, or there are none."""


def reference(customer_id: str, token: str) -> str:
    """Return what stands for a token in an order of this customer; the same token always has the same."""
    if not token:
        return ""
    digest = hashlib.sha256(json.dumps([customer_id, token]).encode()).hexdigest()
    return f"sealed_{digest[:40]}"


def is_reference(token: str) -> bool:
    """Whether a text of an event stands for a token that is kept elsewhere."""
    return _REFERENCE.fullmatch(token) is not None


class Tokens:
    """The tokens in their bucket.

    Parameters:
      bucket: Where they are kept.
      keys: Fernet keys; the first encrypts. Without any, tokens can only be dropped.
      ttl: Milliseconds for which a token is kept at most.
    """

    def __init__(self, bucket: Bucket, keys: Iterable[str], *, ttl: int) -> None:
        self._bucket = bucket
        self._ciphers = [Fernet(key) for key in keys]
        self._ttl = ttl

    @property
    def _cipher(self) -> MultiFernet:
        if not self._ciphers:
            raise TokenUnreadable("payment tokens are neither kept nor read here: TOKEN_KEY is not set.")
        return MultiFernet(self._ciphers)

    def keep(self, order_id: str, customer_id: str, token: str) -> None:
        """Keep an order's token until it is dropped."""
        # With the order's id, so that an entry that was copied under another id opens nothing.
        sealed = self._cipher.encrypt(json.dumps([order_id, reference(customer_id, token), token]).encode())
        try:
            self._bucket.create(order_id, sealed, ttl=self._ttl)
        except KeyExists:
            pass  # an earlier run of the same request, or step, has kept it

    def find(self, order_id: str, named: str) -> str | None:
        """Return the token that a reference names, None when it is not kept any more.

        Raises:
          TokenUnreadable: When the key is missing with which it was encrypted.
        """
        # A server that was the leader a moment ago may not have it yet, and an order must not be declined for that.
        entry = self._bucket.get(order_id) or self._bucket.get(order_id, linearizable=True)
        if entry is None:
            return None
        try:
            kept_for, kept_as, token = json.loads(self._cipher.decrypt(entry.value))
        except InvalidToken:
            raise TokenUnreadable(
                f"the payment token of order {order_id} was encrypted with a key that TOKEN_KEY does not have."
            ) from None
        return str(token) if (kept_for, kept_as) == (order_id, named) else None

    def drop(self, order_id: str) -> None:
        """Forget an order's token, which is not needed any more; when that fails it expires."""
        try:
            if self._bucket.get(order_id) is not None:
                self._bucket.delete(order_id)
        except BrokerError:
            pass
