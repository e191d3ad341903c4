"""The probes (does this process live, can it take orders), and the metrics."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

from dramatiq_jetstream.gauges import PROMETHEUS_CONTENT_TYPE
from tasks import service
from web import live
from web import metrics as web_metrics
from web.access import anyone, needs, visitor

blueprint = Blueprint("health", __name__)


@blueprint.get("/health/live")
@anyone
def alive() -> Response:
    """Answer 200 as long as the process answers at all; a lost connection is no reason to restart it."""
    return jsonify({"status": "ok"})


@blueprint.get("/health/ready")
@anyone
def ready() -> Response:
    """Answer 200 while this process can take orders: connected, and not asked to stop."""
    return _report(stopping=live.stopping.is_set())


@blueprint.get("/health")
@anyone
def health() -> Response:
    """Answer 200 only while connected to NATS; operators also get what it is connected to."""
    return _report(stopping=False)


@blueprint.get("/metrics")
@needs("read", of_all=True)
def metrics() -> Response:
    """Answer what is counted and what the store says, for Prometheus."""
    return Response(web_metrics.text(), content_type=PROMETHEUS_CONTENT_TYPE)


def _report(*, stopping: bool) -> Response:
    connected = service.nats_connected()
    ok = connected and not stopping
    body: dict[str, Any] = {"status": "ok" if ok else "unavailable"}
    # Strangers learn no more; probes send nothing, so that for them nothing is looked up.
    if (who := visitor()) is not None and who.may("operate"):
        body |= {"stopping": stopping, **service.health()}
    response = jsonify(body)
    if not ok:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return response
