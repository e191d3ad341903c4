"""Sets telemetry up for a process, and sees to it that the last of it gets out.

A program calls `configure_telemetry(service_name)` once, where it begins: where the actors' module begins, or
where the web application is made. What is exported, where to and how often is decided by the standard OTEL_*
variables (see `environment`). When they ask for nothing, no provider is made and no broker is touched.

The exporters belong to one process. The dramatiq command imports the actors after it has forked, so there
this needs no care. A web server that loads the application before it forks (`gunicorn --preload`) calls
`configure_telemetry(..., start=False)` in the application and `start_telemetry()` in its `post_fork` hook.

The end of a process is noticed wherever it may come: a worker's shutdown, `atexit`, the end of a child of
multiprocessing (which runs no atexit handlers) and, for a plain program, SIGTERM. It waits for the exporter
for no longer than `shutdown_timeout`.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import multiprocessing.util
import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from dramatiq import Broker, Middleware

from . import environment
from .brokers import BrokerHook
from .conventions import messaging_system
from .logs import LogContext, configure_logging

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from .tallies import Tallies

logger = logging.getLogger(__name__)


@dataclass
class _Setup:
    service_name: str
    link_parents: bool
    shutdown_timeout: int
    started: bool = False
    providers: list[Any] = field(default_factory=list)
    tallies: Tallies | None = None
    log_hook: BrokerHook | None = None
    boot_hook: BrokerHook | None = None


_setup: _Setup | None = None
_lock = threading.RLock()


def configure_telemetry(
    service_name: str,
    *,
    link_parents: bool = False,
    logs: bool = True,
    start: bool = True,
    shutdown_timeout: int = 3_000,
) -> bool:
    """Set up traces, metrics and logs for this process; returns whether anything is going to be exported.

    - `service_name`: `service.name`, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES gives one
    - `link_parents`: see DramatiqInstrumentor
    - `logs`: give log lines their fields and the format that LOG_FORMAT asks for
    - `start`: False to wait for `start_telemetry`, or for the boot of a dramatiq worker process
    - `shutdown_timeout`: milliseconds that the end of the process may wait for the exporter

    Calling it again changes nothing. Raises InvalidOption, naming the variable, when one has a value that
    cannot work.
    """
    global _setup
    with _lock:
        if _setup is not None:
            return telemetry_enabled()
        if environment.enabled() and not _installed():
            logger.warning(
                "The OTEL_* variables ask for telemetry, but OpenTelemetry is not installed: "
                "install dramatiq-jetstream[otel]."
            )
        setup = _Setup(service_name, link_parents, shutdown_timeout)
        if logs:
            configure_logging()
            if not telemetry_enabled():
                setup.log_hook = BrokerHook(_add_log_context, _remove_log_context)
                setup.log_hook.install()
        _setup = setup
        if start:
            start_telemetry()
        elif telemetry_enabled():
            # The imports are done for all processes that are going to be forked, and a forked process
            # that starts quickly is not told to stop before it can hear that.
            from . import exporters, instrumentor  # noqa: F401

            exporters.check()
            setup.boot_hook = BrokerHook(_add_start_at_boot, _remove_start_at_boot)
            setup.boot_hook.install()
        return telemetry_enabled()


def telemetry_enabled() -> bool:
    """Whether the OTEL_* variables ask for anything to be exported, and OpenTelemetry is installed."""
    return environment.enabled() and _installed()


def _installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.sdk") is not None
    except ModuleNotFoundError:
        return False


def start_telemetry() -> None:
    """Make the providers of this process. Needed only after `configure_telemetry(..., start=False)`."""
    with _lock:
        setup = _setup
        if setup is None:
            raise RuntimeError("Nothing is configured to be started: call configure_telemetry first.")
        if setup.started or not telemetry_enabled():
            return
        from . import exporters

        setup.started = True
        _make_providers(setup)
        exporters.quieten()
        from .instrumentor import DramatiqInstrumentor

        instrumentor = DramatiqInstrumentor()
        if not instrumentor.is_instrumented_by_opentelemetry:
            # `opentelemetry-instrument` may have been here before.
            instrumentor.instrument(
                link_parents=setup.link_parents, flush_timeout=setup.shutdown_timeout, tallies=setup.tallies
            )
        _watch_for_the_end()


def flush_telemetry(timeout: int | None = None) -> bool:
    """Export what is waiting, for at most `timeout` ms (`shutdown_timeout`). True when all is out."""
    from .flush import force_flush

    setup = _setup
    if setup is None or not setup.providers:
        return True
    return force_flush(setup.providers, setup.shutdown_timeout if timeout is None else timeout)


def shutdown_telemetry(timeout: int | None = None) -> bool:
    """Export what is left, stop the exporters and take the instrumentation out. True when all got out."""
    global _setup
    with _lock:
        setup, _setup = _setup, None
    if setup is None:
        return True
    for hook in (setup.log_hook, setup.boot_hook):
        if hook is not None:
            hook.remove()
    if not setup.started:
        return True
    from .flush import shut_down
    from .instrumentor import DramatiqInstrumentor

    instrumentor = DramatiqInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()
    return shut_down(setup.providers, setup.shutdown_timeout if timeout is None else timeout)


def _make_providers(setup: _Setup) -> None:
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider

    from . import exporters

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        # Somebody has set OpenTelemetry up already, and a second set of exporters would double everything.
        return
    resource = _resource(setup.service_name)
    processors = exporters.span_processors()
    if processors:
        tracer_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for processor in processors:
            tracer_provider.add_span_processor(processor)
        trace.set_tracer_provider(tracer_provider)
        setup.providers.append(tracer_provider)
    readers, setup.tallies = exporters.metric_readers()
    if readers:
        meter_provider = MeterProvider(readers, resource, shutdown_on_exit=False)
        metrics.set_meter_provider(meter_provider)
        setup.providers.append(meter_provider)


def _resource(service_name: str) -> Resource:
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource

    # What a program calls itself is the default; whoever deploys it has the last word.
    named = SERVICE_NAME in OTELResourceDetector().detect().attributes
    return Resource.create({} if named else {SERVICE_NAME: service_name})


# ---- the end of the process ---------------------------------------------------------------------------


def _watch_for_the_end() -> None:
    atexit.register(shutdown_telemetry)
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, shutdown_telemetry, exitpriority=10)
    if threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        # Otherwise somebody has a plan for SIGTERM (gunicorn, the dramatiq command) that ends the process
        # in an orderly way. By default it dies on the spot.
        signal.signal(signal.SIGTERM, _at_sigterm)


def _at_sigterm(number: int, _frame: FrameType | None) -> None:
    shutdown_telemetry()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# ---- what brokers get ---------------------------------------------------------------------------------


def _add_log_context(broker: Broker) -> None:
    if messaging_system(broker) != "nats":  # a JetStreamBroker says by itself which message is worked on
        broker.middleware.insert(0, LogContext())


def _remove_log_context(broker: Broker) -> None:
    broker.middleware[:] = [m for m in broker.middleware if not isinstance(m, LogContext)]


class _StartAtBoot(Middleware):
    def after_process_boot(self, broker: Broker) -> None:
        start_telemetry()


def _add_start_at_boot(broker: Broker) -> None:
    broker.middleware.append(_StartAtBoot())


def _remove_start_at_boot(broker: Broker) -> None:
    broker.middleware[:] = [m for m in broker.middleware if not isinstance(m, _StartAtBoot)]
