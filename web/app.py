"""Makes the Flask application: blueprints, limits, and what happens to every error."""

from __future__ import annotations

import logging

from dramatiq.errors import BrokerError
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.middleware.proxy_fix import ProxyFix

from dramatiq_jetstream.errors import MessageTooLarge
from tasks import broker, logs, telemetry
from tasks.ledger import NewerRecord
from tasks.settings import Settings, front_end_settings
from web import (
    access,
    admission,
    api,
    audit_page,
    erasures_page,
    export,
    fleet,
    health,
    keys_page,
    observed,
    openapi,
    order_acts,
    order_form,
    order_list,
    overview,
    pages,
    payments,
    product_pages,
    products,
    rendering,
    security,
    sign_in,
    webhooks,
    webhooks_page,
)
from web.live import Streams
from web.problems import Problem, from_status, unavailable
from web.rates import Rates

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_000_000

# What a client may still be sending when its request is refused for its size. Reading it lets the answer
# arrive: a connection closed with unread data is reset, and the client sees no answer at all.
_DRAIN_LIMIT = 32_000_000


def create_app(app_settings: Settings | None = None) -> Flask:
    """Return the application; it connects to NATS by itself, in this process, when it is first used."""
    app_settings = app_settings or front_end_settings()
    app_settings.check_sign_in()
    logs.configure(app_settings)
    traced = telemetry.configure("order-service-web", broker)
    app = Flask("web")
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.config["MAX_FORM_MEMORY_SIZE"] = MAX_BODY_BYTES
    app.url_map.merge_slashes = False
    # An order begins with its id, not with its currency.
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.extensions["settings"] = app_settings
    app.extensions["rates"] = Rates(app_settings)
    app.extensions["exports"] = export.Exports(max(1, app_settings.web_threads // 4))
    app.extensions["streams"] = Streams(max(1, app_settings.web_threads // 2), app_settings.stream_duration)

    app.register_blueprint(order_acts.blueprint)
    app.register_blueprint(payments.blueprint)
    app.register_blueprint(api.blueprint)
    app.register_blueprint(export.blueprint)
    app.register_blueprint(overview.blueprint)
    app.register_blueprint(order_form.blueprint)
    app.register_blueprint(order_list.blueprint)
    app.register_blueprint(pages.blueprint)
    app.register_blueprint(health.blueprint)
    app.register_blueprint(openapi.blueprint)
    app.register_blueprint(sign_in.blueprint)
    app.register_blueprint(keys_page.blueprint)
    app.register_blueprint(audit_page.blueprint)
    app.register_blueprint(webhooks.blueprint)
    app.register_blueprint(webhooks_page.blueprint)
    app.register_blueprint(erasures_page.blueprint)
    app.register_blueprint(products.blueprint)
    app.register_blueprint(product_pages.blueprint)
    rendering.install(app)
    sign_in.configure(app, app_settings)
    security.protect(app)
    fleet.mount(app)
    if app_settings.proxies:
        hops = app_settings.proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]
    admission.bound(app, app_settings.web_threads)

    access.enforce(app)
    app.before_request(_refuse_endless_body)
    app.register_error_handler(Problem, _answer)
    app.register_error_handler(BrokerError, _store_failed)
    app.register_error_handler(NewerRecord, _newer)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
    if traced:
        # Imported only when something is exported, so that it costs nothing otherwise.
        from opentelemetry.instrumentation.flask import FlaskInstrumentor

        FlaskInstrumentor().instrument_app(  # type: ignore[no-untyped-call]
            app, excluded_urls="/health.*,/metrics,/static/.*"
        )
    observed.observe(app)
    return app


def _refuse_endless_body() -> None:
    """Refuse a body without a length that is too large: the framework would cut it off, and take the rest."""
    if request.environ.get("CONTENT_LENGTH"):
        return
    limit = request.max_content_length
    if limit is not None and len(request.get_data()) >= limit:
        raise RequestEntityTooLarge


def _answer(problem: Problem) -> Response:
    if problem.status == 413:
        _drain()
    if _wants_problem():
        return problem.response()
    if problem.kind.slug == "unauthenticated" and _is_navigation():
        return sign_in.invite()
    return rendering.error_page(problem)


def _store_failed(error: BrokerError) -> Response:
    if isinstance(error, MessageTooLarge):
        return _answer(Problem("too-large", "The order is too large to be stored: send fewer items."))
    logger.warning("%s %s was answered with 503: %s", request.method, request.path, error)
    return _answer(unavailable("The store for orders does not answer right now: try again shortly."))


def _newer(error: NewerRecord) -> Response:
    logger.warning("%s %s was answered with 503: %s", request.method, request.path, error)
    return _answer(unavailable("The service is being replaced by a newer version: try again shortly."))


def _http_error(error: HTTPException) -> Response:
    if error.response is not None or (error.code or 500) < 400:
        return Response.force_type(error.get_response(), request.environ)  # type: ignore[return-value]
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
    if error.code == 404:
        detail = f"There is nothing at {request.path[:100]!r}."
    elif error.code == 413:
        detail = f"The body is larger than {request.max_content_length:,} bytes."
    else:
        detail = error.description or error.name
    return _answer(from_status(error.code or 500, detail, headers))


def _unexpected(error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return _answer(Problem("internal-error", "The request failed through no fault of yours; it was logged."))


def _wants_problem() -> bool:
    """Tell whether the client is a program: by the address it asked, and elsewhere by what it accepts."""
    if request.path.startswith(("/api", "/health", "/metrics", "/openapi.json")):
        return True
    best = request.accept_mimetypes.best_match(["text/html", "application/problem+json", "application/json"])
    return best is not None and best != "text/html"


def _is_navigation() -> bool:
    """Tell whether a person opens the page; scripts of a page that is open already cannot sign in."""
    return (
        request.method == "GET"
        and "text/html" in request.headers.get("Accept", "")
        and request.endpoint != "sign_in.callback"
    )


def _drain() -> None:
    stream = request.environ["wsgi.input"]
    left = _DRAIN_LIMIT
    try:
        while left > 0 and (chunk := stream.read(min(65_536, left))):
            left -= len(chunk)
    except OSError:
        # The client hung up while sending, so no one is waiting for the answer.
        return
