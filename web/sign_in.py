"""Signs people in and out: at the OpenID provider, or with a password that is kept here.

The provider's way is the code flow with PKCE, state and nonce, by Authlib. A session is a cookie, signed and not
encrypted: it says who signed in, and nothing that is secret. It ends after SESSION_LIFETIME, however much it is used;
an operator's also ends when they are removed or get another password.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode, urlsplit

import requests
from authlib.integrations.base_client import OAuthError
from authlib.integrations.flask_client import FlaskOAuth2App, OAuth
from authlib.integrations.requests_client import OAuth2Session
from flask import Blueprint, Flask, Response, current_app, render_template, request, session
from joserfc.errors import JoseError

from tasks import app
from tasks.answers import timed, within
from tasks.settings import Settings
from web.access import anyone
from web.identity import caller_of_claims, kept_claims
from web.problems import Problem, unavailable
from web.rates import Rates
from web.tokens import Provider

logger = logging.getLogger(__name__)

blueprint = Blueprint("sign_in", __name__)

#: Milliseconds are for settings; requests to the provider are in seconds.
PROVIDER_TIMEOUT_SECONDS = 5
#: The answers to all requests of one sign-in have this long, altogether.
PROVIDER_SECONDS = 10.0
_MAX_FIELD = 256


def configure(flask_app: Flask, settings: Settings) -> None:
    """Set sessions up, and the provider if there is one."""
    if settings.secret_keys:
        flask_app.secret_key, *older = settings.secret_keys
        flask_app.config["SECRET_KEY_FALLBACKS"] = older
    flask_app.config.update(
        # The prefix has browsers refuse one that was set for a parent domain, or without Secure.
        SESSION_COOKIE_NAME="__Host-session",
        SESSION_COOKIE_SECURE=True,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_PATH="/",
        SESSION_REFRESH_EACH_REQUEST=False,
        PERMANENT_SESSION_LIFETIME=timedelta(milliseconds=settings.session_lifetime),
    )
    flask_app.extensions["provider"] = None if settings.oidc_issuer is None else Provider(settings)
    flask_app.extensions["sign_in"] = (
        None if settings.oidc_client_id is None else _client(flask_app, settings)
    )


class _ProviderSession(OAuth2Session):  # type: ignore[misc]  # Authlib has no types
    """Requests to the provider, whose answers have a time as a whole."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        timed(self)


class _ProviderApp(FlaskOAuth2App):  # type: ignore[misc]
    client_cls = _ProviderSession


def _client(flask_app: Flask, settings: Settings) -> Any:
    provider: Provider = flask_app.extensions["provider"]
    return OAuth(flask_app).register(
        "provider",
        client_cls=_ProviderApp,
        client_id=settings.oidc_client_id,
        client_secret=settings.oidc_client_secret,
        server_metadata_url=provider.metadata_url,
        client_kwargs={
            "scope": "openid profile email",
            "code_challenge_method": "S256",
            "default_timeout": PROVIDER_TIMEOUT_SECONDS,
        },
    )


@blueprint.get("/sign-in")
@anyone
def form() -> Response:
    """Show how people can sign in."""
    return _form(_local(request.args.get("next")))


@blueprint.post("/sign-in")
@anyone
def with_password() -> Response:
    """Sign in an operator with a name and a password."""
    _can_sign_in()
    way_back = _local(request.form.get("next"))
    rates: Rates = current_app.extensions["rates"]
    rates.try_password(request.remote_addr or "")
    name = request.form.get("name", "")[:_MAX_FIELD].strip()
    operator = app.operators().check(name, request.form.get("password", ""))
    if operator is None:
        # Not the name: a customer may have tried.
        logger.warning("Sign-in with a password refused from %s", request.remote_addr)
        return _form(way_back, name=name, wrong=True)
    rates.was_right(request.remote_addr or "")
    logger.info("%s signed in with a password", operator.name)
    return _signed_in({"operator": operator.name, "changed_at": operator.changed_at}, way_back)


@blueprint.get("/sign-in/provider")
@anyone
def with_provider() -> Response:
    """Send a browser to the provider."""
    settings: Settings = current_app.extensions["settings"]
    client = _provider_client()
    session.clear()
    session["next"] = _local(request.args.get("next"))
    try:
        with within(PROVIDER_SECONDS):
            answer: Response = client.authorize_redirect(f"{settings.public_url}/sign-in/callback")
    except (requests.RequestException, ValueError, RuntimeError) as error:
        raise _no_provider(error) from None
    return answer


@blueprint.get("/sign-in/callback")
@anyone
def callback() -> Response:
    """Take a browser back from the provider, and sign in the person that it names."""
    settings: Settings = current_app.extensions["settings"]
    client = _provider_client()
    way_back = _local(session.get("next"))
    try:
        with within(PROVIDER_SECONDS):
            token = client.authorize_access_token(
                claims_options={"iss": {"essential": True, "values": [settings.oidc_issuer]}}
            )
    except (OAuthError, JoseError) as error:
        logger.warning(
            "Sign-in at the provider failed: %s", getattr(error, "error", "") or type(error).__name__
        )
        raise Problem("unauthenticated", "Signing in did not succeed: try again.") from None
    except (requests.RequestException, ValueError, RuntimeError) as error:
        raise _no_provider(error) from None
    claims = token.get("userinfo")
    if not claims:
        raise Problem("unauthenticated", "The provider did not say who you are: try again.")
    kept = kept_claims(claims)
    signed_in = caller_of_claims(kept)  # refuses a person without a customer id
    who = signed_in.subject if signed_in.customer_id is None else "A customer"
    logger.info("%s signed in at the provider as %s", who, signed_in.kind)
    return _signed_in({"claims": kept}, way_back)


@blueprint.post("/sign-out")
@anyone
def sign_out() -> Response:
    """End the session of this browser."""
    if current_app.secret_key:
        session.clear()
    return _see_other("/sign-in")


def invite() -> Response:
    """Return the way to the form for a page that needs a person, and back."""
    return _see_other(f"/sign-in?{urlencode({'next': _local(request.full_path.rstrip('?'))})}")


def _signed_in(who: dict[str, Any], way_back: str) -> Response:
    session.clear()
    session.permanent = True
    session["caller"] = who
    return _see_other(way_back)


def _form(way_back: str, *, name: str = "", wrong: bool = False) -> Response:
    page = render_template(
        "sign_in.html",
        next=way_back,
        name=name,
        wrong=wrong,
        provider=current_app.extensions["sign_in"] is not None,
    )
    return Response(page, 401 if wrong else 200, content_type="text/html; charset=utf-8")


def _can_sign_in() -> None:
    if not current_app.secret_key:
        raise Problem("not-found", "There is no sign-in here: the service is open to this machine.")


def _provider_client() -> Any:
    client = current_app.extensions["sign_in"]
    if client is None:
        raise Problem("not-found", "No OpenID provider is set up here.")
    return client


def _no_provider(error: Exception) -> Problem:
    logger.warning("The OpenID provider cannot be used: %s", error)
    return unavailable("The provider for signing in does not answer right now: try again shortly.")


def _local(address: str | None) -> str:
    """Return an address of this site to go back to; anything else becomes the first page."""
    if not address or not address.startswith("/") or len(address) > _MAX_FIELD:
        return "/"
    # Browsers read a backslash as a slash, and leave control characters out.
    if "\\" in address or not address.isprintable():
        return "/"
    parts = urlsplit(address)
    return "/" if parts.scheme or parts.netloc or address.startswith("//") else address


def _see_other(location: str) -> Response:
    return Response(status=303, headers={"Location": location})
