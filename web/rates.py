"""Limits how often each caller may ask, in this process.

A caller earns the right to one request at regular intervals, up to a minute's worth. This is the generic cell rate
algorithm: it keeps one number for each caller. The numbers are in this process, because an exact count over all
processes would cost each request two round trips to the store. The memory is bounded: beyond `REMEMBERED` callers the
caller that was quiet longest is forgotten, and starts with all rights again.

Passwords are the one thing that can be guessed, so an address is also limited in how often it may be wrong about them.
A try counts as wrong until it is known to be right: to look at a password takes a while, and many may be tried at once.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from tasks.settings import Settings
from web.identity import Caller
from web.problems import Problem

REMEMBERED: Final = 10_000

#: How often an address may show a wrong password, in a minute.
FAILURES: Final = 20

_MINUTE_SECONDS = 60.0


class Rate:
    """Limits the requests a minute for each key. Any thread may use it."""

    def __init__(self, a_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self._interval = _MINUTE_SECONDS / a_minute
        self._now = now
        # For each key the time at which all its rights will be back.
        self._full: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, key: str) -> float:
        """Return 0 for a request that may go on, and uses a right up, or the seconds until it may."""
        now = self._now()
        with self._lock:
            full = max(now, self._full.get(key, 0.0)) + self._interval
            excess = full - now - _MINUTE_SECONDS
            if excess > 1e-6:
                return excess
            self._full[key] = full
            self._full.move_to_end(key)
            if len(self._full) > REMEMBERED:
                self._full.popitem(last=False)
        return 0.0

    def give_back(self, key: str) -> None:
        """Have a request that went on count as never made."""
        with self._lock:
            if key in self._full:
                self._full[key] -= self._interval


class Rates:
    """The rates of this process: of customers and people, of programs, and of wrong passwords."""

    def __init__(self, settings: Settings) -> None:
        self._people = Rate(settings.rate_limit)
        self._programs = Rate(settings.program_rate_limit)
        self._failures = Rate(FAILURES)

    def check(self, caller: Caller) -> None:
        """Raise the problem of a caller who asks too often."""
        if caller.kind == "open":
            return
        program = caller.kind == "machine" and caller.customer_id is None
        _refuse((self._programs if program else self._people).wait(caller.space))

    def try_password(self, address: str) -> None:
        """Count a try as a failure, or raise the problem of an address that has failed too often."""
        _refuse(self._failures.wait(_network(address)))

    def was_right(self, address: str) -> None:
        """Say that a try was no failure."""
        self._failures.give_back(_network(address))


def _refuse(seconds: float) -> None:
    if seconds > 0:
        wait = max(1, round(seconds + 0.5))
        raise Problem("too-many-requests", f"Ask again in {wait} s.", headers={"Retry-After": str(wait)})


def _network(address: str) -> str:
    """Return what one client has: an IPv4 address, or the /64 that an IPv6 client chooses its addresses from."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
