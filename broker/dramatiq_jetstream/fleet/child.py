"""A worker process of `fleet work`: imports the program, runs Dramatiq's worker, tells the supervisor about it.

In order: the program is imported; a program that cannot be used is one message to the supervisor and exit status 2.
The worker starts; when it takes messages, or cannot for five seconds, the supervisor hears what the banner shows, and
has the worker that it succeeds stop. Then this process waits for signals and messages:

- SIGTERM: take nothing more, return what was not begun, let running actors finish, exit 0.
- SIGUSR1: take nothing more, and stay.
- SIGUSR2: print the stack of every thread (also of one that is stuck in C code).
- the supervisor is gone (its end of the channel is closed): as SIGTERM.

If the process dies, its board (see `board`) tells the supervisor what it held.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.message import Message
from dramatiq.middleware import Middleware

from dramatiq_jetstream.broker import JetStreamBroker
from dramatiq_jetstream.errors import HardTimeLimitExceeded
from dramatiq_jetstream.wire.intake import Intake
from dramatiq_jetstream.worker.consumer import JetStreamConsumer
from dramatiq_jetstream.worker.current import current_message
from dramatiq_jetstream.worker.hard_limits import hard_time_limits, limit_of
from dramatiq_jetstream.worker.message import JetStreamMessage

from .board import SERIES, Board
from .channel import Channel
from .options import WorkOptions
from .program import ProgramError, load_broker, load_function, put_on_path
from .signals import Signals

__all__ = ["EXIT_PROGRAM", "STACKS_SIGNAL", "main"]

#: The exit status of a process whose program cannot be used, as that of the `dramatiq` command.
EXIT_PROGRAM = 2

#: On this signal a worker writes the stacks of its threads for the supervisor, whatever they are stuck in.
STACKS_SIGNAL = signal.SIGRTMIN

#: Seconds between two checks of the threads.
LOOK_INTERVAL_SECONDS = 0.5

#: Seconds between two checks whether the consumers are open, and how long to wait for them.
STARTING_INTERVAL_SECONDS = 0.02
CONSUMING_SECONDS = 5.0

#: Seconds without a turn of the connection's loop after which this process no longer says that it lives.
LOOP_STUCK_SECONDS = 10.0

_LOG_FORMAT = "[%(asctime)s] [PID %(process)d] [%(threadName)s] [%(name)s] [%(levelname)s] %(message)s"

logger = logging.getLogger(__name__)


class _Noting(Middleware):
    """Notes on the board what this process begins and finishes.

    It is the last middleware, so what it measures is the actor alone.
    """

    def __init__(self, broker: JetStreamBroker, board: Board) -> None:
        self._board = board
        self._series = _series(broker)
        self._limits = hard_time_limits(broker.actors)
        self._began: dict[int, float] = {}
        self._lock = threading.Lock()

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        if not isinstance(message, JetStreamMessage):
            return
        if message.killed is not None:
            raise message.killed
        thread, now = threading.get_ident(), time.monotonic()
        slot = message._delivery.slot
        if slot is not None:
            limit = limit_of(message.options, self._limits.get(message.actor_name))
            now_ms = int(now * 1000)
            if limit:
                self._board.begin(slot, now_ms, now_ms + limit, thread)
            else:
                self._board.begin(slot, now_ms)
        self._began[thread] = now

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        if not isinstance(message, JetStreamMessage):
            return
        began = self._began.pop(threading.get_ident(), None)
        if message._delivery.slot is not None:
            self._board.end(message._delivery.slot)
        if message.killed is not None:
            seconds = message.killed.seconds
        elif began is not None:
            seconds = time.monotonic() - began
        else:
            return  # it failed before its actor was called
        series = self._series.get(message.actor_name, SERIES - 1)
        with self._lock:
            self._board.count(series, seconds, failed=exception is not None)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        self._began.pop(threading.get_ident(), None)

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        running = current_message.get()
        if running is not None and running.message_id == message.message_id:
            with self._lock:
                self._board.count_retry(self._series.get(message.actor_name, SERIES - 1))


def _series(broker: JetStreamBroker) -> dict[str, int]:
    """Where on the board the attempts of each actor are counted."""
    return {name: number for number, name in enumerate(sorted(broker.actors)[: SERIES - 1])}


class Child:
    """A worker process."""

    def __init__(self, options: WorkOptions, channel: Channel, board: Board) -> None:
        self._options = options
        self._channel = channel
        self._board = board
        self._signals = Signals([signal.SIGTERM, signal.SIGUSR1])
        self._turned = time.monotonic()
        self._told_to_stop = False

    def run(self) -> int:
        """Work until told to stop; returns the exit status."""
        options = self._options
        try:
            broker = load_broker(options.broker, options.modules)
        except ProgramError as error:
            self._channel.say(failed=str(error))
            return EXIT_PROGRAM
        except BaseException:  # noqa: BLE001 - what a program raises while it is imported, SystemExit included
            self._channel.say(failed=f"{options.broker!r} cannot be imported:\n{traceback.format_exc()}")
            return EXIT_PROGRAM
        broker.emit_after("process_boot")
        broker.add_middleware(_Noting(broker, self._board))
        broker.in_flight.board = self._board
        broker.connection.on_tick(self._loop_turned)
        intake = Intake(self._board.intake)
        broker.connection.on_opened(lambda client: self._share(intake.read_for(client)))
        worker = dramatiq.Worker(broker, queues=set(options.queues) or None, worker_threads=options.threads)
        if options.quiet:
            broker.attachment.be_quiet()
        worker.start()
        ready_by = time.monotonic() + CONSUMING_SECONDS
        self._serve(
            broker,
            worker,
            lambda: self._told_to_stop or options.quiet or _consumes(worker) or time.monotonic() > ready_by,
            STARTING_INTERVAL_SECONDS,
        )
        self._look(broker, worker)
        self._channel.say(ready=_describe(broker, worker))
        logger.info("Worker process is ready for action.")
        self._serve(broker, worker, lambda: self._told_to_stop)
        stopping = threading.Thread(target=self._stop, args=(broker, worker), name="stop")
        stopping.start()
        self._serve(broker, worker, lambda: not stopping.is_alive())
        return 0

    def _stop(self, broker: JetStreamBroker, worker: dramatiq.Worker) -> None:
        worker.stop(timeout=self._options.shutdown_timeout)
        broker.close()

    def _share(self, connection: socket.socket | None) -> None:
        """Give the supervisor a copy of the connection, to read what is on its way to us when we are dead."""
        if connection is not None:
            self._channel.say(connection, connected=True)

    def _loop_turned(self) -> None:
        self._turned = time.monotonic()

    def _serve(
        self,
        broker: JetStreamBroker,
        worker: dramatiq.Worker,
        done: Callable[[], bool],
        interval: float = LOOK_INTERVAL_SECONDS,
    ) -> None:
        """Do what signals and the supervisor say, until `done`, which is asked every `interval` seconds."""
        while not done():
            self._look(broker, worker)
            heard = [self._signals.fileno()]
            if not self._channel.closed:
                heard.append(self._channel.fileno())
            select.select(heard, [], [], interval)
            for number in self._signals.read():
                if number == signal.SIGTERM:
                    logger.info("Stopping worker process...")
                    self._told_to_stop = True
                else:
                    logger.info("Taking nothing more; running actors go on.")
                    broker.attachment.be_quiet(worker)
            for message in self._channel.read():
                self._hand_on(broker, worker, message.get("hand_on", ()))
                if message.get("stop_now"):
                    logger.warning("Stopping now; what runs here is returned and begins elsewhere.")
                    self._return(broker, [held.ack_subject for held in self._board.held()])
                    os._exit(1)
            if self._channel.closed and not self._told_to_stop:
                logger.warning("The supervisor is gone; stopping.")
                self._told_to_stop = True

    def _hand_on(
        self, broker: JetStreamBroker, worker: dramatiq.Worker, dead: Iterable[dict[str, Any]]
    ) -> None:
        """Do what a dead worker cannot do any more for what it held, and tell the supervisor when it is done."""
        dead = list(dead)
        if not dead:
            return
        self._return(broker, [each["ack_subject"] for each in dead if "killed" not in each])
        killed = [each for each in dead if "killed" in each]
        if killed:
            threading.Thread(
                target=self._settle_killed,
                args=(broker, worker, killed, len(dead)),
                name="killed",
                daemon=True,
            ).start()
        else:
            self._channel.say(handed_on=len(dead))

    def _settle_killed(
        self, broker: JetStreamBroker, worker: dramatiq.Worker, killed: list[dict[str, Any]], count: int
    ) -> None:
        for each in killed:
            error = HardTimeLimitExceeded(**each["killed"])
            if not broker.killed_attempts.settle(worker, each["ack_subject"], error):
                self._return(broker, [each["ack_subject"]])
        self._channel.say(handed_on=count)

    def _return(self, broker: JetStreamBroker, ack_subjects: Iterable[str]) -> None:
        """Return messages to the server, which gives them to the next workers that ask."""
        for ack_subject in ack_subjects:
            broker.connection.send(ack_subject, b"-NAK")
        broker.in_flight.flush(1.0)

    def _look(self, broker: JetStreamBroker, worker: dramatiq.Worker) -> None:
        """Say that this process lives, unless its loop is stuck; count its dead threads."""
        threads = [*worker.workers, *worker.consumers.values()]
        self._board.note_threads_lost(sum(not thread.is_alive() for thread in threads))
        self._board.note_connected(broker.connection.is_connected)
        now = time.monotonic()
        if not broker.connection.is_open or now - self._turned < LOOP_STUCK_SECONDS:
            self._board.beat(int(now * 1000))


def _consumes(worker: dramatiq.Worker) -> bool:
    """Whether messages are taken from every source of every queue."""
    threads = list(worker.consumers.values())
    return all(
        isinstance(thread.consumer, JetStreamConsumer)
        and all(source.durable.certain for source in thread.consumer.sources)
        for thread in threads
    )


def _describe(broker: JetStreamBroker, worker: dramatiq.Worker) -> dict[str, Any]:
    """What the banner shows, and which further processes the middleware asks for."""
    queues: dict[str, list[str]] = {}
    for actor in broker.actors.values():
        if worker.consumer_whitelist is None or actor.queue_name in worker.consumer_whitelist:
            queues.setdefault(actor.queue_name, []).append(actor.actor_name)
    return {
        "versions": {
            "python": sys.version.split()[0],
            "dramatiq": version("dramatiq"),
            "dramatiq-jetstream": version("dramatiq-jetstream"),
        },
        "server": broker.config.connect.display,
        "namespace": broker.config.namespace,
        "queues": {queue: sorted(actors) for queue, actors in sorted(queues.items())},
        "periodic": sorted(
            actor.actor_name for actor in broker.actors.values() if {"cron", "every"} & actor.options.keys()
        ),
        "series": [[name, broker.actors[name].queue_name] for name in _series(broker)],
        "forks": [f"{fork.__module__}:{fork.__name__}" for each in broker.middleware for fork in each.forks],
    }


def _set_up(options: WorkOptions) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    # The terminal sends this to every process of the fleet; the supervisor decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    random.seed()
    put_on_path(options.path)
    if not options.skip_logging:
        logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, format=_LOG_FORMAT)


def main(arguments: list[str]) -> int:
    """Run a worker, or a function that a middleware wants in a process of its own; the supervisor starts this."""
    options = WorkOptions.from_json(arguments[0])
    _set_up(options)
    if len(arguments) == 2:
        return _run_function(arguments[1])
    faulthandler.register(STACKS_SIGNAL, file=int(arguments[3]), all_threads=True)
    channel = Channel(socket.socket(fileno=int(arguments[1])))
    return Child(options, channel, Board(int(arguments[2]))).run()


def _run_function(name: str) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    try:
        status = load_function(name)()
    except ProgramError as error:
        logger.error("The function %s cannot be run: %s", name, error)
        return EXIT_PROGRAM
    return int(status or 0)


def _end_with_supervisor() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
