"""A Django project that is set up by its settings alone, with `django_dramatiq`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SETTINGS = """
import os

SECRET_KEY = "for tests"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
INSTALLED_APPS = ["django_dramatiq", "shop"]
DRAMATIQ_BROKER = {
    "BROKER": "dramatiq_jetstream.JetStreamBroker",
    "OPTIONS": {"url": os.environ["NATS_URL"], "namespace": os.environ["NAMESPACE"]},
    "MIDDLEWARE": [
        "dramatiq.middleware.Retries",
        "django_dramatiq.middleware.DbConnectionsMiddleware",
        "dramatiq_jetstream.periodic.Periodic",
    ],
}
DRAMATIQ_RESULT_BACKEND = {
    "BACKEND": "dramatiq_jetstream.results.JetStreamBackend",
    "BACKEND_OPTIONS": {"url": os.environ["NATS_URL"]},
    "MIDDLEWARE_OPTIONS": {"store_results": True},
}
"""

TASKS = """
import dramatiq


@dramatiq.actor(cron="0 3 * * *")
def nightly():
    pass


@dramatiq.actor(queue_name="charges")
def charge(order):
    return f"charged {order}"
"""

PROGRAM = """
import django

django.setup()

import dramatiq
from django.db import transaction
from dramatiq_jetstream.django import enqueue_on_commit
from shop.tasks import charge

broker = dramatiq.get_broker()


def state(message):
    return broker.status(message).state


try:
    with transaction.atomic():
        undone = enqueue_on_commit(charge.message(1))
        raise ValueError
except ValueError:
    pass
with transaction.atomic():
    message = enqueue_on_commit(charge.message(2))
    assert state(message) == "unknown", state(message)
print(message.get_result(block=True, timeout=60_000))
print(enqueue_on_commit(charge.message(3)).get_result(block=True, timeout=60_000))
assert state(undone) == "unknown"
broker.close()
"""


def test_a_django_project_needs_settings_only(nats_url: str, namespace: str, tmp_path: Path) -> None:
    """`fleet setup` and `fleet work` take its modules, actors run, an undone transaction enqueues nothing."""
    (tmp_path / "settings.py").write_text(SETTINGS)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "tasks.py").write_text(TASKS)
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "settings",
        "NATS_URL": nats_url,
        "NAMESPACE": namespace,
        "PYTHONPATH": str(tmp_path),
    }

    def run(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    prepared = run("-m", "dramatiq_jetstream.cli", "setup", "django_dramatiq.setup", "shop.tasks")
    assert "schedule nightly" in prepared
    listed = run(
        "-m", "dramatiq_jetstream.cli", "schedules", "--json", "--broker", "django_dramatiq.setup,shop.tasks"
    )
    assert '"nightly"' in listed
    worker = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dramatiq_jetstream.cli",
            "work",
            "django_dramatiq.setup",
            "shop.tasks",
            "-p",
            "1",
        ],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert run("program.py") == "charged 2\ncharged 3\n"
    finally:
        worker.terminate()
        worker.wait(60)
