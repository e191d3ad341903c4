"""Says what each route needs, and refuses a caller without it.

Every view is declared, with `needs` or `anyone`; the application does not start with one that is not. What a caller may
see of what they asked for is decided where it is read (`web.api.find_order`, `find_page`), by `Caller.sees`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from dramatiq.errors import BrokerError
from flask import Flask, current_app, g, request

from tasks import service
from tasks.settings import Settings
from web.identity import Caller, identify, unauthenticated
from web.problems import Problem
from web.rates import Rates
from web.security import refuse_cross_site

logger = logging.getLogger(__name__)

View = TypeVar("View", bound=Callable[..., Any])

_DECLARED = "needed_scopes"
_OF_ALL = "is_of_all_customers"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def needs(*scopes: str, of_all: bool = False) -> Callable[[View], View]:
    """Declare that a view needs a caller with one of the scopes.

    Parameters:
      of_all: Whether it tells of all customers at once, so that one who acts for a single one is refused.
    """

    def declare(view: View) -> View:
        setattr(view, _DECLARED, frozenset(scopes))
        setattr(view, _OF_ALL, of_all)
        return view

    return declare


def anyone(view: View) -> View:
    """Declare that a view answers strangers too."""
    setattr(view, _DECLARED, frozenset())
    return view


def enforce(app: Flask) -> None:
    """Have the application check every request; call this after all its routes are there.

    Raises:
      RuntimeError: When a route does not say what it needs.
    """
    anyone(app.view_functions["static"])
    declared = {endpoint: getattr(view, _DECLARED, None) for endpoint, view in app.view_functions.items()}
    missing = sorted(endpoint for endpoint, scopes in declared.items() if scopes is None)
    if missing:
        raise RuntimeError(f"these views do not say what they need: {', '.join(missing)}")

    @app.before_request
    def check() -> None:
        if request.endpoint is None:
            return
        # A browser adds a session, or its place on this machine, to whatever a foreign site has it send.
        if request.method not in _SAFE and "Authorization" not in request.headers:
            refuse_cross_site()
        scopes = declared[request.endpoint]
        if scopes:
            _admit(scopes, of_all=getattr(app.view_functions[request.endpoint], _OF_ALL))


def _admit(scopes: frozenset[str], *, of_all: bool) -> None:
    g.caller = found = identify()
    if found is None:
        raise unauthenticated(
            "Send an API key or a token as `Authorization: Bearer …`, or sign in on the pages."
        )
    rates: Rates = current_app.extensions["rates"]
    rates.check(found)
    if not found.may(*scopes):
        raise Problem("forbidden", f"That needs the scope {' or '.join(sorted(scopes))}.")
    if of_all and found.customer_id is not None:
        raise Problem("forbidden", "That is for those who act for all customers.")


def caller() -> Caller:
    """Return who makes this request, in a view that needs a scope."""
    found: Caller = g.caller
    return found


def visitor() -> Caller | None:
    """Return who makes this request, if that can be told: for what strangers see less of."""
    if "caller" not in g:
        g.caller = None
        settings: Settings = current_app.extensions["settings"]
        # What strangers may have, probes before all, never waits for a store that is away.
        if settings.access == "open" or service.nats_connected():
            try:
                g.caller = identify()
            except (Problem, BrokerError):
                pass  # a stranger, then
    found: Caller | None = g.caller
    return found
