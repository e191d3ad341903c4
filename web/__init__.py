"""The front end of the order service: pages, API and health checks, as a Flask application.

``gunicorn -c web/gunicorn.conf.py "web:create_app()"`` serves it. It holds no state of its own: what it
accepts is in JetStream before it answers, and what it shows is read from there, so any number of these
processes may run side by side and any of them may die at any time.
"""

from __future__ import annotations

from web.app import create_app

__all__ = ["create_app"]
