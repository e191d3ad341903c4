"""The WSGI application: who may come in, which page is meant, and the headers and errors of every answer.

A page is made from a template and what JetStream holds at that moment. Its live part is made in the same way when a
browser asks for it as a stream of events (`live`). Nothing is changed by a GET; `changes` says what a POST may do.
"""

from __future__ import annotations

import hashlib
import logging
import mimetypes
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from dramatiq.errors import BrokerError
from jinja2 import Environment, PackageLoader, StrictUndefined
from werkzeug.exceptions import (
    Forbidden,
    HTTPException,
    InternalServerError,
    MethodNotAllowed,
    NotFound,
    ServiceUnavailable,
    Unauthorized,
)
from werkzeug.routing import MapAdapter, RequestRedirect
from werkzeug.wrappers import Request, Response

from dramatiq_jetstream.broker import JetStreamBroker
from dramatiq_jetstream.errors import InvalidName, InvalidOption

from . import text
from .access import Access, OnThisMachine, Person
from .asking import MENU, URLS, Asked
from .live import Streams
from .reading import Reader
from .views import VIEWS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["Dashboard", "create_app"]

logger = logging.getLogger(__name__)

_HEADERS: Final = {
    "Content-Security-Policy": "; ".join(
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
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

#: A form has a few short fields, and at most a page of ids.
MAX_FORM_BYTES: Final = 200_000


class _Request(Request):
    """A request, with who makes it and the addresses as they are under its mount."""

    max_content_length = max_form_memory_size = MAX_FORM_BYTES
    person: Person | None = None
    urls: MapAdapter


class Dashboard:
    """The WSGI application, made by `create_app`.

    Examples:
      >>> from dramatiq_jetstream.ui import Dashboard, create_app
      >>> isinstance(create_app(broker), Dashboard)
      True
    """

    def __init__(
        self,
        broker: JetStreamBroker,
        access: Access,
        sign_in: str | None,
        back: tuple[str, str] | None,
        streams: Streams,
    ) -> None:
        self._reader = Reader(broker)
        self._access = access
        self._sign_in = sign_in
        self._back = back
        self._streams = streams
        self._templates = _environment()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = _Request(environ)
        request.urls = URLS.bind_to_environ(environ)
        try:
            response = self._answer(request)
        except RequestRedirect as redirect:
            response = Response.force_type(redirect.get_response(environ), environ)
        except HTTPException as error:
            response = self._error(error, request)
        except (InvalidName, InvalidOption) as error:
            response = self._error(NotFound(str(error)), request)
        except BrokerError as error:
            logger.warning("%s %s was answered with 503: %s", request.method, request.path, error)
            response = self._error(ServiceUnavailable(_NO_SERVER.format(error), retry_after=5), request)
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            response = self._error(InternalServerError(_FAILED), request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        return response(environ, start_response)

    def _answer(self, request: _Request) -> Response:
        endpoint, values = request.urls.match()
        if endpoint == "static":
            return _asset(values["name"], request)
        person = request.person = self._access(request.environ)
        if person is None:
            return self._stranger(request)
        if request.method not in ("GET", "HEAD") and endpoint != "change":
            raise MethodNotAllowed(["GET", "HEAD"], "A page is only read; changes have their own.")
        asked = Asked(request, person, request.urls, self._reader)
        view = partial(VIEWS[endpoint], asked, **values)
        if request.accept_mimetypes.best == "text/event-stream" and request.method == "GET":
            return self._streams.follow(partial(self._live, view, request, endpoint), request)
        found = view()
        if isinstance(found, Response):
            return found
        response = self._page(request, endpoint, **found)
        if "keep" in found:
            found["keep"](response)
        return response

    def _live(self, view: Callable[[], Any], request: _Request, endpoint: str) -> str | None:
        """The live part of a page; None when it has none."""
        template = self._templates.get_template(f"{endpoint}.html")
        if "live" not in template.blocks:
            return None
        context = template.new_context({**self._shared(request, endpoint), **view()})
        return "".join(template.blocks["live"](context))

    def _page(self, request: _Request, endpoint: str, *, code: int = 200, **found: Any) -> Response:
        page = self._templates.get_template(f"{endpoint}.html").render(
            {**self._shared(request, endpoint), **found}
        )
        return Response(page, code, content_type="text/html; charset=utf-8", headers={"Vary": "Accept"})

    def _shared(self, request: _Request, endpoint: str) -> dict[str, Any]:
        """What every template is given."""

        def url(to: str, **values: Any) -> str:
            return request.urls.build(to, {name: value for name, value in values.items() if value})

        person = request.person
        shared = {
            "person": person,
            "may": frozenset() if person is None else person.may,
            "namespace": "" if person is None else self._reader.broker.names.namespace,
            "menu": MENU,
            "program": self._back,
            "endpoint": endpoint,
            "url": url,
            "asset": lambda name: f"{url('static', name=name)}?v={_assets()[name].digest}",
        }
        # A block that is made alone sees no imports of its template.
        return {**shared, "parts": self._templates.get_template("parts.html").make_module(shared)}

    def _stranger(self, request: _Request) -> Response:
        if self._sign_in is not None and request.method == "GET":
            way_back = request.script_root + request.full_path.rstrip("?")
            joiner = "&" if "?" in self._sign_in else "?"
            location = f"{self._sign_in}{joiner}{urlencode({'next': way_back})}"
            return Response(status=303, headers={"Location": location})
        challenge = getattr(self._access, "challenge", None)
        if challenge is None:
            raise Forbidden(
                _NO_ENTRY if isinstance(self._access, OnThisMachine) else "This is not open to you."
            )
        response = self._error(Unauthorized("Sign in with your name and your password."), request)
        response.headers["WWW-Authenticate"] = challenge
        return response

    def _error(self, error: HTTPException, request: _Request) -> Response:
        detail = error.description
        if error.code == 404 and detail == NotFound.description:
            detail = f"There is no page {request.path!r}."
        response = self._page(request, "error", code=error.code or 500, title=error.name, detail=detail)
        for name, value in error.get_headers(request.environ):
            if name in ("Allow", "Retry-After"):
                response.headers[name] = value
        return response


def create_app(
    broker: JetStreamBroker,
    *,
    access: Access | None = None,
    sign_in: str | None = None,
    back: tuple[str, str] | None = None,
    streams: int = 4,
    stopping: threading.Event | None = None,
) -> Dashboard:
    """Make the dashboard of a broker's namespace.

    Parameters:
      broker: A broker of the fleet. It needs no actors; with `declare=False` it creates nothing.
      access: Says who makes a request, from its WSGI environment: a `Person`, or None for a stranger. Without one,
        everyone on this machine may look, and no one may change anything or come from elsewhere.
      sign_in: The address of the host's page to sign in; a stranger is sent there, with the way back as `next`.
      back: What the program is called that this is a part of, and the address of its page to which each page here
        leads back.
      streams: How many pages may be kept live by an open connection at once; each holds a thread of the
        server; further ones ask every two seconds.
      stopping: Set by the host when its process is to stop, so that open streams end.

    Returns:
      A WSGI application, for any server and under any path.

    Examples:
      >>> from dramatiq_jetstream.ui import create_app, operator, viewer
      >>> def access(environ):
      ...     name = environ.get("REMOTE_USER")
      ...     return None if name is None else operator(name) if name == "ann" else viewer(name)
      >>> application = create_app(broker, access=access, sign_in="/login", back=("My shop", "/"))
    """
    return Dashboard(
        broker, access or OnThisMachine(), sign_in, back, Streams(streams, stopping or threading.Event())
    )


_FAILED: Final = "The page failed through no fault of yours; the log of the dashboard says why."
_NO_SERVER: Final = "NATS does not answer, so nothing can be shown or changed until it does: {}"
_NO_ENTRY: Final = (
    "This dashboard is for this machine alone, by an address such as http://127.0.0.1: to have it elsewhere, give it "
    "users, or let the program that it is part of say who may come in."
)


@cache
def _environment() -> Environment:
    """The templates, compiled once in a process."""
    made = Environment(
        loader=PackageLoader("dramatiq_jetstream.ui"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters.update(text.FILTERS)
    return made


@dataclass(frozen=True)
class _Asset:
    data: bytes
    kind: str
    digest: str


@cache
def _assets() -> dict[str, _Asset]:
    found = {}
    for file in files("dramatiq_jetstream.ui").joinpath("static").iterdir():
        data = file.read_bytes()
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        found[file.name] = _Asset(data, kind, hashlib.sha256(data).hexdigest()[:12])
    return found


def _asset(name: str, request: Request) -> Response:
    """A file of the wheel; its address has the digest of its content, so browsers may keep it for ever."""
    asset = _assets().get(name)
    if asset is None:
        raise NotFound
    response = Response(asset.data, content_type=f"{asset.kind}; charset=utf-8")
    if request.args.get("v") == asset.digest:
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
    return response
