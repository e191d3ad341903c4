"""Reads what the environment says about the front end; a wrong value is refused at the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from urllib.parse import quote


class InvalidSetting(ValueError):
    """An environment variable has a value that can never work; the message names it."""


@dataclass(frozen=True)
class WebSettings:
    """The front end's own settings; times in milliseconds."""

    trace_url_template: str | None = None
    threads: int = 16
    stream_duration: int = 30_000
    max_body_bytes: int = 1_000_000

    @property
    def max_streams(self) -> int:
        """How many live pages a process follows at once: the other half of its threads stays free."""
        return max(1, self.threads // 2)

    def trace_url(self, trace_id: str | None) -> str | None:
        """Return the address of an order's trace, or None when there is no viewer or no trace."""
        if self.trace_url_template is None or not trace_id:
            return None
        return self.trace_url_template.format(trace_id=quote(trace_id, safe=""))


def from_environment(environment: Mapping[str, str] = os.environ) -> WebSettings:
    """Return the settings, or raise InvalidSetting with the name of the variable that is wrong."""
    return WebSettings(
        trace_url_template=_trace_url_template(environment.get("TRACE_URL_TEMPLATE") or None),
        threads=_positive(environment, "WEB_THREADS", 16),
        stream_duration=_positive(environment, "WEB_STREAM_DURATION", 30_000),
    )


def _positive(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise InvalidSetting(f"{name} must be a whole number of at least 1, not {value!r}.")
    return int(value)


def _trace_url_template(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        names = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
    except ValueError as error:
        names = [str(error)]
    if names != ["trace_id"] or not value.startswith(("http://", "https://")):
        raise InvalidSetting(
            "TRACE_URL_TEMPLATE must be an http(s) address with {trace_id} in it once, "
            f"such as https://traces.example.com/trace/{{trace_id}}, not {value!r}."
        )
    return value
