"""The dashboard of a fleet: a WSGI application that shows what JetStream holds, and changes it for those who may.

    from dramatiq_jetstream.ui import create_app, operator

    application = create_app(broker, access=lambda environ: operator("ann"))

`fleet ui` serves it alone; it can be mounted in any WSGI program (Flask, Django) under any path. It keeps nothing: all
that a page shows is read from JetStream, so any number of processes may serve it, and a restart loses nothing.
"""

from __future__ import annotations

try:
    import argon2 as _argon2  # noqa: F401
    import jinja2 as _jinja2  # noqa: F401
    import werkzeug as _werkzeug  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dramatiq_jetstream.ui needs the package {error.name}: pip install 'dramatiq-jetstream[ui]'",
        name=error.name,
    ) from error

from .access import PERMISSIONS, OnThisMachine, Passwords, Person, ProxyHeader, operator, viewer
from .app import Dashboard, create_app

__all__ = [
    "PERMISSIONS",
    "Dashboard",
    "OnThisMachine",
    "Passwords",
    "Person",
    "ProxyHeader",
    "create_app",
    "operator",
    "viewer",
]
