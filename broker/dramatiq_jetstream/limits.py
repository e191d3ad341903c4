"""What an actor that cannot work now may raise: `Snooze`.

Snoozed messages wait on the server as a delayed message does; no worker holds them. The message is stored with its
delay first and acked afterwards. If the process dies between the two, it runs again at once and snoozes again.
"""

from __future__ import annotations

from dramatiq.errors import DramatiqError

from .sending.delays import check_delay

__all__ = ["Snooze"]


class Snooze(DramatiqError):
    """Raised in an actor, runs its message again later. It counts as no attempt and uses no retry.

    Nothing follows such a run: no result, no callback, no next step, no record in the history. Middleware is told as of
    a message that was skipped. A message may be snoozed any number of times::

        @dramatiq.actor
        def charge(order_id):
            if bank_is_closed():
                raise Snooze(delay=60_000)

    Parameters:
      delay: Milliseconds until it runs again, up to ten years.

    Raises:
      InvalidOption: For a delay that cannot be used; in an actor that is a failure like any other.
    """

    def __init__(self, delay: int) -> None:
        self.delay = check_delay(delay)
        super().__init__(f"snoozed for {self.delay} ms")  # type: ignore[no-untyped-call]
