"""Verifies the tokens of an OpenID provider: signature, issuer, audience and time (RFC 9068, RFC 8725).

The provider's keys are fetched when they are first needed and again after an hour; a token that does not match them
causes a fetch at once, at most once a minute. One thread fetches, bounded in time and size, and while the provider does
not answer, the earlier keys stay valid for a day. Only signatures with a private key are accepted, so that a public key
can never be used as a password.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

import requests
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry

from tasks.answers import timed, within
from tasks.settings import Settings

logger = logging.getLogger(__name__)

ALGORITHMS: Final = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "Ed25519",
    "EdDSA",
)

#: How much the provider's clock and ours may differ, in seconds.
LEEWAY_SECONDS: Final = 60
#: How long fetched keys are used without a refresh, how long at most, and how often a refresh is tried.
FRESH_SECONDS: Final = 3_600.0
STALE_SECONDS: Final = 86_400.0
RETRY_SECONDS: Final = 60.0

_FETCH_SECONDS = 5.0
_MAX_FETCHED = 512_000


class InvalidToken(Exception):
    """The token proves nothing; the message says why, and has nothing of the token in it."""


class ProviderUnavailable(Exception):
    """The provider's keys cannot be had right now."""


class Provider:
    """The OpenID provider of the settings. Any thread may use it."""

    def __init__(self, settings: Settings) -> None:
        assert settings.oidc_issuer is not None
        self.issuer = settings.oidc_issuer
        self.metadata_url = f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"
        self._audience = settings.oidc_audience
        self._keys: KeySet | None = None
        self._fetched = self._tried = float("-inf")
        self._lock = threading.Lock()

    @property
    def takes_tokens(self) -> bool:
        """Whether bearer tokens are accepted at all."""
        return self._audience is not None

    def verify(self, token: str) -> Mapping[str, Any]:
        """Return the claims of a token that is valid now and meant for us.

        Raises:
          InvalidToken: When it is not.
          ProviderUnavailable: When that cannot be told, because its keys were never fetched.
        """
        registry = JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
        keys = self._current()
        try:
            try:
                decoded = jwt.decode(token, keys, registry=registry)
            except (JoseError, ValueError):
                # A new key of the provider, or a forgery; the fetch tells, and is not made for every forgery.
                renewed = self._renewed(keys)
                if renewed is None:
                    raise
                decoded = jwt.decode(token, renewed, registry=registry)
            claims = jwt.JWTClaimsRegistry(
                leeway=LEEWAY_SECONDS,
                iss={"essential": True, "value": self.issuer},
                aud={"essential": True, "value": self._audience or ""},
                exp={"essential": True},
                sub={"essential": True},
            )
            claims.validate(decoded.claims)
        except (JoseError, ValueError, TypeError) as error:
            raise InvalidToken(_reason(error)) from None
        return decoded.claims

    def _current(self) -> KeySet:
        age = time.monotonic() - self._fetched
        if self._keys is None or age > FRESH_SECONDS:
            self._fetch(self._fetched)
        if self._keys is None or time.monotonic() - self._fetched > STALE_SECONDS:
            raise ProviderUnavailable(f"the keys of {self.issuer} cannot be fetched")
        return self._keys

    def _renewed(self, known: KeySet) -> KeySet | None:
        self._fetch(self._fetched)
        return None if self._keys is known else self._keys

    def _fetch(self, seen: float) -> None:
        """Fetch the keys, unless another thread does so or has just done so, or it was tried a moment ago."""
        # Without any keys there is nothing to go on with meanwhile.
        if not self._lock.acquire(blocking=self._keys is None):
            return
        try:
            now = time.monotonic()
            if self._fetched != seen or now - self._tried < RETRY_SECONDS:
                return
            self._tried = now
            try:
                metadata = _get(self.metadata_url)
                if metadata.get("issuer") != self.issuer:
                    raise ValueError("its issuer is another one than OIDC_ISSUER")
                self._keys = KeySet.import_key_set(_get(str(metadata.get("jwks_uri"))))  # type: ignore[arg-type]
                self._fetched = time.monotonic()
            except (requests.RequestException, JoseError, ValueError, TypeError, KeyError) as error:
                logger.warning("The keys of %s cannot be fetched: %s", self.issuer, error)
        finally:
            self._lock.release()


def _get(url: str) -> dict[str, Any]:
    """Fetch a JSON object of bounded size within a bounded time."""
    with (
        within(_FETCH_SECONDS),
        timed(requests.Session()) as session,
        session.get(url, timeout=_FETCH_SECONDS, stream=True, allow_redirects=False) as answer,
    ):
        if answer.status_code != 200:
            raise ValueError(f"{url} answered {answer.status_code}")
        body = b""
        for chunk in answer.iter_content(16_384):
            body += chunk
            if len(body) > _MAX_FETCHED:
                raise ValueError(f"{url} answered with too much")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError(f"{url} did not answer with a JSON object")
    return found


def _reason(error: Exception) -> str:
    text = getattr(error, "error", "") or type(error).__name__
    claim = getattr(error, "claim", None)
    return f"{text} ({claim})" if claim else str(text)
