"""Traces, metrics and logs of a Dramatiq program, by OpenTelemetry.

Works with any Dramatiq broker. Needs the extra `otel`; only the logs do without. Nothing happens when this
package is imported, and OpenTelemetry is imported no earlier than it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .logs import LogContext, bind_log_fields, configure_logging, log_fields
from .setup import (
    configure_telemetry,
    flush_telemetry,
    shutdown_telemetry,
    start_telemetry,
    telemetry_enabled,
)

if TYPE_CHECKING:
    from .carrier import CARRIER_OPTION
    from .instrumentor import DramatiqInstrumentor
    from .prometheus import CONTENT_TYPE as PROMETHEUS_CONTENT_TYPE
    from .prometheus import prometheus_text

__all__ = [
    "CARRIER_OPTION",
    "PROMETHEUS_CONTENT_TYPE",
    "DramatiqInstrumentor",
    "LogContext",
    "bind_log_fields",
    "configure_logging",
    "configure_telemetry",
    "flush_telemetry",
    "log_fields",
    "prometheus_text",
    "shutdown_telemetry",
    "start_telemetry",
    "telemetry_enabled",
]

# What needs a package of the extra is found when it is asked for.
_OPTIONAL = {
    "CARRIER_OPTION": ("carrier", "CARRIER_OPTION"),
    "DramatiqInstrumentor": ("instrumentor", "DramatiqInstrumentor"),
    "PROMETHEUS_CONTENT_TYPE": ("prometheus", "CONTENT_TYPE"),
    "prometheus_text": ("prometheus", "prometheus_text"),
}


def __getattr__(name: str) -> Any:
    if name not in _OPTIONAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _OPTIONAL[name]
    try:
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith(__name__):
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs the package {missing.name}: install dramatiq-jetstream[otel].",
            name=missing.name,
        ) from missing
