"""Binds a form to the browser, the person and exactly one change, so that no other site can send it."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from werkzeug.exceptions import Forbidden
from werkzeug.wrappers import Request, Response

from .access import Person, fingerprint
from .plans import Fields

__all__ = ["check_token", "give_token", "refuse_cross_site"]

COOKIE: Final = "fleet_csrf"


def refuse_cross_site(request: Request) -> None:
    """Raise when a browser says that a request comes from another site."""
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        foreign = origin is not None and urlsplit(origin).netloc != request.host
    if foreign:
        raise Forbidden("Nothing is changed by a request from another site: use this site's own form.")


def give_token(
    request: Request, person: Person, action: str, fields: Fields
) -> tuple[str, Callable[[Response], None]]:
    """Return the token for one change, and what keeps its secret in the person's browser."""
    known = request.cookies.get(COOKIE, "")
    secret = known if len(known) == 64 and known.isalnum() else secrets.token_hex(32)

    def keep(response: Response) -> None:
        response.set_cookie(
            COOKIE,
            secret,
            httponly=True,
            samesite="Strict",
            secure=request.is_secure,
            path=request.script_root or "/",
        )

    return _token(secret, person, action, fields), keep


def check_token(request: Request, person: Person, action: str, fields: Fields) -> None:
    """Raise unless the form has the token that was given for exactly this change."""
    secret, token = request.cookies.get(COOKIE, ""), request.form.get("token", "")
    if not secret or not hmac.compare_digest(_token(secret, person, action, fields).encode(), token.encode()):
        raise Forbidden("This form is out of date, or was never shown to you: open the page and try again.")


def _token(secret: str, person: Person, action: str, fields: Fields) -> str:
    said = [action, fingerprint(person), *(repr((name, fields[name])) for name in sorted(fields))]
    return hmac.new(secret.encode(), "\0".join(said).encode("utf-8", "surrogatepass"), "sha256").hexdigest()
