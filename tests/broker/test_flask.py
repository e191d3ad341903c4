"""Actors in an application context of Flask's."""

from __future__ import annotations

import dramatiq
import pytest
from flask import Flask, current_app, g, has_app_context

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.flask import AppContext, NoApplication
from dramatiq_jetstream.testing import StubBroker
from tests.support.polling import eventually


def test_actors_run_in_an_application_context(broker: JetStreamBroker) -> None:
    """Each attempt has a context of its own, torn down with what it raised, whether it ends, fails or is skipped."""
    context, torn_down, seen = AppContext(), [], []
    broker.add_middleware(context)

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
    def look() -> None:
        seen.append((current_app.name, "again" in g))
        g.again = True
        if len(seen) == 1:
            raise ValueError

    app = Flask("shop")
    app.teardown_appcontext(lambda error: torn_down.append(type(error)))
    context.init_app(app)
    look.send()
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    try:
        eventually(lambda: torn_down == [ValueError, type(None)])
    finally:
        worker.stop()
    assert seen == [("shop", False), ("shop", False)]
    assert app.extensions["dramatiq_jetstream"] is context


def test_a_skipped_message_leaves_no_context() -> None:
    """What is pushed is popped when a later middleware skips the message."""

    class Skip(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            assert has_app_context()
            raise dramatiq.middleware.SkipMessage

    broker = StubBroker([AppContext(Flask("shop")), Skip()])
    actor = dramatiq.actor(lambda: None, broker=broker, actor_name="skipped")  # type: ignore[call-overload]
    actor.send()
    assert broker.run() == 1
    assert not has_app_context()


def test_a_worker_without_an_application_does_not_start(broker: JetStreamBroker) -> None:
    """One sentence says what is missing."""
    broker.add_middleware(AppContext())
    with pytest.raises(NoApplication, match=r"init_app\(app\)"):
        dramatiq.Worker(broker, worker_threads=1).start()
