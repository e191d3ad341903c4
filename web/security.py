"""Sets the headers that keep a page from doing anything it was not written to do, and refuses foreign forms.

There are no cookies and no sessions here, so a foreign site could not act in a visitor's name; it could
still make a visitor's browser place orders. Browsers say where a form comes from, and that is checked.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from flask import Flask, Response, request

from web.problems import Problem

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

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def protect(app: Flask) -> None:
    """Add the headers to every answer of the application."""

    @app.after_request
    def add_headers(response: Response) -> Response:
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        if request.endpoint != "static":
            # Orders change by the second, and a form must not come back out of a cache with its old key.
            response.headers.setdefault("Cache-Control", "no-store")
        elif "v" in request.args and response.status_code == 200:
            # Its address has the digest of its content in it (see web.assets).
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


def refuse_cross_site() -> None:
    """Raise a problem when a browser says that the form came from another site; programs say nothing."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        origin = request.headers.get("Origin")
        foreign = origin is not None and urlsplit(origin).netloc != request.host
    if foreign:
        raise Problem("cross-site-request", "Orders are only taken from this site's own form.")
