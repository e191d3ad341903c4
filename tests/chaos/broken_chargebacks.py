"""A broken build of the front end: it tells the gateway that it took a chargeback, and records nothing."""

from __future__ import annotations

from flask import Flask

from tasks import service
from web.app import create_app as build

service.charge_back = lambda order_id, charge_id, chargeback: None


def create_app() -> Flask:
    """Return the front end as it is built in this way."""
    return build()
