"""The parent of a fleet: starts worker processes, replaces them, hands on what a dead one held, and stops them.

One thread and one `select` over signals, and over the channel and the output of every worker. The parent imports
nothing of the program and has no connection to NATS: what is to be known, the workers say; what is to be done on the
server, a living worker does.

A worker that dies leaves its board (see `board`). What it held is named to a worker that lives, which returns it to
the server, and the server gives it to the next worker that asks. Without a living worker that waits for the
replacement. If the worker that was asked dies before it has done so, those messages wait for `ack_wait`. If the
parent dies, its workers see their channels closed and stop as at SIGTERM.

Signals of the parent, in the order of severity:

- SIGUSR2: log the state of each worker, and have each print the stacks of its threads.
- SIGHUP: reload. Each worker gets a successor; when that is ready, the old one finishes and ends.
- SIGUSR1: quiet. Workers finish what they have and take nothing more; the fleet stays.
- SIGTERM, SIGINT: stop. As quiet, and every process ends when its actors are done, or after `shutdown_timeout`.
- SIGTERM, SIGINT again: stop now. Workers return all that they hold, also what runs, and end; within two seconds they
  are killed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from .board import Counts, Held
from .child import EXIT_PROGRAM
from .options import WorkOptions
from .signals import Signals
from .slots import Series, Slot, WorkerProcess

__all__ = ["Supervisor"]

#: Processes that die before they are ready, in a row, after which the fleet gives up.
CRASH_LOOP = 5

#: Seconds between two checks of limits and pauses; everything else wakes the parent at once.
LOOK_INTERVAL_SECONDS = 0.25

#: Exit statuses, beside `EXIT_PROGRAM`.
EXIT_OK, EXIT_CRASH_LOOP = 0, 1

logger = logging.getLogger(__name__)


def _now_ms() -> int:
    return int(time.monotonic() * 1000)


def _add(counts: dict[Series, Counts], process: WorkerProcess) -> None:
    for series, counted in process.counts().items():
        if counted.attempts or counted.retried:
            counts.setdefault(series, Counts.none())
            counts[series] += counted


class Supervisor:
    """A fleet of worker processes.

    Parameters:
      output: Where the output of the workers goes.
      booted: Called once, with what the first worker said when it was ready.
    """

    def __init__(
        self, options: WorkOptions, *, output: IO[bytes], booted: Callable[[dict[str, Any]], None]
    ) -> None:
        self._options = options
        self._output = output
        self._booted = booted
        self._started_at = time.monotonic()
        self.slots = [Slot(number) for number in range(options.processes)]
        self._held: list[dict[str, Any]] = []
        self._forks: list[subprocess.Popen[bytes]] = []
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self.is_quiet = False
        self._seen_ready = False
        self._early_deaths = 0
        self._status = EXIT_OK
        self.recycled = 0
        self.killed = 0
        self._past: dict[Series, Counts] = {}
        self._counting = threading.Lock()  # a process must not be counted twice, or not at all

    @property
    def workers(self) -> list[WorkerProcess]:
        """All processes that run, retiring ones included."""
        return [process for slot in self.slots for process in slot.processes()]

    @property
    def restarts(self) -> int:
        """How many processes were replaced because they had died."""
        return sum(slot.restarts for slot in self.slots)

    def counts(self) -> dict[Series, Counts]:
        """The attempts that ended in all workers so far, by actor and queue."""
        with self._counting:
            found = copy.deepcopy(self._past)
            for process in self.workers:
                _add(found, process)
        return found

    def run(self) -> int:
        """Run the fleet until it is told to stop or gives up; returns the exit status."""
        signals = Signals(
            [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD]
        )
        self._selector.register(signals, selectors.EVENT_READ, signals)
        self.slots[0].current = self._start()  # alone, so that a program that does not import is one error
        while self.workers or not self._stopping:
            for key, _ in self._selector.select(LOOK_INTERVAL_SECONDS):
                if isinstance(key.data, WorkerProcess):
                    self._hear(key.data)
            for number in signals.read():
                self._signalled(number)
            self._reap()
            self._look()
        for fork in self._forks:
            fork.terminate()
        return self._status

    def _start(self) -> WorkerProcess:
        process = WorkerProcess(dataclasses.replace(self._options, quiet=self.is_quiet))
        self._selector.register(process.channel, selectors.EVENT_READ, process)
        self._selector.register(process.output, selectors.EVENT_READ, process)
        return process

    def _hear(self, process: WorkerProcess) -> None:
        self._print(process)
        self._read(process)
        if process.channel.closed:
            self._unregister(process.channel)

    def _read(self, process: WorkerProcess) -> None:
        for message in process.channel.read():
            if "failed" in message:
                process.failed = message["failed"]
            elif "connected" in message:
                process.use_connection(message["sockets"][0])
            elif "handed_on" in message:
                del process.asked[: message["handed_on"]]
            elif process.exit_status is None:
                process.ready, process.ready_at = message["ready"], time.monotonic()
                self._ready(process)

    def _print(self, process: WorkerProcess) -> None:
        text = process.read_output()
        if text:
            self._output.write(text)
            self._output.flush()

    def _ready(self, process: WorkerProcess) -> None:
        self._early_deaths = 0
        if not self._seen_ready:
            self._seen_ready = True
            self._booted(process.ready or {})
            self._run_forks(process.ready or {})
        for slot in self.slots:
            slot.promote()
        if self.is_quiet:
            process.signal(signal.SIGUSR1)  # it may have started before the fleet was quiet
        self._hand_on()

    def _run_forks(self, ready: dict[str, Any]) -> None:
        """Run the functions that middleware wants in processes of their own; they end with their standard input."""
        for name in [*self._options.forks, *ready.get("forks", ())]:
            command = [sys.executable, "-m", "dramatiq_jetstream.fleet.child", self._options.to_json(), name]
            self._forks.append(subprocess.Popen(command, stdin=subprocess.PIPE))

    # Signals

    def _signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGCHLD:
            return  # `_reap` looks at every process
        logger.info("Received %s.", number.name)
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stop()
        elif number == signal.SIGHUP:
            self._reload()
        elif number == signal.SIGUSR1:
            self.is_quiet = True
            self._signal_ready(signal.SIGUSR1)
        else:
            for line in self.state():
                logger.info("%s", line)
            self._signal_ready(signal.SIGUSR2)

    def _signal_ready(self, number: signal.Signals) -> None:
        """Send a signal to the workers that listen for it; it would end one that is starting."""
        for process in self.workers:
            if process.ready is not None:
                process.signal(number)

    def _stop(self) -> None:
        if self._stopping:
            logger.info("Stopping now: what runs is returned to the server and begins again elsewhere.")
        elif self._status == EXIT_OK:
            logger.info(
                "Stopping: running actors get up to %g s to finish. The same signal again stops at once.",
                self._options.shutdown_timeout / 1000,
            )
        for process in self.workers:
            if self._stopping:
                process.stop_now()
            else:
                process.stop()
        self._stopping = True

    def _reload(self) -> None:
        for slot in self.slots:
            if slot.successor is None and slot.current is not None and not self._stopping:
                slot.successor = self._start()

    def state(self) -> Iterator[str]:
        """One line for each worker."""
        for slot in self.slots:
            for process in slot.processes():
                serves = "quiet" if self.is_quiet else "serving"
                what = "stopping" if process.stopping else "starting" if process.ready is None else serves
                age = time.monotonic() - process.started
                yield (
                    f"worker {slot.number}: PID {process.pid}, {what}, {age:.0f} s old, "
                    f"{process.memory() / 1e6:.0f} MB, {process.attempts()} attempts, "
                    f"holds {process.board.in_flight()} messages"
                )

    # Processes that end

    def _reap(self) -> None:
        for slot in self.slots:
            for process in slot.processes():
                if process.exit_status is not None:
                    self._print(process)
                    self._read(process)
                    self._ended(slot, process)
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        """Take note of the end of processes that actors left behind; PID 1 of a container inherits them."""
        own = {process.pid for process in self.workers} | {fork.pid for fork in self._forks}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid in own:
                    return  # looked at with the next signal
                os.waitpid(ended.si_pid, 0)

    def _ended(self, slot: Slot, process: WorkerProcess) -> None:
        self._unregister(process.channel)
        self._unregister(process.output)
        status = process.exit_status or 0
        with self._counting:
            slot.lost(process)
            _add(self._past, process)
        held = [*map(Held, process.lost_deliveries()), *process.board.held()]
        self._held += [self._last_will(process, each) for each in held] + process.asked
        process.close()
        if process.failed is not None and not self._seen_ready:
            self._give_up(EXIT_PROGRAM, process.failed)
        elif not (process.stopping and (process.told_to_stop_now or status in (0, -signal.SIGTERM))):
            self._died(slot, process, status, sum(not each.answered for each in held))
        self._hand_on()

    def _last_will(self, process: WorkerProcess, held: Held) -> dict[str, Any]:
        """What a living worker must do for a delivery of a dead one."""
        if process.outlived is None or not held.is_overdue(_now_ms()):
            return {"ack_subject": held.ack_subject}
        seconds = (_now_ms() - held.begun_ms) / 1000
        stack = process.stack(held.thread)
        killed = {"seconds": seconds, "pid": process.pid, "stack": stack}
        return {"ack_subject": held.ack_subject, "killed": killed}

    def _died(self, slot: Slot, process: WorkerProcess, status: int, held: int) -> None:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        what = {0: "It held no message", 1: "The message that it held is handed on"}
        logger.error(
            "Worker %d (PID %d) died: %s. %s.",
            slot.number,
            process.pid,
            how,
            what.get(held, f"The {held} messages that it held are handed on"),
        )
        if process.ready is None and not self._stopping:
            self._early_deaths += 1
            if self._early_deaths >= CRASH_LOOP:
                last_words = process.failed or "\n".join(process.last_words)
                self._give_up(
                    EXIT_CRASH_LOOP,
                    f"{CRASH_LOOP} workers in a row died before they were ready; the last ({how}) said:\n{last_words}",
                )

    def _give_up(self, status: int, why: str) -> None:
        if self._status == EXIT_OK:
            logger.critical("%s", why)
            self._status = status
        if not self._stopping:
            self._stop()

    def _unregister(self, what: Any) -> None:
        try:
            self._selector.unregister(what)
        except KeyError:
            return

    def _hand_on(self) -> None:
        """Have a worker that lives return to the server what dead ones held: the one that moved last."""
        able = [
            process
            for process in self.workers
            if process.ready is not None and process.exit_status is None and not process.channel.closed
        ]
        if self._held and able:
            process = max(able, key=lambda each: (not each.stopping, each.board.last_beat))
            process.asked += self._held
            process.channel.say(hand_on=self._held)
            self._held = []

    # Limits and pauses

    def _look(self) -> None:
        now = time.monotonic()
        for process in self.workers:
            if process.channel.has_waiting:
                process.channel.flush()
            if process.stopping and now > process.stop_by:
                logger.error("Worker PID %d did not stop in time; ending it.", process.pid)
                process.stop_now()
            if process.kill_at is not None and now > process.kill_at:
                process.kill()
            self._look_for_overdue(process)
            hard = self._options.max_memory_hard
            if hard is not None and not process.killed and (memory := process.memory()) > hard:
                logger.error(
                    "Worker PID %d has %.0f MB, more than max-memory-hard; killing it.",
                    process.pid,
                    memory / 1e6,
                )
                process.kill()
        if self._stopping:
            return
        for slot in self.slots:
            if slot.current is None and now >= slot.not_before and (self._seen_ready or slot.number == 0):
                slot.current = self._start()
        self._recycle()

    def _look_for_overdue(self, process: WorkerProcess) -> None:
        """Kill a process in which an attempt has outlived its hard time limit."""
        if process.outlived is None and (overdue := process.board.overdue(_now_ms())) is not None:
            logger.error(
                "Worker PID %d runs an attempt that has outlived its hard time limit; killing it.",
                process.pid,
            )
            self.killed += 1
            process.outlive(overdue)

    def _recycle(self) -> None:
        """Replace one process that has reached a limit, unless another is being replaced already."""
        if any(slot.successor is not None for slot in self.slots):
            return
        for slot in self.slots:
            why = slot.current.worn() if slot.current is not None else None
            if why is not None and slot.current is not None:
                logger.info("Worker %d (PID %d) is replaced: %s.", slot.number, slot.current.pid, why)
                self.recycled += 1
                slot.successor = self._start()
                return
