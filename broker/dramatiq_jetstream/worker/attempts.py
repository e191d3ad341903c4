"""Runs a message on a worker thread: its actor, what follows, and the ack.

This takes the place of `process_message` of Dramatiq's `WorkerThread`, and does the same in the same order. Two things
differ. Interrupts strike in the actor only (see `interrupts`), not while its retry, callback or result is stored. And
anything raised after the actor, even `SystemExit` by a middleware, is an error like any other: the message is marked,
stays on its queue and runs again, and the thread goes on. A worker's messages all come from this library's consumers.

If the process dies between the actor's end and the ack, the message runs again elsewhere.
"""

from __future__ import annotations

import time

from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import SkipMessage
from dramatiq.worker import WorkerThread, has_results_middleware

from dramatiq_jetstream.limits import Snooze
from dramatiq_jetstream.sending.envelope import HISTORY_OPTION

from .current import current_message
from .follow_ups import FollowUps
from .interrupts import Gate
from .limits import Limits, MissedStart
from .message import Ended, JetStreamMessage
from .recorder import Recorder
from .rerouting import Rerouter
from .suspects import Suspects
from .tally import Tally

__all__ = ["Attempts"]

# In Dramatiq's own words, as all that it would log itself.
_DISCARDED = (
    "Actor '%s' returned a value that is not None, and you haven't added the "
    "Results middleware to the broker, so the value has been discarded. "
    "Consider adding the Results middleware to your broker or piping the "
    "result into another actor."
)


class Attempts:
    """The attempts of the calling worker thread, one after the other.

    Attributes:
      running: The message that it runs, and the time since; None between two messages. Any thread may look.
    """

    def __init__(
        self,
        thread: WorkerThread,
        follow_ups: FollowUps,
        rerouter: Rerouter,
        suspects: Suspects,
        recorder: Recorder,
        limits: Limits,
        tally: Tally,
    ) -> None:
        self._thread = thread
        self._broker = thread.broker
        self._logger = thread.logger
        self._follow_ups = follow_ups
        self._rerouter = rerouter
        self._suspects = suspects
        self._recorder = recorder
        self._limits = limits
        self._gate = Gate()
        self.running: tuple[JetStreamMessage, float] | None = None
        self._tally = tally
        self._skipped = False

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def process_message(self, message: JetStreamMessage) -> None:
        """Run a message and settle it, or have it wait; nothing is raised: the thread must live for the next one."""
        is_limited = self._limits.of(message) is not None
        if is_limited and message.killed is None and not self._enters(message):
            self._thread.work_queue.task_done()
            return
        began = time.time()
        try:
            self.running = message, began
            current_message.set(message)
            self._run_and_settle(message, is_limited)
        except BaseException:
            self._logger.critical("Message %s was not settled as it should be.", message, exc_info=True)
        finally:
            current_message.set(None)
            self.running = None
            failed = message._exception is not None and not message.is_unwanted
            self._tally.note(message.queue_name, began, message._delivery.timestamp, failed)
            self._thread.work_queue.task_done()
            if message.to_record is not None:
                self._recorder.record(message, message.to_record)
            # The exception's frames would stay in memory for as long as it is referred to.
            message.clear_exception()

    def _enters(self, message: JetStreamMessage) -> bool:
        """Whether the limits of its actor let a message run now; if not, it waits elsewhere."""
        try:
            return self._limits.enter(message)
        except BaseException as error:
            self._logger.critical("The limits of message %s failed.", message, exc_info=True)
            self._rerouter.requeue_later(message._delivery, error)
            return False

    def _run_and_settle(self, message: JetStreamMessage, is_limited: bool) -> None:
        delivery = message._delivery
        if delivery.is_suspect:
            self._suspects.note_start(delivery)
        try:
            try:
                self._run(message)
            except BaseException as error:
                self._follow_ups.cut_off(message, error)
                self._logger.critical("What follows message %s was cut off.", message, exc_info=True)
            if is_limited:
                self._limits.leave(message)
            if message.put_off is None and (
                self._recorder.keeps_successes
                or self._skipped
                or message.failed
                or message._exception is not None
                or "retries" in message.options
                or HISTORY_OPTION in message.options  # it was replayed
            ):
                self._note_end(message)
            self._thread.consumers[message.queue_name].post_process_message(message)
        finally:
            if not delivery.settled:
                self._rerouter.requeue_later(delivery)

    def _note_end(self, message: JetStreamMessage) -> None:
        """Have an attempt recorded when its message is settled."""
        if self._recorder.is_on and self.running is not None:
            retried = self._follow_ups.has_retried(message)
            message.to_record = Ended(self.running[1], time.time(), self._skipped, retried)

    def _run(self, message: JetStreamMessage) -> None:
        """The actor, and everything that follows it but the ack."""
        actor = None
        self._skipped = False
        self._gate.expect()
        try:
            self._logger.debug("Received message %s with id %r.", message, message.message_id)
            self._broker.emit_before("process_message", message)
            result = None
            if not message.failed:
                actor = self._broker.get_actor(message.actor_name)
                if message.start is not None:
                    self._limits.begin(message)
                result = self._gate.call(actor, message.args, message.kwargs)
                if (
                    result is not None
                    and message.options.get("pipe_target") is None
                    and not has_results_middleware(self._broker)
                ):
                    self._logger.warning(_DISCARDED, actor.actor_name)
        except SkipMessage as error:
            self._skipped = True
            if message.failed:
                message.stuff_exception(error)
            self._logger.warning("Message %s was skipped.", message)
            self._broker.emit_after("skip_message", message)
        except Snooze as error:
            message.put_off = error.delay
            if not isinstance(error, MissedStart):
                message.moment = None
            self._logger.info("Message %s is %s.", message, error)
            self._broker.emit_after("skip_message", message)
        except BaseException as error:
            message.stuff_exception(error)
            throws = message.options.get("throws") or (actor and actor.options.get("throws"))
            if isinstance(error, RateLimitExceeded):
                self._logger.debug("Rate limit exceeded in message %s: %s.", message, error)
            elif throws and isinstance(error, throws):
                self._logger.info(
                    "Failed to process message %s with expected exception %s.", message, type(error).__name__
                )
            elif not isinstance(error, Retry):
                self._logger.exception("Failed to process message %s with unhandled exception.", message)
            self._broker.emit_after("process_message", message, exception=error)
        else:
            self._broker.emit_after("process_message", message, result=result)
