"""An application context of Flask's around every actor, so that `current_app` and extensions work there.

    context = AppContext()
    broker.add_middleware(context)

    def create_app():
        app = Flask(__name__)
        context.init_app(app)
        return app

The context is pushed before the actor runs and popped when it has ended, however it ended; functions that tear down a
context (an extension's database session) are called with what the actor raised. A process that dies tears down nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware, MiddlewareError

from .errors import InvalidOption

if TYPE_CHECKING:
    import dramatiq
    from flask import Flask

__all__ = ["AppContext", "NoApplication"]

_PUSHED = "flask_context"


class NoApplication(InvalidOption, MiddlewareError):
    """A worker starts and no application was given; raised as it boots.

    Examples:
      >>> from dramatiq_jetstream.flask import AppContext
      >>> StubBroker([AppContext()]).run()
      Traceback (most recent call last):
          ...
      dramatiq_jetstream.flask.NoApplication: ...
    """


class AppContext(Middleware):
    """Middleware that runs every actor in an application context.

    Parameters:
      app: The application; None when `init_app` gives it later.

    Raises:
      NoApplication: When a worker boots before there is one.

    Examples:
      >>> from flask import Flask
      >>> from dramatiq_jetstream.flask import AppContext
      >>> context = AppContext()
      >>> broker = StubBroker([context])
      >>> context.init_app(Flask("shop"))
      >>> context.app.name
      'shop'
    """

    def __init__(self, app: Flask | None = None) -> None:
        self.app = app

    def init_app(self, app: Flask) -> None:
        """Use this application from now on, as `create_app` functions do with Flask's extensions."""
        self.app = app
        app.extensions["dramatiq_jetstream"] = self

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        if self.app is None:
            raise NoApplication(
                "AppContext has no application: have the worker import a module that calls init_app(app), such as the "
                "one that calls create_app()."
            )

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        if self.app is not None:
            context = self.app.app_context()
            context.push()
            vars(message)[_PUSHED] = context

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        context = vars(message).pop(_PUSHED, None)
        if context is not None:
            context.pop(exception)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        self.after_process_message(broker, message)
