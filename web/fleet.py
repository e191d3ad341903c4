"""Mounts the dashboard of the fleet under /admin/fleet, for operators.

The dashboard checks its requests by itself; this says who makes them, as for every other page of the service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask
from werkzeug.exceptions import Forbidden, ServiceUnavailable
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from dramatiq_jetstream.ui import Person, create_app, operator
from tasks import broker, service
from web import live
from web.identity import identify
from web.problems import Problem

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

MOUNT = "/admin/fleet"

#: How many dashboards may hold a thread to be live; others ask every two seconds.
_STREAMS = 2


def mount(app: Flask) -> None:
    """Have the application serve the dashboard."""

    def who(environ: WSGIEnvironment) -> Person | None:
        if not service.nats_connected():  # or each request would hold a thread until it gives up
            raise ServiceUnavailable("NATS is not connected: try again shortly.", retry_after=5)
        with app.request_context(environ):
            try:
                caller = identify()
            except Problem as problem:
                raise Forbidden(str(problem)) from None
        if caller is None:
            return None
        if not caller.may("operate"):
            raise Forbidden("That needs the scope operate.")
        return operator(caller.name)

    dashboard = create_app(
        broker,
        access=who,
        sign_in="/sign-in",
        back=("Order service", "/admin"),
        streams=_STREAMS,
        stopping=live.stopping,
    )
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {MOUNT: dashboard})  # type: ignore[method-assign]
