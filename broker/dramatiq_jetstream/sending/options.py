"""Options of a message that mean something elsewhere and nothing here: an error says what to give instead.

Dramatiq keeps any option of a message, for middleware that may know it. An option that a middleware declares is its own
and is left alone, and so is a message that is only retried: another program may have sent it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from dramatiq_jetstream.errors import InvalidOption

__all__ = ["check_options"]

#: Times before this, in the year 1973, are a mistake in units: a number of seconds, or a delay.
_EARLIEST_MS = 100_000_000_000

_QUEUE = "give the actor its queue (queue_name=...), or send a copy: message.copy(queue_name=...)"
_INSTEAD: Mapping[str, str] = {
    "countdown": "give delay=..., in milliseconds",
    "queue": _QUEUE,
    "routing_key": _QUEUE,
    "exchange": _QUEUE,
    "priority": "give broker_priority=..., with a broker that has a max_priority",
    "expires": "give max_age=..., in milliseconds, with Dramatiq's AgeLimit",
    "soft_time_limit": "give time_limit=..., in milliseconds",
    "link": "give on_success=..., or build a pipeline with |",
    "link_error": "give on_failure=..., the name of an actor",
    "ignore_result": "results are stored of actors with store_results=True",
    "serializer": "give all programs the same encoder: dramatiq.set_encoder(...)",
    "task_id": "a message has its id already, in message_id",
    "retry_policy": "give max_retries=..., min_backoff=... and max_backoff=...",
}


def check_options(
    options: Mapping[str, Any], known: Collection[str], *, delayed: bool, highest: int | None
) -> None:
    """Check the options of a message that is sent.

    Parameters:
      known: The options that middleware and the broker declare.
      delayed: Whether the message has a delay, so that its `eta` says when that is over.
      highest: The highest priority of the broker, if it has any.

    Raises:
      InvalidOption: For an option that means nothing here; it says what does.
    """
    for name in _INSTEAD.keys() & options.keys():
        if name not in known:
            raise InvalidOption(f"the option {name}={options[name]!r} means nothing here: {_INSTEAD[name]}.")
    eta = options.get("eta")
    if eta is not None and not delayed:
        is_time = isinstance(eta, (int, float)) and not isinstance(eta, bool)
        if not is_time or eta > time.time() * 1000 or 0 < eta < _EARLIEST_MS:
            raise InvalidOption(
                f"the option eta={eta!r} means nothing here: give delay=..., in milliseconds from now."
            )
    if options.get("broker_priority") and not highest:
        raise InvalidOption(
            f"broker_priority={options['broker_priority']!r} means nothing here: this broker has no priorities; give "
            "all programs of the namespace the same JetStreamBroker(max_priority=...)."
        )
