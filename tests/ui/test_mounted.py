"""The programs in docs/dashboard.md: the dashboard as a part of a Flask and of a Django application."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.processes import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "dashboard.md"

FLASK = """
from werkzeug.test import Client
from flask_shop import app

stranger, ann, vic = Client(app), Client(app), Client(app)
print(stranger.get("/fleet/dead?queue=q").location)
for visitor, role in ((ann, "admin"), (vic, "staff")):
    assert visitor.get(f"/sign-in?name={role}&role={role}").location == "/fleet/"
    page = visitor.get("/fleet/")
    print(page.status_code, 'href="/fleet/workers"' in page.text, role in page.text)
    print(visitor.get("/fleet/change/replay?all=1").status_code)
    print(visitor.get("/fleet/static/style.css").status_code)
"""

DJANGO_SETTINGS = """
SECRET_KEY = "x"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.sqlite"}}
ROOT_URLCONF = "settings"
urlpatterns = []
"""

DJANGO = """
import django
django.setup()
from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import Client as Site
from werkzeug.test import Client

call_command("migrate", verbosity=0)
from wsgi import application

print(Client(application).get("/fleet/dead?queue=q").location)
people = {"ann": User.objects.create_superuser, "vic": User.objects.create_user, "eve": User.objects.create_user}
for name, make in people.items():
    user = make(name)
    user.is_staff = name != "eve"
    user.save()
    site = Site()
    site.force_login(user)
    visitor = Client(application)
    visitor.set_cookie("sessionid", site.cookies["sessionid"].value)
    page = visitor.get("/fleet/")
    print(page.status_code, 'href="/fleet/workers"' in page.text, visitor.get("/fleet/change/replay?all=1").status_code)
print(Client(application).get("/nothing").status_code)
"""


def _run(directory: Path, program: str, check: str, nats_url: str, **env: str) -> list[str]:
    (source,) = re.findall(rf"```python\n# {program}\.py\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (directory / f"{program}.py").write_text(source)
    (directory / "check.py").write_text(check)
    environment = {**os.environ, "NATS_URL": nats_url, "SECRET_KEY": "x", "PYTHONPATH": str(directory), **env}
    done = subprocess.run(
        [sys.executable, "check.py"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_flask_example_works(tmp_path: Path, nats_url: str) -> None:
    """Strangers sign in first, staff may look, an admin is shown a change."""
    assert _run(tmp_path, "flask_shop", FLASK, nats_url) == [
        "/sign-in?next=%2Ffleet%2Fdead%3Fqueue%3Dq",
        *("200 True True", "200", "200"),
        *("200 True True", "403", "200"),
    ]


def test_the_django_example_works(tmp_path: Path, nats_url: str) -> None:
    """By Django's own session: a superuser may make changes, staff may look, others sign in; the site is below."""
    (tmp_path / "settings.py").write_text(DJANGO_SETTINGS)
    assert _run(tmp_path, "wsgi", DJANGO, nats_url, DJANGO_SETTINGS_MODULE="settings") == [
        "/admin/login/?next=%2Ffleet%2Fdead%3Fqueue%3Dq",
        "200 True 200",
        "200 True 403",
        "303 False 303",
        "404",
    ]
