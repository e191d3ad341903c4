"""What the standard OTEL_* variables ask for; read without importing OpenTelemetry.

One thing differs from the specification: without OTEL_TRACES_EXPORTER, or OTEL_METRICS_EXPORTER, a signal is
exported only when an endpoint is configured. By the specification it would go to localhost, and every process
on a machine without a collector would try to connect there for as long as it lives.
"""

from __future__ import annotations

import os


def enabled() -> bool:
    """Whether anything is to be exported at all."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    return bool(exporter_names("traces") or exporter_names("metrics"))


def exporter_names(signal: str) -> list[str]:
    """The exporters of `traces` or `metrics`, by the names under which packages register them."""
    chosen = os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip()
    if not chosen:
        endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
        chosen = "otlp" if any(os.environ.get(name, "").strip() for name in endpoints) else "none"
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "none")]
