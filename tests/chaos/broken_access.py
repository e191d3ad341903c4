"""A broken build of the front end: any caller who knows an order's id sees it."""

from __future__ import annotations

from flask import Flask

from web.app import create_app as build
from web.identity import Caller

Caller.sees = lambda self, order: True  # type: ignore[method-assign]


def create_app() -> Flask:
    """Return the front end as it is built in this way."""
    return build()
