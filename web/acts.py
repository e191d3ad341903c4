"""Records what callers do in the audit (`tasks.audit`), before it is done."""

from __future__ import annotations

from contextlib import AbstractContextManager

from flask import request

from tasks import app
from tasks.audit import Act, Who
from web.access import caller


def recorded(act: str, target: str, **detail: str) -> AbstractContextManager[Act]:
    """Record that the caller does something, which is carried out in the block; see `tasks.audit.AuditLog.record`.

    Raises:
      BrokerConnectionError: When the record cannot be stored; the block was not entered.
    """
    return app.audit_log().record(act, target, acting(), **detail)


def acting() -> Who:
    """Return who makes this request as the audit names them: of a customer nothing, for it is never erased."""
    who = caller()
    via = "API" if request.path.startswith("/api/") else "page"
    if who.customer_id is not None:
        return Who("", "customer", via)
    return Who(who.name, who.kind, via, request.remote_addr or "")
