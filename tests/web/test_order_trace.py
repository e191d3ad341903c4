"""One order is one trace: exported by the real service over OTLP, decoded by a receiver, followed span by span."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.otlp import OtlpReceiver, Span, silent_endpoint
from tests.support.polling import eventually
from tests.support.processes import Process
from tests.web.stack import Stack

ENVIRONMENT = {"OTEL_BSP_SCHEDULE_DELAY": "100", "RETRY_LIMIT": "1", "LOG_FORMAT": "json"}

#: What `opentelemetry-instrument` is told besides; its own defaults need the exporter for gRPC.
INSTRUMENT = {
    "OTEL_SERVICE_NAME": "fleet",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    """Where the service exports to."""
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def service(receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The service, which gives up a step after one retry."""
    env = {**ENVIRONMENT, "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
    with Stack(tmp_path_factory.mktemp("traced"), env=env) as stack:
        yield stack


class Trace:
    """The spans of one order."""

    def __init__(self, receiver: OtlpReceiver, order_id: str) -> None:
        self._receiver = receiver
        self._order_id = order_id

    @property
    def spans(self) -> list[Span]:
        spans = self._receiver.spans
        ids = {span.trace_id for span in spans if _message_id(span) == f"{self._order_id}.created"}
        return [span for span in spans if span.trace_id in ids]

    def lines(self) -> list[str]:
        """The tree: every span indented below its parent, siblings in alphabetical order."""
        spans = self.spans
        known = {span.span_id for span in spans}
        lost = [span.name for span in spans if span.parent_id and span.parent_id not in known]
        assert not lost, f"the parents of {lost} were not received"

        def below(parent: str, depth: int) -> Iterator[str]:
            children = [span for span in spans if span.parent_id == parent]
            for span in sorted(children, key=_describe):
                yield "  " * depth + _describe(span)
                yield from below(span.span_id, depth + 1)

        return list(below("", 0))

    def reads(self, text: str) -> list[Span]:
        """Wait until the trace is exactly this tree."""
        expected = textwrap.dedent(text).strip().splitlines()

        def same() -> bool:
            found = self.lines()
            assert found == expected, "\n".join(found)
            return True

        eventually(same, timeout=20, interval=0.1)
        return self.spans


def _describe(span: Span) -> str:
    """Who did what, and how it ended: PRODUCER send ORDER.paid, CONSUMER process payments …"""
    what = [span.kind, span.name]
    if span.kind != "PRODUCER":
        names = ("dramatiq.actor", "dramatiq.attempt", "dramatiq.outcome", "dramatiq.dead_letter.reason")
        what += [str(span.attributes[name]) for name in names if name in span.attributes]
    if "dramatiq.replay" in span.attributes:
        what.append("replay")
    status = span.attributes.get("http.response.status_code", span.attributes.get("http.status_code"))
    return " ".join([*what, *([str(status)] if status is not None else [])])


def _message_id(span: Span) -> str:
    return str(span.attributes.get("messaging.message.id"))


def test_an_order_with_a_failed_payment_is_one_trace(service: Stack, receiver: OtlpReceiver) -> None:
    """From the request through every step, both attempts to pay, and what was asked of the gateway."""
    service.knobs(fail_next=1)
    order_id = service.order()["order_id"]
    assert service.final(order_id)["status"] == "confirmed"
    spans = Trace(receiver, order_id).reads(
        """
        SERVER POST /api/orders 202
          PRODUCER send ORDER.created
            CONSUMER process orders reserve_stock 1 done
              PRODUCER send ORDER.reserved
                CONSUMER process payments capture_payment 1 retried
                  CLIENT POST 500
                  PRODUCER send payments
                    CONSUMER process payments capture_payment 2 done
                      CLIENT POST 201
                      PRODUCER send ORDER.confirmed
                        CONSUMER process projection project_event 1 done
                      PRODUCER send ORDER.paid
                        CONSUMER process orders confirm_order 1 done
                        CONSUMER process projection project_event 1 done
                CONSUMER process projection project_event 1 done
            CONSUMER process projection project_event 1 done
        """
    )
    assert len({span.trace_id for span in spans}) == 1
    of_kind = {
        kind: [span for span in spans if span.kind == kind] for kind in ("SERVER", "CLIENT", "CONSUMER")
    }
    # What others instrument better is instrumented by their packages.
    assert {span.scope for span in of_kind["SERVER"]} == {"opentelemetry.instrumentation.flask"}
    assert {span.scope for span in of_kind["CLIENT"]} == {"opentelemetry.instrumentation.requests"}
    assert {span.service for span in of_kind["SERVER"]} == {"order-service-web"}
    assert {span.service for span in of_kind["CLIENT"] + of_kind["CONSUMER"]} == {"order-service-worker"}
    first, second = (span for span in spans if span.attributes.get("dramatiq.actor") == "capture_payment"
                     and span.kind == "CONSUMER")  # fmt: skip
    assert first.is_error
    assert first.attributes["error.type"] == "tasks.gateway.GatewayUnavailable"
    assert first.end <= second.start
    assert {span.attributes["order_id"] for span in of_kind["CONSUMER"]} == {order_id}


def test_an_order_that_was_given_up_and_replayed_is_one_trace(service: Stack, receiver: OtlpReceiver) -> None:
    """The dead letter, what it was announced as, and its replay by the fleet command stay with the order."""
    service.knobs(fail_next=2)
    order_id = service.order()["order_id"]
    eventually(lambda: service.get(f"/api/orders/{order_id}").json()["status"] == "failed")
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    fleet = [sys.executable, "-m", "dramatiq_jetstream.cli", "--url", service.nats.url, "dead", "replay"]
    env = {**os.environ, **service.environment, **INSTRUMENT}
    subprocess.run([instrument, *fleet, "--all"], env=env, check=True, timeout=30)
    assert service.final(order_id)["status"] == "confirmed"
    spans = Trace(receiver, order_id).reads(
        """
        SERVER POST /api/orders 202
          PRODUCER send ORDER.created
            CONSUMER process orders reserve_stock 1 done
              PRODUCER send ORDER.reserved
                CONSUMER process payments capture_payment 1 retried
                  CLIENT POST 500
                  PRODUCER send payments
                    CLIENT dead_letter payments capture_payment retries exhausted
                    CONSUMER process orders announce_failure 1 done
                      PRODUCER send ORDER.failed
                        CONSUMER process projection project_event 1 done
                    CONSUMER process payments capture_payment 2 failed
                      CLIENT POST 500
                    PRODUCER send payments replay
                      CONSUMER process payments capture_payment 1 done
                        CLIENT POST 201
                        PRODUCER send ORDER.confirmed
                          CONSUMER process projection project_event 1 done
                        PRODUCER send ORDER.paid
                          CONSUMER process orders confirm_order 1 done
                          CONSUMER process projection project_event 1 done
                CONSUMER process projection project_event 1 done
            CONSUMER process projection project_event 1 done
        """
    )
    (replay,) = (span for span in spans if "dramatiq.replay" in span.attributes)
    assert replay.service == "fleet"


def test_lines_of_the_service_lead_to_their_trace(service: Stack, receiver: OtlpReceiver) -> None:
    """What the log says of a request and of steps, one that failed too, carries order, actor, message and trace."""
    service.knobs(fail_next=1)
    order_id = service.order()["order_id"]
    assert service.final(order_id)["status"] == "confirmed"

    def about(process: Process | None = None) -> list[dict[str, str]]:
        output = (process or service.workers).output
        lines = [line for line in output.splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, lines) if line.get("order_id") == order_id]

    eventually(lambda: any("Retrying" in line["message"] for line in about()))
    (attempt,) = eventually(
        lambda: [s for s in Trace(receiver, order_id).spans if s.is_error and s.kind == "CONSUMER"]
    )
    assert {line["trace_id"] for line in about()} == {attempt.trace_id}
    lines = [line for line in about() if line["span_id"] == attempt.span_id]
    assert len(lines) >= 3  # that it failed, that it ended, and that it is tried again
    for line in lines:
        assert line["actor"] == "capture_payment"
        assert line["message_id"] == _message_id(attempt) == f"{order_id}.reserved:capture_payment"
    (placed,) = [line for line in about(service.web) if line.get("status") == 202]
    assert placed["trace_id"] == attempt.trace_id


def test_an_endpoint_that_never_answers_keeps_no_order_waiting(tmp_path: Path) -> None:
    """Front end, workers and their end are as quick as without telemetry, give or take a flush."""
    with silent_endpoint() as endpoint:
        with Stack(tmp_path, env={**ENVIRONMENT, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as stack:
            for _ in range(20):
                asked = time.monotonic()
                order = stack.order()
                assert time.monotonic() - asked < 8
            assert stack.final(order["order_id"])["status"] == "confirmed"
            began = time.monotonic()
        # Each of the two waits for its exporter for three seconds at most; it would be ten, several times.
        assert time.monotonic() - began < 40
