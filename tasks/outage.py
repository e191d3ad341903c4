"""The payment gateway behind a circuit breaker, and the note that it is away.

After `FAILURES` charges in a row without an answer this process leaves the gateway alone for `REST_SECONDS`: charges
fail at once, and hold no threads. Then one charge tries; the others follow when it was answered. Orders wait meanwhile,
up to PAYMENT_PATIENCE, as delayed messages on the server (`tasks.actors`).

That the gateway is away is noted under one key for all, so that pages can say what an order waits for. Any process
notes it, and whichever gets an answer first removes it. A process that dies in between leaves the note until its time
to live is over, which is longer than the longest pause before a charge is tried again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from circuitbreaker import CircuitBreaker
from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import RevisionConflict

from . import metrics
from .gateway import GatewayUnavailable, UnusableAnswer
from .ledger import Chargeback
from .ports import Bucket, Charge, Decline, Gateway

BUCKET: Final = "gateway"

T = TypeVar("T")

FAILURES: Final = 5
REST_SECONDS: Final = 5

_KEY = "outage"
#: How often a process notes the outage, and looks whether there is one, in seconds.
_NOTED_EVERY_SECONDS = 5.0
_LOOKED_EVERY_SECONDS = 1.0
_MAX_TEXT = 200


class Outage:
    """The note that the gateway is away. Any thread may use it.

    Parameters:
      bucket: Where the note is kept.
      ttl: Milliseconds after which it is gone unless it is renewed.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, *, ttl: int, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._ttl = ttl
        self._now = now
        self._noted = self._looked = self._removed = float("-inf")
        self._answered = 0
        self._removing = False
        self._since: int | None = None
        self._lock = threading.Lock()

    def since(self) -> int | None:
        """Return since when the gateway is away (milliseconds), None while it answers or that cannot be told.

        What it returns is at most a second old.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOKED_EVERY_SECONDS:
                return self._since
            self._looked = now
        try:
            entry = self._bucket.get(_KEY)
        except BrokerError:
            return self._since
        self._since = None if entry is None else int(json.loads(entry.value)["since"])
        return self._since

    def note(self, error: str) -> None:
        """Note that the gateway does not answer."""
        with self._lock:
            now = time.monotonic()
            if now - self._noted < _NOTED_EVERY_SECONDS:
                return
            self._noted = now
        try:
            entry = self._bucket.get(_KEY)
            noted = self._now()
            since = noted if entry is None else json.loads(entry.value)["since"]
            value = json.dumps({"since": since, "noted": noted, "error": error[:_MAX_TEXT]}).encode()
            if entry is None:
                self._bucket.create(_KEY, value, ttl=self._ttl)
            else:
                self._bucket.update(_KEY, value, revision=entry.revision, ttl=self._ttl)
        except BrokerError:
            pass  # another process noted it, or the store is away too

    def over(self) -> None:
        """Say that the gateway has answered: the note goes, if there is one, at once or within a second.

        It does not wait for the store. One look a second is enough, and what is answered meanwhile waits for the next
        one, so that no note outlives the last answer. One that was made after the last answer stays.
        """
        with self._lock:
            self._answered = self._now()
            # What fails from now on is noted, once a second at most.
            soon = time.monotonic() - _NOTED_EVERY_SECONDS + _LOOKED_EVERY_SECONDS
            self._noted = min(self._noted, soon)
        self._look_soon()

    def _look_soon(self) -> None:
        with self._lock:
            if self._removing:
                return
            self._removing = True
            wait = self._removed + _LOOKED_EVERY_SECONDS - time.monotonic()
        looks = threading.Timer(max(0.0, wait), self._remove)
        looks.daemon = True
        looks.start()

    def _remove(self) -> None:
        with self._lock:
            self._removed = time.monotonic()
            self._removing = False
        try:
            entry = self._bucket.get(_KEY)
            if entry is not None:
                if json.loads(entry.value).get("noted", 0) > self._answered:
                    return
                self._bucket.delete(_KEY, revision=entry.revision)
        except RevisionConflict:
            return  # it was just noted again
        except BrokerError:
            self._look_soon()
            return
        with self._lock:
            self._since = None


class GuardedGateway:
    """A gateway that is left alone while it does not answer."""

    def __init__(self, gateway: Gateway, outage: Outage) -> None:
        self._gateway = gateway
        self._outage = outage
        self._breaker = CircuitBreaker(FAILURES, REST_SECONDS, _is_outage, name="payments")
        self._trial = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether charges are refused without asking the gateway."""
        return bool(self._breaker.opened)

    def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline:
        """Capture a payment; see `tasks.ports.Gateway`.

        Raises:
          GatewayUnavailable: When no usable answer came, or the gateway is left alone.
        """
        return self._guarded(lambda: self._gateway.charge(order_id, amount, currency, token))

    def find_charge(self, order_id: str) -> Charge | None:
        """Return the captured charge of an order; see `tasks.ports.Gateway`."""
        return self._guarded(lambda: self._gateway.find_charge(order_id))

    def refund(self, charge_id: str, amount: int, currency: str, key: str) -> str:
        """Give back a part of a charge; see `tasks.ports.Gateway`."""
        return self._guarded(lambda: self._gateway.refund(charge_id, amount, currency, key))

    def find_refund(self, order_id: str, key: str) -> str | None:
        """Return the id of a refund that was made; see `tasks.ports.Gateway`."""
        return self._guarded(lambda: self._gateway.find_refund(order_id, key))

    def find_chargebacks(self, order_id: str) -> list[tuple[str, Chargeback]]:
        """Return what was charged back of an order; see `tasks.ports.Gateway`."""
        return self._guarded(lambda: self._gateway.find_chargebacks(order_id))

    def _guarded(self, ask: Callable[[], T]) -> T:
        if self._breaker.closed:
            return self._ask(ask)
        # One at a time may find out whether it is back.
        if self._breaker.opened or not self._trial.acquire(blocking=False):
            raise GatewayUnavailable(
                f"the payment gateway is left alone for a while: {self._breaker.last_failure}"
            )
        try:
            return self._ask(ask)
        finally:
            self._trial.release()

    def _ask(self, ask: Callable[[], T]) -> T:
        try:
            with self._breaker:
                outcome = ask()
        except UnusableAnswer:
            self._outage.over()
            raise
        except GatewayUnavailable as error:
            self._outage.note(str(error))
            raise
        finally:
            metrics.breaker_open.set(not self._breaker.closed)
        self._outage.over()
        return outcome


def is_outage(error: BaseException) -> bool:
    """Whether an error says that the gateway is away, and not that it will not have one order."""
    return isinstance(error, GatewayUnavailable) and not isinstance(error, UnusableAnswer)


def _is_outage(_: type[BaseException], error: BaseException) -> bool:
    return is_outage(error)


class OneLine(logging.Filter):
    """Makes a charge that found no gateway one WARNING line: its traceback says nothing that the line does not."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, GatewayUnavailable):
            record.levelno, record.levelname = logging.WARNING, "WARNING"
            record.msg, record.args = "A payment waits: %s", (error,)
            record.exc_info = record.exc_text = None
        return True
