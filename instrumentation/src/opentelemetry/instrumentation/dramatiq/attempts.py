"""An attempt of an actor while it lasts, kept on its message proxy: the middleware ends it, a send belongs to it."""

from __future__ import annotations

import time
from typing import Any

from opentelemetry.context import get_current
from opentelemetry.trace import Span

#: The attribute of a message proxy that holds its attempt.
ATTEMPT = "_opentelemetry_attempt"


class Attempt:
    """One run of a message by an actor, or the decision not to run it."""

    __slots__ = ("measured", "outer", "span", "started", "was_retried")

    def __init__(self, span: Span, measured: dict[str, Any]) -> None:
        self.span = span
        #: What its metrics say of it.
        self.measured = measured
        self.outer = get_current()
        self.was_retried = False
        self.started = time.perf_counter()


def attempt_of(message: object) -> Attempt | None:
    """The attempt that a message proxy is in the middle of."""
    return vars(message).get(ATTEMPT)
