"""Every setting of the order service, read from the environment once.

A wrong value stops the process with one line that names the variable. Times are integer milliseconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

__all__ = ["InvalidSetting", "Settings", "settings"]


class InvalidSetting(ValueError):
    """An environment variable has a value that cannot work; the message names it."""


@dataclass(frozen=True)
class Settings:
    """The settings with their defaults; each field says which variable it comes from.

    Attributes:
      nats_url: NATS_URL, the servers, comma-separated.
      nats_creds: NATS_CREDS, the path or the content of a .creds file.
      replicas: REPLICAS, of every stream and bucket: 1, 3 or 5.
      declare: DECLARE, whether processes may create streams and consumers; 0 when `fleet setup` has done it.
      worker_processes, worker_threads: WORKER_PROCESSES and WORKER_POOL_SIZE, of `dramatiq tasks`.
      ack_wait: ACK_WAIT, after which the work of a killed worker is given to another.
      host, port: HOST and PORT, where the front end listens.
      web_processes, web_threads: WEB_CONCURRENCY and WEB_THREADS, of gunicorn.
      stream_duration: STREAM_DURATION, after which an open order page asks for a new stream.
      trace_url_template: TRACE_URL_TEMPLATE, the address of a trace, with {trace_id} in it.
      accept_timeout: ACCEPT_TIMEOUT, how long a request waits for JetStream to store its order.
      idempotency_ttl: IDEMPOTENCY_TTL, how long an Idempotency-Key is remembered.
      payment_url: PAYMENT_URL, the payment gateway.
      payment_timeout: PAYMENT_TIMEOUT, for one request to it.
      retry_limit: RETRY_LIMIT, how often a step is tried again before it is a dead letter.
      retry_min_backoff, retry_max_backoff: RETRY_MIN_BACKOFF and RETRY_MAX_BACKOFF, the wait before a retry:
        it doubles from the one to the other, and up to half of it is random.
      log_format: LOG_FORMAT, text or json.
    """

    nats_url: str = "nats://localhost:4222"
    nats_creds: str | None = None
    replicas: int = 1
    declare: bool = True
    worker_processes: int = 2
    worker_threads: int = 10
    ack_wait: int = 30_000
    host: str = "0.0.0.0"
    port: int = 8000
    web_processes: int = 2
    web_threads: int = 16
    stream_duration: int = 30_000
    trace_url_template: str | None = None
    accept_timeout: int = 5_000
    idempotency_ttl: int = 24 * 3_600_000
    payment_url: str = "http://127.0.0.1:8001"
    payment_timeout: int = 5_000
    retry_limit: int = 10
    retry_min_backoff: int = 500
    retry_max_backoff: int = 60_000
    log_format: str = "text"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Return the settings, or raise InvalidSetting for the first variable that cannot work."""
        read = _Reader(environment)
        min_backoff = read.whole("RETRY_MIN_BACKOFF", cls.retry_min_backoff, 1, 3_600_000)
        return cls(
            nats_url=read.servers("NATS_URL", cls.nats_url),
            nats_creds=read.text("NATS_CREDS"),
            replicas=int(read.choice("REPLICAS", str(cls.replicas), ("1", "3", "5"))),
            declare=read.choice("DECLARE", "1", ("0", "1")) == "1",
            worker_processes=read.whole("WORKER_PROCESSES", cls.worker_processes, 1, 256),
            worker_threads=read.whole("WORKER_POOL_SIZE", cls.worker_threads, 1, 512),
            ack_wait=read.whole("ACK_WAIT", cls.ack_wait, 1_000, 3_600_000),
            host=read.text("HOST") or cls.host,
            port=read.whole("PORT", cls.port, 1, 65_535),
            web_processes=read.whole("WEB_CONCURRENCY", cls.web_processes, 1, 256),
            web_threads=read.whole("WEB_THREADS", cls.web_threads, 4, 512),
            stream_duration=read.whole("STREAM_DURATION", cls.stream_duration, 1_000, 600_000),
            trace_url_template=read.template("TRACE_URL_TEMPLATE", "trace_id"),
            accept_timeout=read.whole("ACCEPT_TIMEOUT", cls.accept_timeout, 100, 60_000),
            idempotency_ttl=read.whole("IDEMPOTENCY_TTL", cls.idempotency_ttl, 60_000, 30 * 86_400_000),
            payment_url=read.http("PAYMENT_URL", cls.payment_url),
            payment_timeout=read.whole("PAYMENT_TIMEOUT", cls.payment_timeout, 10, 300_000),
            retry_limit=read.whole("RETRY_LIMIT", cls.retry_limit, 0, 1_000),
            retry_min_backoff=min_backoff,
            retry_max_backoff=read.whole(
                "RETRY_MAX_BACKOFF", max(cls.retry_max_backoff, min_backoff), min_backoff, 7 * 86_400_000
            ),
            log_format=read.choice("LOG_FORMAT", cls.log_format, ("text", "json")),
        )


class _Reader:
    """Reads and checks single variables; an empty variable counts as not set, as a PaaS sets them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, name: str) -> str | None:
        return self._environment.get(name, "").strip() or None

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self.text(name)
        if value is None:
            return default
        if re.fullmatch(r"[0-9]{1,12}", value) is None or not least <= int(value) <= most:
            raise InvalidSetting(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
        return int(value)

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.text(name) or default
        if value not in choices:
            raise InvalidSetting(f"{name} must be {' or '.join(choices)}, not {value!r}.")
        return value

    def servers(self, name: str, default: str) -> str:
        value = self.text(name) or default
        for address in value.split(","):
            if re.fullmatch(r"((nats|tls|ws|wss)://)?[^\s/]+?(:\d{1,5})?/?", address.strip()) is None:
                raise InvalidSetting(
                    f"{name} must be addresses such as nats://localhost:4222, separated by commas; "
                    f"{address.strip()!r} is none."
                )
        return value

    def http(self, name: str, default: str) -> str:
        value = self.text(name) or default
        if re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", value) is None:
            raise InvalidSetting(f"{name} must be an address such as http://localhost:8001, not {value!r}.")
        return value.rstrip("/")

    def template(self, name: str, field: str) -> str | None:
        value = self.text(name)
        if value is not None and re.fullmatch(rf"https?://[^\s{{}}]+{{{field}}}[^\s{{}}]*", value) is None:
            raise InvalidSetting(
                f"{name} must be an address such as https://traces.example.com/{{{field}}}, not {value!r}."
            )
        return value


@cache
def settings() -> Settings:
    """Return this process's settings; a wrong value ends the process."""
    try:
        return Settings.from_environment()
    except InvalidSetting as error:
        raise SystemExit(str(error)) from None
