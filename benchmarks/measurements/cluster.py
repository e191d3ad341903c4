"""Three servers on loopback: what replication costs, and what the loss of a leader does.

Enqueue, drain and sustained load are measured as on one server. For the loss of a leader, messages are sent at a low,
steady rate; the server that leads the queue is killed and stays away. The gap is the longest time in which no message
began; every message whose enqueue returned has to run.
"""

from __future__ import annotations

import time

from benchmarks.contenders.contender import Contender
from benchmarks.contenders.replicated import JetstreamReplicated, RabbitmqQuorum
from benchmarks.measurements import drain, enqueue, sustained
from benchmarks.measurements.measurement import (
    CPU,
    DRIVER,
    Figure,
    Measurement,
    Options,
    driver_figures,
)
from benchmarks.pace import longest_gap
from benchmarks.trial import Trial

ENQUEUE, DRAIN, SUSTAINED, LOSS = "enqueue, 8 threads", "drain", "sustained", "leader lost"

#: How long the sustained load and the load around a loss last, in seconds.
SUSTAINED_SECONDS = 30.0
LOSS_SECONDS = 40.0

#: Messages a second around a loss, and after how many seconds the leader is killed.
LOSS_RATE = 100.0
LOSS_AFTER = 8.0

#: How long what was stored may take to run after a loss, in seconds.
LOST_TIMEOUT = 120.0


class Cluster(Measurement):
    name = "cluster"
    title = "Three servers"
    quick = False
    figures = (
        Figure("per_second", "messages/s", plotted=True),
        Figure("settled_per_second", "until all acks are handled, messages/s"),
        Figure("gap_seconds", "nothing began for", "s"),
        Figure("lost", "stored and not run", "messages"),
        DRIVER[0],
        *CPU[:2],
    )

    def cases(self, options: Options, contender: Contender) -> list[str]:
        survives = isinstance(contender, JetstreamReplicated | RabbitmqQuorum)
        return [ENQUEUE, DRAIN, SUSTAINED, *([LOSS] if survives else [])]

    def run(self, contender: Contender, case: str, options: Options) -> dict[str, float]:
        if case == ENQUEUE:
            messages = options.count(enqueue.MESSAGES) // 8 * 8
            with Trial(contender, self.name) as trial:
                before = trial.server_usage()
                figures = trial.drive("enqueue", messages=messages, threads=8)
                return driver_figures(figures, trial.server_usage().cpu_since(before), messages)
        if case == DRAIN:
            messages = options.count(drain.MESSAGES)
            with Trial(contender, self.name) as trial:
                trial.fill(messages)
                return drain.drain(trial, messages) | drain.settled(trial, messages)
        if case == SUSTAINED:
            with Trial(contender, self.name) as trial:
                sustained.warm_up(trial)
                return sustained.sustain(trial, max(3.0, SUSTAINED_SECONDS * options.scale))
        with Trial(contender, self.name, samples=int(LOSS_SECONDS * LOSS_RATE) + 10) as trial:
            return self._leader_lost(trial)

    def _leader_lost(self, trial: Trial) -> dict[str, float]:
        assert isinstance(trial.contender, JetstreamReplicated | RabbitmqQuorum)
        sustained.warm_up(trial)
        driver = trial.start_driver(
            "sustain", seconds=LOSS_SECONDS, threads=sustained.SENDERS, rate=LOSS_RATE, retry=True
        )
        trial.wait_for(int(LOSS_RATE * LOSS_AFTER))
        killed = time.monotonic_ns()
        trial.contender.leader(trial.servers).kill()
        given = int(trial.finish_driver(driver, timeout=LOSS_SECONDS + LOST_TIMEOUT)["sent"])
        deadline = time.monotonic() + LOST_TIMEOUT
        while not all(trial.tally.times()[:given]) and time.monotonic() < deadline:
            time.sleep(0.2)
        began = trial.tally.times()[:given]
        return {
            "per_second": trial.tally.read().per_second,
            "gap_seconds": longest_gap(began, killed),
            "lost": float(sum(not moment for moment in began)),
        }
