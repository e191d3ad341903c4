"""Runs a message on a worker thread: its actor, what follows, and the ack.

This takes the place of `process_message` of Dramatiq's `WorkerThread`, and does the same in the same order. Two things
differ. Interrupts strike in the actor only (see `interrupts`), not while its retry, callback or result is stored. And
whatever else is raised after the actor, `SystemExit` by a middleware included, is an error like any other: the message
is marked, stays on its queue and runs again, and the thread goes on.

If the process dies between the actor's end and the ack, the message runs again elsewhere.
"""

from __future__ import annotations

from dramatiq.broker import MessageProxy
from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import SkipMessage
from dramatiq.worker import WorkerThread, has_results_middleware

from .follow_ups import FollowUps
from .interrupts import Gate
from .message import JetStreamMessage
from .recorder import Recorder
from .rerouting import Rerouter
from .suspects import Suspects

__all__ = ["Attempts"]

# In the words of Dramatiq, as all that it would log itself.
_DISCARDED = (
    "Actor '%s' returned a value that is not None, and you haven't added the "
    "Results middleware to the broker, so the value has been discarded. "
    "Consider adding the Results middleware to your broker or piping the "
    "result into another actor."
)


class Attempts:
    """The attempts of the calling worker thread, one after the other."""

    def __init__(
        self,
        thread: WorkerThread,
        follow_ups: FollowUps,
        rerouter: Rerouter,
        suspects: Suspects,
        recorder: Recorder,
    ) -> None:
        self._thread = thread
        self._broker = thread.broker
        self._logger = thread.logger
        self._follow_ups = follow_ups
        self._rerouter = rerouter
        self._suspects = suspects
        self._recorder = recorder
        self._gate = Gate()

    def process_message(self, message: MessageProxy) -> None:
        """Run a message and settle it. Nothing is raised: the thread must live for the next one."""
        try:
            if isinstance(message, JetStreamMessage):
                self._suspects.note_start(message._delivery)
            self._run_and_settle(message)
        except BaseException:
            self._logger.critical("Message %s was not settled as it should be.", message, exc_info=True)
        finally:
            self._thread.work_queue.task_done()
            if isinstance(message, JetStreamMessage) and message.to_record is not None:
                self._recorder.record(message, message.to_record)
            # The exception's frames would stay in memory for as long as it is referred to.
            message.clear_exception()

    def _run_and_settle(self, message: MessageProxy) -> None:
        try:
            try:
                self._run(message)
            except BaseException as error:
                self._follow_ups.cut_off(message, error)
                self._logger.critical("What follows message %s was cut off.", message, exc_info=True)
            self._thread.consumers[message.queue_name].post_process_message(message)
        finally:
            if isinstance(message, JetStreamMessage) and not message._delivery.settled:
                self._rerouter.requeue_later(message._delivery)

    def _run(self, message: MessageProxy) -> None:
        """The actor, and everything that follows it but the ack."""
        actor = None
        self._gate.expect()
        try:
            self._logger.debug("Received message %s with id %r.", message, message.message_id)
            self._broker.emit_before("process_message", message)
            result = None
            if not message.failed:
                actor = self._broker.get_actor(message.actor_name)
                result = self._gate.call(actor, message.args, message.kwargs)
                if (
                    result is not None
                    and message.options.get("pipe_target") is None
                    and not has_results_middleware(self._broker)
                ):
                    self._logger.warning(_DISCARDED, actor.actor_name)
        except SkipMessage as error:
            if message.failed:
                message.stuff_exception(error)
            self._logger.warning("Message %s was skipped.", message)
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
