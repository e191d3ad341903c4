"""Observes every request: an id, one line in the log, and what Prometheus counts.

It stands before everything else, so that what is refused for any reason is seen too. A client may choose the id
(`X-Request-Id`); the answer has it, all lines of the request carry it, and the events of the order that it places name
it, so that the lines of the order's steps do too.

A live stream counts until it begins. A process that is killed has not counted the requests that it was answering.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, request
from opentelemetry import trace
from prometheus_client import Counter, Histogram

from tasks import logs
from tasks.events import is_request_id

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

REQUEST_ID: Final = "X-Request-Id"

#: Upper bounds in seconds.
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

#: Probes come every few seconds, and a page brings its styles and scripts with it: their lines are for `debug` alone.
_QUIET: Final = ("/health/live", "/health/ready", "/static/")

_ROUTE: Final = "order_service.route"
_MAX_PATH: Final = 200

#: The methods that HTTP has; what clients make up is counted as one.
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

requests = Counter("http_requests", "Requests by route and status.", ["method", "route", "status"])
durations = Histogram(
    "http_request_duration_seconds",
    "From a request that is there as a whole to the first byte of its answer.",
    ["method", "route"],
    buckets=_SECONDS,
)


class _Observed:
    """A WSGI application whose requests are seen."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        began = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = given if is_request_id(given) else uuid.uuid4().hex
        status = 500
        traced: dict[str, str] = {}

        def start(line: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            nonlocal status
            status = int(line.partition(" ")[0])
            context = trace.get_current_span().get_span_context()
            if context.is_valid:
                traced["trace_id"] = trace.format_trace_id(context.trace_id)
            return start_response(line, [*headers, (REQUEST_ID, request_id)], *exc_info)

        with logs.about(request_id=request_id):
            try:
                return self._app(environ, start)
            finally:
                _count(environ, status, time.perf_counter() - began, traced)


def _count(environ: WSGIEnvironment, status: int, seconds: float, traced: dict[str, str]) -> None:
    method = environ["REQUEST_METHOD"] if environ["REQUEST_METHOD"] in _METHODS else "other"
    route = environ.get(_ROUTE, "none")
    requests.labels(method, route, str(status)).inc()
    durations.labels(method, route).observe(seconds)
    path, milliseconds = environ.get("PATH_INFO", "")[:_MAX_PATH], round(seconds * 1000)
    facts = {"method": method, "route": route, "status": status, "milliseconds": milliseconds, **traced}
    level = logging.DEBUG if path.startswith(_QUIET) else logging.INFO
    logger.log(
        level, "%s %s was answered with %d after %d ms.", method, path, status, milliseconds, extra=facts
    )


def observe(app: Flask) -> None:
    """Observe the requests of an application; call this when everything else is in place."""

    def note_route() -> None:
        if request.url_rule is not None:
            request.environ[_ROUTE] = request.url_rule.rule

    # Before what may refuse the request.
    app.before_request_funcs.setdefault(None, []).insert(0, note_route)
    app.wsgi_app = _Observed(app.wsgi_app)  # type: ignore[method-assign]
