"""Every setting of the order service, read from the environment once.

A wrong value stops the process with one line that names the variable. Times are integer milliseconds.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from babel import Locale, UnknownLocaleError
from cryptography.fernet import Fernet

from .numbers import whole_number
from .webhooks.addresses import Network

__all__ = ["InvalidSetting", "Settings", "front_end_settings", "is_loopback", "settings", "worker_settings"]


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
      worker_processes, worker_threads: WORKER_PROCESSES and WORKER_POOL_SIZE, of `fleet work tasks`.
      payment_worker_processes, payment_worker_threads: PAYMENT_WORKER_PROCESSES and PAYMENT_WORKER_POOL_SIZE, of the
        workers of the queue payments.
      webhook_worker_processes, webhook_worker_threads: WEBHOOK_WORKER_PROCESSES and WEBHOOK_WORKER_POOL_SIZE, of the
        workers of the queue webhooks.
      ack_wait: ACK_WAIT, after which the work of a killed worker is given to another.
      host, port: HOST and PORT, where the front end listens.
      web_processes, web_threads: WEB_CONCURRENCY and WEB_THREADS, of gunicorn.
      stream_duration: STREAM_DURATION, after which an open order page asks for a new stream.
      access: ACCESS, `required` (who comes must sign in) or `open` (anyone on this machine may do everything;
        on a loopback HOST alone).
      secret_keys: SECRET_KEY, which signs the sessions of people; after a comma older ones, which still count.
      session_lifetime: SESSION_LIFETIME, after which people sign in again.
      public_url: PUBLIC_URL, the address of the front end as browsers see it.
      locale: LOCALE, how the pages write numbers, dates and money, such as en_GB or de_DE.
      proxies: PROXIES, how many proxies stand before the front end and add to X-Forwarded-For.
      rate_limit: RATE_LIMIT, requests a minute of each customer and each person, in each process.
      program_rate_limit: PROGRAM_RATE_LIMIT, the same of a program that acts for all customers.
      oidc_issuer: OIDC_ISSUER, the OpenID provider.
      oidc_audience: OIDC_AUDIENCE, which a bearer token must be meant for; without it none is accepted.
      oidc_client_id, oidc_client_secret: OIDC_CLIENT_ID and OIDC_CLIENT_SECRET, with which people sign in there.
      oidc_customer_claim: OIDC_CUSTOMER_CLAIM, the claim that is a customer's id.
      oidc_roles_claim: OIDC_ROLES_CLAIM, the claim that lists what its bearer may do beyond ordering.
      trace_url_template: TRACE_URL_TEMPLATE, the address of a trace, with {trace_id} in it.
      accept_timeout: ACCEPT_TIMEOUT, how long a request waits for JetStream to store its order.
      idempotency_ttl: IDEMPOTENCY_TTL, how long an Idempotency-Key is remembered.
      payment_url: PAYMENT_URL, the payment gateway.
      test_cards: TEST_CARDS, whether the form offers the test cards of the gateway's stand-in.
      payment_timeout: PAYMENT_TIMEOUT, for one request to it.
      payment_webhook_secrets: PAYMENT_WEBHOOK_SECRET, with which the gateway signs what it tells by itself; after a
        comma older ones, which still count. Without it nothing is taken.
      token_keys: TOKEN_KEY, which encrypts payment tokens; after a comma older ones, which still decrypt.
      payment_patience: PAYMENT_PATIENCE, how long an order waits for its payment while the gateway does not answer.
      webhook_timeout: WEBHOOK_TIMEOUT, for one request to the receiver of a webhook.
      webhook_networks: WEBHOOK_NETWORKS, private networks in which receivers may be; none without it.
      retry_limit: RETRY_LIMIT, how often a step is tried again before it is a dead letter.
      retry_min_backoff, retry_max_backoff: RETRY_MIN_BACKOFF and RETRY_MAX_BACKOFF, the wait before a retry:
        it doubles from the one to the other, and up to half of it is random.
      order_deadline: ORDER_DEADLINE, how long after it was placed an order must be final, or it is cancelled.
      short_stock: SHORT_STOCK, what becomes of an order that stock does not cover: `reject` it, or `offer` its customer
        what there is.
      offer_deadline: OFFER_DEADLINE, how long its customer may accept that; then the order is cancelled.
      retention_days: RETENTION_DAYS, after which orders leave the stream and the buckets for the archive; 0 keeps them.
      archive_dir: ARCHIVE_DIR, the directory of the archive.
      stuck_after: STUCK_AFTER, how long an order may stand still before it is reported and its step is called again.
      log_format, log_level: LOG_FORMAT, text or json; and LOG_LEVEL, the name of a level.
    """

    nats_url: str = "nats://localhost:4222"
    nats_creds: str | None = None
    replicas: int = 1
    declare: bool = True
    worker_processes: int = 2
    worker_threads: int = 10
    payment_worker_processes: int = 1
    payment_worker_threads: int = 10
    webhook_worker_processes: int = 1
    webhook_worker_threads: int = 10
    ack_wait: int = 30_000
    host: str = "0.0.0.0"
    port: int = 8000
    web_processes: int = 2
    web_threads: int = 16
    stream_duration: int = 30_000
    access: str = "required"
    secret_keys: tuple[str, ...] = field(default=(), repr=False)
    session_lifetime: int = 8 * 3_600_000
    public_url: str | None = None
    locale: str = "en_GB"
    proxies: int = 0
    rate_limit: int = 300
    program_rate_limit: int = 60_000
    oidc_issuer: str | None = None
    oidc_audience: str | None = None
    oidc_client_id: str | None = None
    oidc_client_secret: str | None = field(default=None, repr=False)
    oidc_customer_claim: str = "sub"
    oidc_roles_claim: str = "roles"
    trace_url_template: str | None = None
    accept_timeout: int = 5_000
    idempotency_ttl: int = 24 * 3_600_000
    payment_url: str = "http://127.0.0.1:8001"
    test_cards: bool = False
    payment_timeout: int = 5_000
    payment_webhook_secrets: tuple[str, ...] = field(default=(), repr=False)
    token_keys: tuple[str, ...] = field(default=(), repr=False)
    payment_patience: int = 24 * 3_600_000
    webhook_timeout: int = 10_000
    webhook_networks: tuple[Network, ...] = ()
    retry_limit: int = 10
    retry_min_backoff: int = 500
    retry_max_backoff: int = 60_000
    order_deadline: int = 7 * 86_400_000
    short_stock: str = "reject"
    offer_deadline: int = 86_400_000
    retention_days: int = 0
    archive_dir: str | None = None
    stuck_after: int = 900_000
    log_format: str = "text"
    log_level: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Return the settings, or raise InvalidSetting for the first variable that cannot work."""
        read = _Reader(environment)
        min_backoff = read.whole("RETRY_MIN_BACKOFF", cls.retry_min_backoff, 1, 3_600_000)
        chosen = cls(
            nats_url=read.servers("NATS_URL", cls.nats_url),
            nats_creds=read.text("NATS_CREDS"),
            replicas=int(read.choice("REPLICAS", str(cls.replicas), ("1", "3", "5"))),
            declare=read.choice("DECLARE", "1", ("0", "1")) == "1",
            worker_processes=read.whole("WORKER_PROCESSES", cls.worker_processes, 1, 256),
            worker_threads=read.whole("WORKER_POOL_SIZE", cls.worker_threads, 1, 512),
            payment_worker_processes=read.whole(
                "PAYMENT_WORKER_PROCESSES", cls.payment_worker_processes, 1, 256
            ),
            payment_worker_threads=read.whole("PAYMENT_WORKER_POOL_SIZE", cls.payment_worker_threads, 1, 512),
            webhook_worker_processes=read.whole(
                "WEBHOOK_WORKER_PROCESSES", cls.webhook_worker_processes, 1, 256
            ),
            webhook_worker_threads=read.whole("WEBHOOK_WORKER_POOL_SIZE", cls.webhook_worker_threads, 1, 512),
            ack_wait=read.whole("ACK_WAIT", cls.ack_wait, 1_000, 3_600_000),
            host=read.text("HOST") or cls.host,
            port=read.whole("PORT", cls.port, 1, 65_535),
            web_processes=read.whole("WEB_CONCURRENCY", cls.web_processes, 1, 256),
            web_threads=read.whole("WEB_THREADS", cls.web_threads, 4, 512),
            stream_duration=read.whole("STREAM_DURATION", cls.stream_duration, 1_000, 600_000),
            access=read.choice("ACCESS", cls.access, ("required", "open")),
            secret_keys=read.secrets("SECRET_KEY"),
            session_lifetime=read.whole("SESSION_LIFETIME", cls.session_lifetime, 60_000, 30 * 86_400_000),
            public_url=(read.https("PUBLIC_URL") or "").rstrip("/") or None,
            locale=read.locale("LOCALE", cls.locale),
            proxies=read.whole("PROXIES", cls.proxies, 0, 10),
            rate_limit=read.whole("RATE_LIMIT", cls.rate_limit, 1, 1_000_000),
            program_rate_limit=read.whole("PROGRAM_RATE_LIMIT", cls.program_rate_limit, 1, 10_000_000),
            oidc_issuer=read.https("OIDC_ISSUER"),
            oidc_audience=read.text("OIDC_AUDIENCE"),
            oidc_client_id=read.text("OIDC_CLIENT_ID"),
            oidc_client_secret=read.text("OIDC_CLIENT_SECRET"),
            oidc_customer_claim=read.text("OIDC_CUSTOMER_CLAIM") or cls.oidc_customer_claim,
            oidc_roles_claim=read.text("OIDC_ROLES_CLAIM") or cls.oidc_roles_claim,
            trace_url_template=read.template("TRACE_URL_TEMPLATE", "trace_id"),
            accept_timeout=read.whole("ACCEPT_TIMEOUT", cls.accept_timeout, 100, 60_000),
            idempotency_ttl=read.whole("IDEMPOTENCY_TTL", cls.idempotency_ttl, 60_000, 30 * 86_400_000),
            payment_url=read.http("PAYMENT_URL", cls.payment_url),
            test_cards=read.choice("TEST_CARDS", "0", ("0", "1")) == "1",
            payment_timeout=read.whole("PAYMENT_TIMEOUT", cls.payment_timeout, 10, 300_000),
            payment_webhook_secrets=read.webhook_secrets("PAYMENT_WEBHOOK_SECRET"),
            token_keys=read.fernet_keys("TOKEN_KEY"),
            payment_patience=read.whole("PAYMENT_PATIENCE", cls.payment_patience, 0, 30 * 86_400_000),
            webhook_timeout=read.whole("WEBHOOK_TIMEOUT", cls.webhook_timeout, 100, 60_000),
            webhook_networks=read.networks("WEBHOOK_NETWORKS"),
            retry_limit=read.whole("RETRY_LIMIT", cls.retry_limit, 0, 1_000),
            retry_min_backoff=min_backoff,
            retry_max_backoff=read.whole(
                "RETRY_MAX_BACKOFF", max(cls.retry_max_backoff, min_backoff), min_backoff, 7 * 86_400_000
            ),
            order_deadline=read.whole("ORDER_DEADLINE", cls.order_deadline, 1_000, 365 * 86_400_000),
            short_stock=read.choice("SHORT_STOCK", cls.short_stock, ("reject", "offer")),
            offer_deadline=read.whole("OFFER_DEADLINE", cls.offer_deadline, 1_000, 365 * 86_400_000),
            retention_days=read.whole("RETENTION_DAYS", cls.retention_days, 0, 36_500),
            archive_dir=read.text("ARCHIVE_DIR"),
            stuck_after=read.whole("STUCK_AFTER", cls.stuck_after, 1_000, 7 * 86_400_000),
            log_format=read.choice("LOG_FORMAT", cls.log_format, ("text", "json")),
            log_level=read.log_level("LOG_LEVEL"),
        )
        chosen._check_provider()
        if chosen.retention_days and chosen.archive_dir is None:
            raise InvalidSetting("RETENTION_DAYS needs ARCHIVE_DIR, the directory to which orders go.")
        if (chosen.offered_for or 0) > chosen.order_deadline:
            raise InvalidSetting(
                "OFFER_DEADLINE is longer than ORDER_DEADLINE, which would end an order while it is still offered: "
                "make it shorter."
            )
        return chosen

    @property
    def offered_for(self) -> int | None:
        """For how many milliseconds what there is of an order is offered; None where such an order is rejected."""
        return self.offer_deadline if self.short_stock == "offer" else None

    @property
    def listens_on_loopback(self) -> bool:
        """Whether only this machine can reach the front end."""
        return is_loopback(self.host)

    def check_sign_in(self) -> None:
        """Check that strangers cannot use the front end.

        Raises:
          InvalidSetting: When it would be open to other machines, or to this one without being told to.
        """
        if self.access == "open" and not self.listens_on_loopback:
            raise InvalidSetting(
                f"ACCESS=open works on a loopback HOST such as 127.0.0.1 alone, and HOST is {self.host}: set "
                "SECRET_KEY and leave ACCESS out, so that people and programs sign in."
            )
        if self.access == "required" and not self.secret_keys:
            raise InvalidSetting(
                f"The front end would listen on {self.host} without a way to sign in: set SECRET_KEY to 32 or more "
                "random characters for API keys and operators, and OIDC_ISSUER for an OpenID provider."
            )

    def check_token_key(self) -> None:
        """Check that payment tokens can be encrypted.

        Raises:
          InvalidSetting: When there is no key.
        """
        if not self.token_keys:
            raise InvalidSetting(
                "Payment tokens cannot be encrypted: set TOKEN_KEY, for `web` and the workers alike, to what "
                "`python -m tasks.token_key` prints."
            )

    def _check_provider(self) -> None:
        """Check that the settings of the OpenID provider make sense together."""
        if self.oidc_issuer is None:
            for name in ("oidc_audience", "oidc_client_id", "oidc_client_secret"):
                if getattr(self, name) is not None:
                    raise InvalidSetting(
                        f"{name.upper()} is set without OIDC_ISSUER, the provider it is for."
                    )
        elif self.oidc_client_id is None and self.oidc_audience is None:
            raise InvalidSetting(
                "OIDC_ISSUER needs OIDC_CLIENT_ID, for people who sign in, or OIDC_AUDIENCE, for bearer tokens."
            )
        elif self.oidc_client_id is not None:
            for name in ("oidc_client_secret", "public_url"):
                if getattr(self, name) is None:
                    raise InvalidSetting(f"OIDC_CLIENT_ID needs {name.upper()} too.")


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
        number = whole_number(value, least, most)
        if number is None:
            raise InvalidSetting(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
        return number

    def log_level(self, name: str) -> str | None:
        value = self.text(name)
        if value is None:
            return None
        if value.upper() not in logging.getLevelNamesMapping():
            raise InvalidSetting(f"{name} must be the name of a level, such as INFO, not {value!r}.")
        return value.upper()

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.text(name) or default
        if value not in choices:
            raise InvalidSetting(f"{name} must be {' or '.join(choices)}, not {value!r}.")
        return value

    def locale(self, name: str, default: str) -> str:
        value = (self.text(name) or default).replace("-", "_")
        try:
            return str(Locale.parse(value))
        except (UnknownLocaleError, ValueError):
            raise InvalidSetting(f"{name} must be a locale such as en_GB or de_DE, not {value!r}.") from None

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

    def https(self, name: str) -> str | None:
        value = self.text(name)
        if value is None:
            return None
        match = re.fullmatch(r"(https?)://(\[[0-9A-Fa-f:]+\]|[^\s/?#:@]+)(:\d{1,5})?(/[^\s?#]*)?", value)
        if match is None or (match[1] == "http" and not is_loopback(match[2])):
            raise InvalidSetting(
                f"{name} must be an address such as https://login.example.com, not {value!r}."
            )
        return value

    def networks(self, name: str) -> tuple[Network, ...]:
        found: list[Network] = []
        for part in (self.text(name) or "").split(","):
            if text := part.strip():
                try:
                    found.append(ipaddress.ip_network(text))
                except ValueError:
                    raise InvalidSetting(
                        f"{name} must be networks such as 10.1.0.0/16, separated by commas; {text!r} is none."
                    ) from None
        return tuple(found)

    def secrets(self, name: str) -> tuple[str, ...]:
        values = tuple(part.strip() for part in (self.text(name) or "").split(",") if part.strip())
        if any(len(value) < 32 for value in values):
            # Not the value: it is a secret.
            raise InvalidSetting(
                f"{name} must have 32 or more random characters; `openssl rand -hex 32` makes some."
            )
        return values

    def webhook_secrets(self, name: str) -> tuple[str, ...]:
        values = tuple(part.strip() for part in (self.text(name) or "").split(",") if part.strip())
        for value in values:
            try:
                secret = base64.b64decode(value.removeprefix("whsec_"), validate=True)
            except ValueError:
                secret = b""
            if len(secret) < 24:
                # Not the value: it is a secret.
                raise InvalidSetting(
                    f"{name} must be 24 or more random bytes in base64, as `openssl rand -base64 24` makes them."
                )
        return values

    def fernet_keys(self, name: str) -> tuple[str, ...]:
        values = tuple(part.strip() for part in (self.text(name) or "").split(",") if part.strip())
        try:
            for value in values:
                Fernet(value)
        except ValueError:
            # Not the value: it is a secret.
            raise InvalidSetting(f"{name} must be what `python -m tasks.token_key` prints.") from None
        return values

    def template(self, name: str, field: str) -> str | None:
        value = self.text(name)
        if value is not None and re.fullmatch(rf"https?://[^\s{{}}]+{{{field}}}[^\s{{}}]*", value) is None:
            raise InvalidSetting(
                f"{name} must be an address such as https://traces.example.com/{{{field}}}, not {value!r}."
            )
        return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant by a host name or address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@cache
def settings() -> Settings:
    """Return this process's settings; a wrong value ends the process."""
    try:
        return Settings.from_environment()
    except InvalidSetting as error:
        raise SystemExit(str(error)) from None


def front_end_settings() -> Settings:
    """Return this process's settings for the front end; it ends when strangers could use it."""
    try:
        settings().check_sign_in()
        settings().check_token_key()
    except InvalidSetting as error:
        raise SystemExit(str(error)) from None
    return settings()


def worker_settings() -> Settings:
    """Return this process's settings for a worker; it ends when it could not make payments."""
    try:
        settings().check_token_key()
    except InvalidSetting as error:
        raise SystemExit(str(error)) from None
    return settings()
