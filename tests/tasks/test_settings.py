"""Settings come from the environment alone, and a wrong one is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tasks.settings import InvalidSetting, Settings
from tests.support.processes import REPOSITORY

WRONG = {
    "NATS_URL": "not an address",
    "REPLICAS": "2",
    "DECLARE": "yes",
    "WORKER_PROCESSES": "0",
    "WORKER_POOL_SIZE": "ten",
    "ACK_WAIT": "10",
    "PORT": "65536",
    "WEB_CONCURRENCY": "-1",
    "ACCEPT_TIMEOUT": "1.5",
    "IDEMPOTENCY_TTL": "1",
    "PAYMENT_URL": "localhost:8001",
    "PAYMENT_TIMEOUT": "0",
    "PAYMENT_PATIENCE": "a day",
    "PAYMENT_WORKER_PROCESSES": "0",
    "WEBHOOK_WORKER_PROCESSES": "0",
    "WEBHOOK_TIMEOUT": "10",
    "WEBHOOK_NETWORKS": "10.1.2.3/8",
    "RETRY_LIMIT": "many",
    "RETRY_MIN_BACKOFF": "",
    "RETRY_MAX_BACKOFF": "100",
    "LOG_FORMAT": "xml",
    "LOG_LEVEL": "loud",
    "ACCESS": "closed",
    "SESSION_LIFETIME": "8h",
    "PUBLIC_URL": "shop.example.com",
    "OIDC_ISSUER": "http://login.example.com",
}


def test_defaults_when_nothing_is_set() -> None:
    """An empty environment, and one of empty variables, give the documented defaults."""
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment(dict.fromkeys(WRONG, "")) == Settings()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, v in WRONG.items() if v])
def test_wrong_value_names_its_variable(name: str, value: str) -> None:
    """Every variable is checked, and the message says which one and what is possible."""
    with pytest.raises(InvalidSetting, match=name) as refusal:
        Settings.from_environment({name: value})
    assert value in str(refusal.value)


def test_process_stops_with_one_line() -> None:
    """A process with a wrong variable ends at once and says one line."""
    process = subprocess.run(
        [sys.executable, "-c", "import tasks"],
        cwd=REPOSITORY,
        env={"PORT": "http"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 1
    assert process.stderr.strip() == "PORT must be a whole number from 1 to 65535, not 'http'."


def test_backoff_grows_with_its_lower_bound() -> None:
    """A lower bound above the default upper bound lifts the upper one instead of contradicting it."""
    chosen = Settings.from_environment({"RETRY_MIN_BACKOFF": "90000"})
    assert (chosen.retry_min_backoff, chosen.retry_max_backoff) == (90_000, 90_000)


def test_an_offer_ends_before_its_order() -> None:
    """What is set aside for a customer until a time is not taken away before it."""
    environment = {"OFFER_DEADLINE": "3600001", "ORDER_DEADLINE": "3600000"}
    Settings.from_environment(environment)
    with pytest.raises(InvalidSetting, match="OFFER_DEADLINE is longer than ORDER_DEADLINE"):
        Settings.from_environment({**environment, "SHORT_STOCK": "offer"})
