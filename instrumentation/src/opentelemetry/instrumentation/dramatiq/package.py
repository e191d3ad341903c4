"""What this package instruments, as `opentelemetry-instrument` asks for it."""

_instruments = ("dramatiq >= 2.2, < 3",)
_supports_metrics = True
