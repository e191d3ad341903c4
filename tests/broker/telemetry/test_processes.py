"""Telemetry of real processes: the dramatiq command, gunicorn, plain programs, and an endpoint that is down."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.otlp import OtlpReceiver, silent_endpoint
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import WORKER_READY, Process, dramatiq_worker, python

#: Nothing of the environment of the test run may decide what is exported.
CLEAN = dict.fromkeys(
    (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_TRACES_EXPORTER",
        "OTEL_METRICS_EXPORTER",
        "OTEL_SDK_DISABLED",
        "OTEL_SERVICE_NAME",
        "LOG_FORMAT",
    ),
    "",
)

BROKER = """
import os
import dramatiq
from dramatiq_jetstream import JetStreamBroker

broker = JetStreamBroker(os.environ["NATS_URL"], namespace=os.environ["NAMESPACE"])
dramatiq.set_broker(broker)
"""

ACTORS = """
import logging
from dramatiq_jetstream.telemetry import bind_log_fields

attempts = []

@dramatiq.actor(queue_name="pay", min_backoff=10, max_backoff=10)
def pay(order_id):
    bind_log_fields(order_id=order_id)
    logging.getLogger("orders").info("Capturing.")
    attempts.append(1)
    if len(attempts) == 1:
        raise ValueError("declined")
    confirm.send()

@dramatiq.actor(queue_name="confirm")
def confirm():
    print("confirmed", flush=True)
"""

CONFIGURE = """
from dramatiq_jetstream.telemetry import configure_telemetry
configure_telemetry("shop")
"""

SEND = """
import shop
shop.pay.send("o-1")
"""

SEND_AND_TELL = (
    SEND
    + """
import time
print("sent at", time.time(), flush=True)
"""
)

SHOP_TRACE = ["send pay", "process pay", "send pay", "process pay", "send confirm", "process confirm"]


@pytest.fixture
def environment(nats_url: str, namespace: str, receiver: OtlpReceiver) -> dict[str, str]:
    """A program's environment, with the receiver as its endpoint."""
    return CLEAN | {
        "NATS_URL": nats_url,
        "NAMESPACE": namespace,
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        # Long enough that only a flush at the end can bring the spans in time.
        "OTEL_BSP_SCHEDULE_DELAY": "600000",
        "OTEL_METRIC_EXPORT_INTERVAL": "600000",
        # How long idle threads of a worker take to notice that it stops.
        "dramatiq_worker_timeout": "100",
    }


def write(directory: Path, name: str, *parts: str) -> None:
    (directory / f"{name}.py").write_text("".join(parts))


def run(directory: Path, program: str, environment: dict[str, str], *, timeout: float = 30.0) -> str:
    """Run a program to its end; returns its output."""
    log = directory / "program.log"
    process = python("-c", program, log=log, env=environment, cwd=directory)
    process.start()
    code = process.wait(timeout)
    assert code == 0, process.output
    return process.output


def is_one_trace(receiver: OtlpReceiver) -> None:
    spans = receiver.wait_for(*SHOP_TRACE)
    assert [span.name for span in spans] == SHOP_TRACE
    assert len({span.trace_id for span in spans}) == 1
    for before, after in itertools.pairwise(spans):
        assert after.parent_id == before.span_id


@pytest.mark.parametrize("arguments", [[], ["--use-spawn"]], ids=["fork", "spawn"])
def test_a_worker_flushes_when_it_is_told_to_stop(
    tmp_path: Path, receiver: OtlpReceiver, environment: dict[str, str], arguments: list[str]
) -> None:
    """SIGTERM: everything of the worker's and of the sender's life arrives, in one trace, with its metrics."""
    write(tmp_path, "shop", BROKER, CONFIGURE, ACTORS)
    with dramatiq_worker(
        "shop", log=tmp_path / "worker.log", env=environment, cwd=tmp_path, processes=2, arguments=arguments
    ) as worker:
        run(tmp_path, SEND, environment)
        worker.wait_for_output("confirmed")
        assert worker.stop() == 0
    is_one_trace(receiver)
    assert {span.service for span in receiver.spans} == {"shop"}
    assert sum(p.value for p in receiver.points("messaging.process.duration", dramatiq__outcome="done")) == 2
    assert receiver.points("dramatiq.connection.up")
    # Each process is an instance of its own.
    assert len({s.resource["service.instance.id"] for s in receiver.spans}) >= 2


def test_lines_of_a_worker_carry_their_trace(
    tmp_path: Path, receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    """LOG_FORMAT=json under the dramatiq command: each line of the actor is an object with its trace."""
    write(tmp_path, "shop", BROKER, CONFIGURE, ACTORS)
    environment = environment | {"LOG_FORMAT": "json"}
    with dramatiq_worker("shop", log=tmp_path / "worker.log", env=environment, cwd=tmp_path) as worker:
        run(tmp_path, SEND, environment)
        worker.wait_for_output("confirmed")
    capturing = [json.loads(line) for line in worker.output.splitlines() if '"Capturing."' in line]
    assert [line["order_id"] for line in capturing] == ["o-1", "o-1"]
    is_one_trace(receiver)
    processes = [span.span_id for span in receiver.named("process pay")]
    assert [line["span_id"] for line in capturing] == processes
    assert {line["actor"] for line in capturing} == {"pay"}


def test_opentelemetry_instrument(
    tmp_path: Path, receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    """Programs that know nothing of telemetry are traced by running them under opentelemetry-instrument."""
    write(tmp_path, "shop", BROKER, ACTORS)
    write(tmp_path, "send", SEND)
    environment = environment | {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_SERVICE_NAME": "auto",
        "OTEL_PYTHON_CONFIGURATOR": "configurator",
    }
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    sender = Process(
        [instrument, sys.executable, "send.py"], log=tmp_path / "send.log", env=environment, cwd=tmp_path
    )
    command = [instrument, sys.executable, "-m", "dramatiq", "shop", "--processes", "1", "--threads", "2"]
    with Process(command, log=tmp_path / "worker.log", env=environment, cwd=tmp_path) as worker:
        assert sender.start().wait() == 0, sender.output
        worker.wait_for_output("confirmed")
        assert worker.stop() == 0
    is_one_trace(receiver)
    assert {span.service for span in receiver.spans} == {"auto"}


def test_nothing_is_set_up_without_an_endpoint(tmp_path: Path, environment: dict[str, str]) -> None:
    """No exporter asked for: OpenTelemetry is not even imported, and messages take the way that they took before.

    A broker that is not ours gets the context of log lines.
    """
    write(tmp_path, "shop", BROKER, ACTORS)
    run(
        tmp_path,
        """
import sys, shop
from dramatiq.brokers.stub import StubBroker
from dramatiq_jetstream.telemetry import configure_telemetry
middleware, enqueue = list(shop.broker.middleware), shop.broker.enqueue
assert configure_telemetry("shop") is False
assert shop.broker.middleware == middleware
other = StubBroker()
assert [type(m).__name__ for m in other.middleware].count("LogContext") == 1
assert shop.broker.enqueue == enqueue
shop.pay.send("o-1")
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
""",
        environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    )


@pytest.mark.parametrize(
    ("variables", "signals"),
    [
        ({}, {"traces", "metrics"}),
        ({"OTEL_SDK_DISABLED": "true"}, set()),
        ({"OTEL_TRACES_EXPORTER": "none"}, {"metrics"}),
        ({"OTEL_METRICS_EXPORTER": "none"}, {"traces"}),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}, set()),
    ],
)
def test_the_standard_variables_decide(
    tmp_path: Path,
    receiver: OtlpReceiver,
    environment: dict[str, str],
    variables: dict[str, str],
    signals: set[str],
) -> None:
    """What OTEL_* switches off is not exported; a plain program flushes at its end."""
    write(tmp_path, "shop", BROKER, CONFIGURE, ACTORS)
    run(tmp_path, SEND, environment | variables)
    got = {"traces"} if receiver.spans else set()
    if receiver.metric_names():
        got.add("metrics")
    assert got == signals


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({"LOG_FORMAT": "yaml"}, "LOG_FORMAT"),
    ],
)
def test_a_wrong_value_stops_the_program(
    tmp_path: Path, environment: dict[str, str], variables: dict[str, str], named: str
) -> None:
    """The message names the variable."""
    process = python(
        "-c", CONFIGURE, log=tmp_path / "program.log", env=environment | variables, cwd=tmp_path
    ).start()
    assert process.wait() == 1
    last = process.output.splitlines()[-1]
    assert last.startswith("dramatiq_jetstream.errors.InvalidOption")
    assert named in last


def test_who_deploys_names_the_service(
    tmp_path: Path, receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES stand above the program's own name."""
    write(tmp_path, "shop", BROKER, CONFIGURE, ACTORS)
    run(tmp_path, SEND, environment | {"OTEL_SERVICE_NAME": "theirs"})
    (span,) = receiver.wait_for("send pay")
    assert span.service == "theirs"


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_an_endpoint_that_is_down_is_not_in_the_way(
    tmp_path: Path, environment: dict[str, str], kind: str
) -> None:
    """Orders flow as before, the log says so once, and the end of the processes is not held up."""
    # Half a second each for the exporter, instead of the three that it has by default.
    configure = CONFIGURE.replace('"shop"', '"shop", shutdown_timeout=500')
    write(tmp_path, "shop", BROKER, configure, ACTORS)
    with silent_endpoint() as silent:
        endpoint = silent if kind == "silent" else f"http://127.0.0.1:{free_port()}"
        environment = environment | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
        }
        with dramatiq_worker("shop", log=tmp_path / "worker.log", env=environment, cwd=tmp_path) as worker:
            sent = run(tmp_path, SEND_AND_TELL, environment)
            # Its end is what could wait; that Python starts slowly is another matter.
            assert time.time() - float(sent.split("sent at ")[1].split()[0]) < 5
            worker.wait_for_output("confirmed")
            began = time.monotonic()
            assert worker.stop() == 0
            # A second to notice the signal, half of one for the exporter, and Dramatiq's own.
            assert time.monotonic() - began < 6
        assert worker.output.count("Transient error") <= 2


def test_sigterm_ends_a_plain_program_after_a_flush(
    tmp_path: Path, receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    """By default SIGTERM kills on the spot; the spans are out first, and it is still SIGTERM that ended it."""
    write(tmp_path, "shop", BROKER, CONFIGURE, ACTORS)
    program = SEND + "\nprint('sent', flush=True)\nimport time\ntime.sleep(60)\n"
    process = python("-c", program, log=tmp_path / "program.log", env=environment, cwd=tmp_path).start()
    process.wait_for_output("sent")
    assert receiver.spans == []
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    receiver.wait_for("send pay")


WEB = """
import os
import shop
from opentelemetry import trace
def app(environ, start_response):
    with trace.get_tracer("web").start_as_current_span(environ["PATH_INFO"]):
        shop.confirm.send()
    start_response("200 OK", [])
    return [str(os.getpid()).encode()]
"""

GUNICORN = """
def post_fork(server, worker):
    from dramatiq_jetstream.telemetry import start_telemetry
    start_telemetry()
"""


@pytest.mark.parametrize("preload", [False, True])
def test_gunicorn(tmp_path: Path, receiver: OtlpReceiver, environment: dict[str, str], preload: bool) -> None:
    """Each worker of a web server has exporters of its own, and flushes when the server is stopped."""
    configure = CONFIGURE.replace('"shop"', '"shop", start=False' if preload else '"shop"')
    write(tmp_path, "shop", BROKER, configure, ACTORS)
    write(tmp_path, "shopweb", WEB)
    write(tmp_path, "gunicorn_conf", GUNICORN if preload else "")
    port = free_port()
    command = ["-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2", "--worker-class", "gthread"]
    command += ["--config", "gunicorn_conf.py", *(["--preload"] if preload else []), "shopweb:app"]
    # It puts a control socket there.
    environment = environment | {"HOME": str(tmp_path)}
    with python(*command, log=tmp_path / "web.log", env=environment, cwd=tmp_path) as web:
        web.wait_for_output("Booting worker", count=2)
        answered: list[str] = []
        eventually(lambda: answered.extend(_get(port)) or len(set(answered)) == 2)
        assert receiver.spans == []
        assert web.stop() == 0
    spans = receiver.wait_for(*["/order", "send confirm"] * len(answered))
    parents = {span.span_id for span in spans if span.name == "/order"}
    assert {span.parent_id for span in spans if span.name == "send confirm"} == parents
    assert len({span.resource["service.instance.id"] for span in spans}) == 2


def _get(port: int) -> list[str]:
    """Place an order at the web server; which of its processes answered, or none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/order", timeout=10) as answer:
            return [answer.read().decode()]
    except urllib.error.URLError:
        return []


def test_a_worker_starts_what_its_parent_deferred(
    tmp_path: Path, receiver: OtlpReceiver, environment: dict[str, str]
) -> None:
    """With start=False a dramatiq worker process starts the exporters when it has booted."""
    write(tmp_path, "shop", CONFIGURE.replace('"shop"', '"shop", start=False'), BROKER, ACTORS)
    with dramatiq_worker("shop", log=tmp_path / "worker.log", env=environment, cwd=tmp_path) as worker:
        worker.wait_for_output(WORKER_READY)
        run(tmp_path, SEND, environment)
        worker.wait_for_output("confirmed")
        assert worker.stop() == 0
    assert "process confirm" in {span.name for span in receiver.spans}
