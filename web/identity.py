"""Says who makes a request: one `Caller`, found once, whatever they showed to prove it.

===================  ==========================================================================
what comes           who it is
===================  ==========================================================================
an API key           the program it was made for (`tasks.credentials`)
a bearer JWT         who the OpenID provider says, if the token is meant for us (`web.tokens`)
a session cookie     the person who signed in on the pages (`web.sign_in`)
nothing, from here   anyone on this machine, while ACCESS is `open`
nothing              nobody
===================  ==========================================================================

An invalid credential is an error and never counts as none: a program with an expired key is not served as a stranger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask import current_app, request, session

from tasks import app
from tasks.credentials import SCOPES, ApiKey
from tasks.parsing import check_customer_id
from tasks.service import InvalidOrder, Order
from tasks.settings import Settings, is_loopback
from web.problems import Problem, unavailable
from web.tokens import InvalidToken, Provider, ProviderUnavailable

_CHALLENGE = "Bearer"

# How a proxy's headers begin.
_FORWARDED = ("HTTP_FORWARDED", "HTTP_X_FORWARDED", "HTTP_X_REAL_IP")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request.

    Attributes:
      name: What the pages and the log call them.
      kind: machine, customer, operator or open.
      scopes: What they may do, with what that includes.
      customer_id: The one customer for whom they act; None for one who acts for all.
      by_cookie: Whether a browser proves it unasked, so that a foreign site could make it do so.
      subject: The provider's name for them, which never changes; empty for those that it does not know.
    """

    name: str
    kind: str
    scopes: frozenset[str]
    customer_id: str | None = None
    by_cookie: bool = False
    subject: str = ""

    @property
    def space(self) -> str:
        """What the caller's idempotency keys belong to: it stays the same when a key or token is renewed."""
        if self.customer_id is not None:
            return f"customer:{self.customer_id}"
        return f"{self.kind}:{self.subject or self.name}"

    def may(self, *scopes: str) -> bool:
        """Whether the caller has one of the scopes."""
        return not self.scopes.isdisjoint(scopes)

    def sees(self, order: Order) -> bool:
        """Whether the order is one that this caller may know of."""
        return self.may("read") if self.customer_id is None else order.customer_id == self.customer_id

    @property
    def must_say_why(self) -> bool:
        """Whether the caller cancels others' orders, so that there is no cancel without a reason."""
        return self.kind != "open" and self.customer_id is None and self.may("operate")

    @property
    def sees_causes(self) -> bool:
        """Whether the caller is told of what a step failed technically; a customer is told what that means for them."""
        return self.customer_id is None

    def may_order_for(self, customer_id: str) -> bool:
        """Whether the caller may place orders for this customer."""
        return self.may("order") and self.customer_id in (None, customer_id)


ALL = frozenset(SCOPES)
OPEN = Caller("anyone on this machine", "open", ALL, by_cookie=True)


def identify() -> Caller | None:
    """Return who makes this request, None for a stranger.

    Raises:
      Problem: For a key, token or session that is not valid.
    """
    settings: Settings = current_app.extensions["settings"]
    if "Authorization" in request.headers:
        return _by_header(request.headers["Authorization"])
    if settings.secret_keys and (signed_in := session.get("caller")):
        return _by_session(signed_in)
    if settings.access == "open":
        return _on_this_machine()
    return None


def _by_header(header: str) -> Caller:
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise unauthenticated("Send an API key or a token as `Authorization: Bearer …`.")
    text = text.strip()
    provider: Provider | None = current_app.extensions["provider"]
    if text.count(".") == 2 and provider is not None and provider.takes_tokens:
        try:
            return caller_of_claims(provider.verify(text))
        except ProviderUnavailable as error:
            raise unavailable(f"Tokens cannot be checked right now: {error}.") from None
        except InvalidToken as error:
            raise unauthenticated(f"The token is not accepted: {error}.", "invalid_token") from None
    key = app.keys().find(text)
    if key is None:
        raise unauthenticated("The API key is not valid: it may be revoked or expired.", "invalid_token")
    return _caller_of_key(key)


def _caller_of_key(key: ApiKey) -> Caller:
    return Caller(key.name, "machine", _with_included(key.scopes), key.customer_id)


def caller_of_claims(claims: Mapping[str, Any], *, by_cookie: bool = False) -> Caller:
    """Return who an OpenID provider's claims are about.

    The roles that the provider gives decide, never the scopes of a token: those say what a program may do in a
    person's name, and any program may ask for them. One without a role of ours is a customer.
    """
    settings: Settings = current_app.extensions["settings"]
    subject = str(claims["sub"])
    name = str(claims.get("name") or claims.get("preferred_username") or claims.get("email") or subject)[:64]
    roles = SCOPES.keys() & _listed(_claim(claims, settings.oidc_roles_claim))
    if roles - {"order"}:
        return Caller(name, "operator", _with_included(roles), by_cookie=by_cookie, subject=f"oidc:{subject}")
    try:
        customer_id = check_customer_id(_claim(claims, settings.oidc_customer_claim))
    except InvalidOrder as error:
        raise Problem(
            "forbidden",
            f"Your account has no customer id that can be used here: its claim "
            f"{settings.oidc_customer_claim} {error.problem}",
        ) from None
    return Caller(name, "customer", SCOPES["order"], customer_id, by_cookie, subject)


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """Return a claim by its name, or by its path: `realm_access.roles`."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def kept_claims(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a session keeps of a person's claims: what says who they are, and no more."""
    settings: Settings = current_app.extensions["settings"]
    kept = {name: claims[name] for name in ("sub", "name", "preferred_username", "email") if name in claims}
    # Only the roles that mean something here: a cookie has 4 kB.
    roles = SCOPES.keys() & _listed(_claim(claims, settings.oidc_roles_claim))
    return {
        **kept,
        settings.oidc_roles_claim: sorted(roles),
        settings.oidc_customer_claim: _claim(claims, settings.oidc_customer_claim),
    }


def _listed(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(value.split())
    return {one for one in value if isinstance(one, str)} if isinstance(value, list) else set()


def _by_session(signed_in: Mapping[str, Any]) -> Caller | None:
    """Return the person of a session; None when it is over, and they are asked to sign in again."""
    if "claims" in signed_in:
        return caller_of_claims(signed_in["claims"], by_cookie=True)
    operator = app.operators().find(signed_in["operator"])
    if operator is None or operator.changed_at != signed_in["changed_at"]:
        return None
    return Caller(operator.name, "operator", _with_included(operator.scopes), by_cookie=True)


def _on_this_machine() -> Caller | None:
    """Return the open caller if the request comes from this machine, for a name of this machine, and from no proxy.

    A page of another site could have its own name point here; its requests come with that name. A proxy on this machine
    that is not among PROXIES passes on what others send, as if it came from here.
    """
    settings: Settings = current_app.extensions["settings"]
    if not settings.proxies and any(name.startswith(_FORWARDED) for name in request.environ):
        return None
    host = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() else request.host
    return OPEN if is_loopback(host) and is_loopback(request.remote_addr or "") else None


def _with_included(scopes: Any) -> frozenset[str]:
    return frozenset().union(*(SCOPES[scope] for scope in scopes))


def unauthenticated(detail: str, error: str | None = None) -> Problem:
    """Return the problem of a caller who must sign in first."""
    challenge = _CHALLENGE if error is None else f'{_CHALLENGE} error="{error}"'
    return Problem("unauthenticated", detail, headers={"WWW-Authenticate": challenge})
