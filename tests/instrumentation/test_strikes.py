"""An exception strikes between any two lines of the instrumentation, as time limits and shutdowns do."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from dramatiq import Message, MessageProxy
from dramatiq.brokers.stub import StubBroker
from opentelemetry import context
from opentelemetry.instrumentation.dramatiq import (
    CARRIER_OPTION,
    attempts,
    carrier,
    errors,
    middleware,
    sending,
    unsampled,
)
from opentelemetry.instrumentation.dramatiq.attempts import attempt_of
from opentelemetry.instrumentation.dramatiq.middleware import TelemetryMiddleware

from tests.instrumentation.conftest import Recorded, stub_broker

SENDER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


class Struck(BaseException):
    """What Dramatiq throws into a thread."""


class Strike:
    """Raises at the n-th line of the instrumentation, once."""

    FILES = tuple(module.__file__ for module in (attempts, carrier, errors, middleware, sending, unsampled))

    def __init__(self, line: int) -> None:
        self.left = line
        self.done = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line" and not self.done:
            self.left -= 1
            if self.left < 0:
                self.done = True
                raise Struck
        return self


def middleware_of(broker: StubBroker) -> TelemetryMiddleware:
    return next(m for m in broker.middleware if isinstance(m, TelemetryMiddleware))


def process(
    broker: StubBroker, strike: Strike | None = None, *, flags: str = "01", send: bool = False
) -> MessageProxy:
    """Do with the middleware what Dramatiq's worker thread does for one message, whose actor may send another."""
    telemetry = middleware_of(broker)
    proxy = MessageProxy(Message("q", "act", (), {}, {CARRIER_OPTION: {"traceparent": f"{SENDER}-{flags}"}}))
    try:
        sys.settrace(strike)
        try:
            telemetry.before_process_message(broker, proxy)
            if send:
                broker.enqueue(Message("q", "act", (), {}, {}))
            telemetry.after_process_message(broker, proxy, result=None)
        finally:
            sys.settrace(None)
    except Struck as error:
        telemetry.after_process_message(broker, proxy, exception=error)
    telemetry.after_ack(broker, proxy)
    return proxy


@pytest.mark.parametrize("send", [False, True], ids=["alone", "sends"])
@pytest.mark.parametrize("flags", ["01", "00"], ids=["sampled", "not-sampled"])
def test_a_strike_at_any_line_leaves_nothing_open(telemetry: Recorded, send: bool, flags: str) -> None:
    """Each line in turn: a span ends once at most, no context stays, and the next message is as any."""
    spans = 0 if flags == "00" else 2 if send else 1
    line = 0
    while True:
        telemetry.exporter.clear()
        broker = stub_broker()
        broker.declare_queue("q")
        strike = Strike(line)
        proxy = process(broker, strike, flags=flags, send=send)
        assert attempt_of(proxy) is None, line
        assert not context.get_current(), line
        ended = len(telemetry.all)
        assert ended <= spans, line
        process(broker, flags=flags, send=send)
        assert len(telemetry.all) == ended + spans, line
        if not strike.done:
            break
        line += 1
    assert line > 30, "it did strike"
