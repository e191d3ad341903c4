"""Sets the headers that keep a page from doing anything it was not written to do, and refuses foreign forms.

A foreign site could have a visitor's browser send a request here, and the browser adds the visitor's session, or is on
the machine for which the service is open. Browsers say where a request comes from, and that is checked for each one
that changes anything. The session's cookie is `SameSite=Lax` as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from flask import Flask, request

from web.problems import Problem

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)

_HEADERS = [
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
]

# Orders change by the second, and a form must not come back out of a cache with its old key.
_NOT_KEPT = ("Cache-Control", "no-store")
# The address of an asset has the digest of its content in it (see web.assets).
_KEPT = ("Cache-Control", "public, max-age=31536000, immutable")


class _Protected:
    """Adds the headers to every answer, below Flask, whose own way to do so takes a tenth of a short request."""

    def __init__(self, app: WSGIApplication, static: str) -> None:
        self._app = app
        self._static = static

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            present = {name.lower() for name, _ in headers}
            added = [header for header in _HEADERS if header[0].lower() not in present]
            if not environ.get("PATH_INFO", "").startswith(self._static):
                if "cache-control" not in present:
                    added.append(_NOT_KEPT)
            elif status.startswith("200") and "v" in parse_qs(environ.get("QUERY_STRING", "")):
                headers = [header for header in headers if header[0].lower() != "cache-control"]
                added.append(_KEPT)
            return start_response(status, headers + added, *exc_info)

        return self._app(environ, start)


def protect(app: Flask) -> None:
    """Add the headers to every answer of the application."""
    app.wsgi_app = _Protected(app.wsgi_app, f"{app.static_url_path}/")  # type: ignore[method-assign]


def refuse_cross_site() -> None:
    """Raise a problem when a browser says that the request came from another site; programs say nothing."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        origin = request.headers.get("Origin")
        foreign = origin is not None and urlsplit(origin).netloc != request.host
    if foreign:
        raise Problem(
            "cross-site-request",
            "Nothing is changed by a request from another site: use this site's own form.",
        )
