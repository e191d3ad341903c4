"""Puts together what a broker has for the worker of its process, and connects it to Dramatiq's hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dramatiq.worker import Worker

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.dead_letters import DeadLetters
from dramatiq_jetstream.jetstream.declaring import Declarations
from dramatiq_jetstream.jetstream.keeping import Keeper
from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.limits import limit_of
from dramatiq_jetstream.wire.connection import Connection

from .activity import Activity
from .arguments import Describe
from .attachment import Attachment
from .consumers import Consumers
from .follow_ups import FollowUps
from .giving_back import GivingBack
from .hard_limits import KilledAttempts, check_hard_time_limit, warn_of_unkept_limits
from .in_flight import InFlight
from .limits import Limits
from .presence import Presence
from .recorder import Recorder
from .rerouting import Rerouter
from .sources import Sources
from .suspects import Suspects
from .vitals import Vitals

__all__ = ["Workplace"]

Reaction = Callable[..., object]


class Workplace:
    """The parts of a broker that serve its worker.

    Parameters:
      actor: The actor with that name.
      actor_options: The options of the actor with that name.
      emit: Calls a hook of this library's own (see `hooks`).
      limits: Returns the bucket in which the states of limits are kept.
      starts: Returns the bucket in which the starts of suspects are noted.
      describe: Makes the text of a message's arguments, for people.
      program_version: Returns what the program says of its version, for people.
    """

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        declarations: Declarations,
        dead_letters: DeadLetters,
        *,
        actor: Callable[[str], Any],
        actor_options: Callable[[str], Mapping[str, Any]],
        emit: Callable[..., None],
        limits: Callable[[], Bucket],
        starts: Callable[[], Bucket],
        workers: Callable[[], Bucket],
        describe: Describe,
        program_version: Callable[[], str],
    ) -> None:
        self.in_flight = InFlight(connection)
        self.keeper = Keeper(connection)
        self.sources = Sources(config, connection, declarations, self.in_flight.durables, self.keeper)
        self.follow_ups = FollowUps()
        self._suspects = Suspects(config, starts)
        self._recorder = Recorder(config, connection, declarations.ensure_history, describe, actor_options)
        rerouter = Rerouter(
            config,
            connection,
            self.in_flight,
            dead_letters,
            self._suspects,
            actor_options=actor_options,
            emit=emit,
            record=self._recorder.record_unstarted,
        )
        self.rerouter = rerouter
        self.attachment = Attachment(
            rerouter,
            self.follow_ups,
            self._suspects,
            self._recorder,
            lambda put_back: Limits(
                config, connection, rerouter, bucket=limits, actor=actor, put_back=put_back
            ),
            Vitals(connection, self.in_flight),
        )
        self.killed_attempts = KilledAttempts(connection, self.in_flight, self.attachment.replace_attempts)
        self._activity = Activity(config.names, connection, declarations.ensure_activity, self.attachment)
        self._presence = Presence(workers, self.attachment, self._activity, describe, program_version)
        self.consumers = Consumers(
            config, connection, self.in_flight, self.sources, self._suspects, rerouter, self.attachment
        )
        self._giving_back = GivingBack(
            connection, self.in_flight.durables, self.attachment, lambda: self.consumers.opened
        )
        connection.on_fork(self._reset)

    def first(self) -> dict[str, Reaction]:
        """What to do at a hook before any middleware."""
        begin = self.follow_ups.begin
        return {
            "before_declare_actor": _check_options,
            "before_worker_boot": self._boot,
            "after_worker_boot": self._presence.begin,
            "after_worker_thread_boot": self.attachment.replace_attempts,
            "after_consumer_thread_boot": self.attachment.pass_over_delayed,
            "after_process_message": begin,
            "after_skip_message": begin,
            "before_nack": begin,
        }

    def last(self) -> dict[str, Reaction]:
        """What to do at a hook when all middleware is done, or was interrupted."""
        end = self.follow_ups.end
        return {
            "before_worker_shutdown": self.attachment.stop_consuming,
            "after_worker_shutdown": self._shut_down,
            "after_process_message": end,
            "after_skip_message": end,
            "before_nack": end,
        }

    def _boot(self, worker: Worker) -> None:
        self.attachment.attach(worker)
        if self.in_flight.board is None:
            warn_of_unkept_limits(worker.broker.actors)
        self._recorder.begin(worker)

    def _shut_down(self, worker: Worker) -> None:
        self._recorder.end()
        self._presence.end(worker)

    def _reset(self) -> None:
        """In the child of a fork, where the parent's worker has no threads."""
        self.attachment.detach()
        self.consumers.reset()
        self._giving_back.reset()
        self._suspects.reset()
        self._presence.reset()
        self._activity.reset()
        self._recorder.reset()


def _check_options(actor: Any) -> None:
    check_hard_time_limit(actor)
    limit_of(actor)
