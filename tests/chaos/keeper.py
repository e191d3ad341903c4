"""Keeps the archive while everything burns: some runs are killed in the middle, and some orders are fetched back.

What the gateway tells of an order that has left has to wait until an operator brings it back. The keeper does.
"""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections.abc import Callable

import requests

from tests.chaos.reading import read_gateway
from tests.chaos.tape import Tape

_DONE = re.compile(r"(\d+) segments written: (\d+) events, (\d+) orders")

#: Where a run of the archive is killed.
_DEATHS = (
    "tasks.archive:Archive.write:1",
    "tasks.retention:Retention._move:1",
    "tasks.retention:Retention._close:1",
    "tasks.retention:Retention._close:3",
    "tasks.retention:Retention._leave:1",
)

#: For how long the gateway may be about to tell of a chargeback, in seconds.
_TOLD_SECONDS = 3.0


class Keeper:
    """Works until it is closed.

    Parameters:
      operate: Runs an operator's command: its words, and where it dies.
    """

    def __init__(
        self,
        operate: Callable[..., subprocess.CompletedProcess[str]],
        gateway_url: str,
        tape: Tape,
        *,
        seed: int,
        pause: float = 4.0,
    ) -> None:
        self._operate = operate
        self._gateway_url = gateway_url
        self._tape = tape
        self._choice = random.Random(f"{seed}.keeper")
        self._pause = pause
        self._untold: dict[str, float] = {}
        #: How many orders runs have archived.
        self.archived = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Begin nothing more; what was begun comes to its end."""
        self._stop.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(180)
        assert not self._thread.is_alive(), "the keeper did not come to an end"

    def all_done(self) -> bool:
        """Whether orders are in the archive."""
        return self.archived > 0

    def _work(self) -> None:
        while not self._stop.wait(self._choice.uniform(0.5, 1.5) * self._pause):
            self._run(self._choice.choice(_DEATHS) if self._choice.random() < 0.3 else None)
            self.bring_back()

    def _run(self, dies: str | None) -> None:
        done = self._operate("archives", "run", dies=dies)
        if match := _DONE.search(done.stdout):
            self.archived += int(match[3])

    def bring_back(self) -> None:
        """Bring orders back of whose chargebacks the service has not heard: they may have left before."""
        try:
            chargebacks = {
                one["id"]: one["order_id"] for one in read_gateway(self._gateway_url, "chargebacks")
            }
        except (requests.RequestException, ValueError, KeyError):
            return
        known = {event.about for event in self._tape.events() if event.name == "charged_back"}
        now = time.monotonic()
        self._untold = {one: self._untold.get(one, now) for one in chargebacks if one not in known}
        late = [chargebacks[one] for one, since in self._untold.items() if now - since > _TOLD_SECONDS]
        if late:
            self._operate("archives", "restore", *late)
