"""A producer: calls the library in every way until it is told to end, and writes down what each call was told.

Before a call a line says what is asked, after it another what was told: for each label *stored*, *not stored* or
*unknown*. A producer that dies in a call leaves the first line alone, and what it asked for is unknown.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import dramatiq
import dramatiq_abort
from dramatiq import Message, pipeline
from dramatiq.errors import BrokerError

from dramatiq_jetstream import group
from dramatiq_jetstream.errors import (
    MessageNotUnique,
    MessageTooLarge,
    NotAllStored,
    NotSent,
    StoreFull,
    TopologyMissing,
)
from tests.chaos.library import program
from tests.chaos.library.clock import true_time
from tests.chaos.library.settings import HOUR, MADE

#: What these say is not stored is not (docs/guarantees.md).
NOT_STORED = (NotSent, StoreFull, MessageTooLarge, TopologyMissing, MessageNotUnique)

Call = Callable[[], object]


class Producer:
    """One thread's calls."""

    def __init__(self, log: int, prefix: str, choice: random.Random) -> None:
        self._log = log
        self._prefix = prefix
        self._choice = choice
        self._count = self._calls = 0
        self._kinds: list[Callable[[], None]] = [
            *[self._send] * 10,
            *[self._delay] * 3,
            *[self._batch] * 2,
            *[self._atomic] * 2,
            *[self._group] * 3,
            *[self._pipeline] * 2,
            *[self._unique] * 3,
            *[self._event] * 4,
            self._abort,
        ]

    def call(self) -> None:
        """Make one call."""
        self._choice.choice(self._kinds)()

    def _label(self) -> str:
        self._count += 1
        return f"{self._prefix}.{self._count}"

    def _message(self, actor: dramatiq.Actor[Any, Any], **options: Any) -> Message[Any]:
        return actor.message_with_options(args=(self._label(),), **options)

    def _some(self, actor: dramatiq.Actor[Any, Any]) -> list[Message[Any]]:
        return [self._message(actor) for _ in range(self._choice.randint(2, 8))]

    def _send(self) -> None:
        among = (
            program.work,
            program.work,
            program.flaky,
            program.doomed,
            program.late,
            program.narrow,
            program.limited,
            program.answer,
            program.answer,
            program.novel,
        )
        message = self._message(self._choice.choice(among))
        self._tell("send", [message], lambda: program.broker.enqueue(message))

    def _delay(self) -> None:
        message = self._message(program.work)
        delay = self._choice.randint(1, 4_000)
        self._tell("delay", [message], lambda: program.broker.enqueue(message, delay=delay))

    def _batch(self) -> None:
        messages = self._some(self._choice.choice((program.work, program.flaky, program.answer)))
        self._tell("batch", messages, lambda: program.broker.enqueue_many(messages))

    def _atomic(self) -> None:
        messages = self._some(program.work)
        self._tell("atomic", messages, lambda: program.broker.enqueue_many(messages, atomic=True))

    def _group(self) -> None:
        messages = self._some(program.member)
        callback = self._message(program.complete)
        asked = group(messages, broker=program.broker)
        asked.add_completion_callback(callback)
        self._tell("group", messages, asked.run, callback=str(callback.args[0]))

    def _pipeline(self) -> None:
        messages = [self._message(program.step) for _ in range(3)]
        self._tell("pipeline", messages, pipeline(messages, broker=program.broker).run)

    def _unique(self) -> None:
        """Ask for a message and repeat the call, as the guarantees recommend, when its outcome is not known."""
        key = self._label()
        for _ in range(3):
            message = self._message(program.work, unique_key=key, unique_window=HOUR)
            self._tell("unique", [message], lambda m=message: program.broker.enqueue(m), key=key)  # type: ignore[misc]

    def _event(self) -> None:
        label = self._label()
        self._tell(
            "event",
            [],
            lambda: program.broker.publish(MADE, label.encode(), event_id=label),
            labels=[label],
        )

    def _abort(self) -> None:
        message = self._message(program.long)
        if not self._tell("aborted", [message], lambda: program.broker.enqueue(message)):
            return
        time.sleep(self._choice.uniform(0, 2))
        self._tell("abort", [], lambda: dramatiq_abort.abort(message.message_id))

    def _tell(
        self,
        kind: str,
        messages: list[Message[Any]],
        call: Call,
        *,
        labels: Iterable[str] | None = None,
        **more: Any,
    ) -> bool:
        """Make a call and write down what it was told; returns whether all is stored."""
        named = labels if labels is not None else [str(message.args[0]) for message in messages]
        self._calls += 1
        name = f"{self._prefix}-{self._calls}"
        self._write(
            call=name,
            kind=kind,
            labels=list(named),
            actors=[message.actor_name for message in messages],
            ids=[message.message_id for message in messages],
            **more,
        )
        told: dict[str, str] = {}
        failure = ""
        began = time.monotonic()
        surprise = False
        try:
            call()
            told = dict.fromkeys(named, "stored")
        except BrokerError as error:
            told = dict.fromkeys(named, "not stored" if isinstance(error, NOT_STORED) else "unknown")
            told |= _of_each(error)
            failure = repr(error)[:300]
        except Exception as error:  # noqa: BLE001 - the checker says that it is not one that was promised
            told = dict.fromkeys(named, "unknown")
            failure, surprise = repr(error)[:300], True
        seconds = time.monotonic() - began
        self._write(call=name, kind=kind, told=told, error=failure, seconds=seconds, surprise=surprise)
        return not failure

    def _write(self, **line: Any) -> None:
        os.write(self._log, json.dumps({"at": true_time(), **line}).encode() + b"\n")


def _of_each(error: BrokerError) -> dict[str, str]:
    cause = error.__cause__
    if not isinstance(cause, NotAllStored):
        return {}
    return {
        **{str(message.args[0]): "stored" for message in cause.stored},
        **{str(message.args[0]): "not stored" for message, _ in cause.not_stored},
        **{str(message.args[0]): "unknown" for message, _ in cause.unknown},
    }


def main() -> None:
    """Run until SIGTERM; calls under way are finished."""
    settings = json.loads(os.environ["CHAOS_PRODUCER"])
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    born = f"{settings['name']}-{int(true_time() * 1000) % 10**9}"

    def run(number: int) -> None:
        choice = random.Random(f"{settings['seed']}.{born}.{number}")
        producer = Producer(log, f"{born}.{number}", choice)
        while not stop.wait(choice.uniform(0.5, 1.5) * settings["threads"] / settings["rate"]):
            producer.call()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(settings["threads"])]
    for thread in threads:
        thread.start()
    print("producing", flush=True)
    while not stop.is_set():
        stop.wait(0.2)
    for thread in threads:
        thread.join()
    program.broker.close()


if __name__ == "__main__":
    main()
