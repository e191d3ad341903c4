"""What is known of one limit, as a value: who has a turn, when messages started, and which moments are given away.

Nothing here talks to a server. `limits` reads a state, changes it with these methods, and stores it by compare-and-set.

Turns (`concurrency`): each turn belongs to a message, not to a process. A message whose worker died comes again and
still has its turn. A turn whose message is gone is found by its sequence in the stream.

Starts (`rate`): a message that is over the limit gets the next free moment, once. A fleet that falls behind does not
give out new moments: all that wait are later by the same `lag`, in the order that they have.

What keeps the rate exact is the list of the last starts: with `count` of them within the period, nothing starts. A
start is noted before it is made, so when it is made is not known, but bounded: it is noted as of the latest moment at
which it may be made, and a thread that comes later notes another (see `limits`). The period of a start runs from that
moment, so that no start of the next period comes before it is over, whenever the first was made.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from dramatiq_jetstream.limits import Rate

__all__ = ["LimitState", "Start", "Turn"]

#: A message that starts later than this after its moment, in milliseconds, moves the moments of all that wait. The
#: server itself is up to 250 ms late.
LATE_MS = 400

#: How much longer than the period a start is kept, in milliseconds. It covers the time from a thread's last look at the
#: clock to its actor, and the drift between the clocks of two processes.
GUARD_MS = 10

#: The least time that a thread has, in milliseconds, from the first moment at which it may start.
SLACK_MS = 5

#: The most starts that are kept one by one. At a higher rate, starts close to each other are kept as one.
MOST_STARTS = 64


@dataclass
class Turn:
    """A message's turn.

    Attributes:
      origin: Which message it is, wherever it is delivered.
      sequence: Its sequence in its stream; 0 while it is on its way to a worker, or waits for its moment.
      since: When that was noted, in milliseconds since 1970; for one that waits, when it is due.
    """

    origin: str
    sequence: int
    since: int


@dataclass(frozen=True)
class Start:
    """When a message may start: not before `earliest` and not after `latest`, in milliseconds since 1970."""

    noted: int
    earliest: int
    latest: int


@dataclass
class LimitState:
    """The state of one limit, for one value of its key.

    Attributes:
      turns: The turns that are taken.
      line: None of those that are noted as waiting for a turn was stored before this sequence; 0 when none waits.
      starts: When messages were started at the latest, and how many, the earliest first.
      last: The last moment that was given away.
      begun: The latest moment whose message has started.
      lag: How much later than its moment each message starts.
      called: The sequence of the last message that was called from the line. It is removed from there a moment after it
        is on its queue, and may have run by then.
    """

    turns: list[Turn] = field(default_factory=list)
    line: int = 0
    starts: list[tuple[int, int]] = field(default_factory=list)
    last: float = 0
    begun: float = 0
    lag: float = 0
    called: int = 0

    @classmethod
    def decode(cls, data: bytes) -> LimitState:
        """What `encode` made."""
        fields = json.loads(data)
        turns = [Turn(*each) for each in fields.get("turns", ())]
        starts = [(int(moment), int(count)) for moment, count in fields.get("starts", ())]
        return cls(
            turns,
            **{name: fields.get(name, 0) for name in ("line", "called", "last", "begun", "lag")},
            starts=starts,
        )

    def encode(self) -> bytes:
        fields = {
            "turns": [[turn.origin, turn.sequence, turn.since] for turn in self.turns],
            "line": self.line,
            "called": self.called,
            "starts": self.starts,
            "last": self.last,
            "begun": self.begun,
            "lag": self.lag,
        }
        return json.dumps({name: value for name, value in fields.items() if value}).encode()

    def kept_ms(self, rate: Rate | None, now: int) -> int | None:
        """For how many milliseconds the state means something; None while turns are taken or messages wait for one."""
        if self.turns or self.line:
            return None
        return 60_000 + (0 if rate is None else rate.period + math.ceil(max(0, self.last + self.lag - now)))

    def turn_of(self, origin: str) -> Turn | None:
        """The turn that a message has."""
        return next((turn for turn in self.turns if turn.origin == origin), None)

    def give_back(self, origin: str) -> bool:
        """Remove a message's turn; returns whether it had one."""
        left = [turn for turn in self.turns if turn.origin != origin]
        had = len(left) < len(self.turns)
        self.turns = left
        return had

    def may_start(self, rate: Rate, now: int) -> int:
        """The earliest moment at which another start is within the rate."""
        period = rate.period + GUARD_MS
        self.starts = [(moment, count) for moment, count in self.starts if moment + period > now]
        left = rate.count
        for moment, count in reversed(self.starts):
            left -= count
            if left <= 0:
                return moment + period
        return now

    def reserve(self, rate: Rate, now: int, soon: int) -> float | None:
        """The moment of a message that has none: None when it may start within `soon` milliseconds."""
        earliest = self.may_start(rate, now)
        if self.last + self.lag <= now:  # none waits
            self.lag = 0
            if earliest <= now + soon:
                self.last = self.begun = max(earliest, now)
                return None
        self.last = max(self.last + rate.interval, earliest - self.lag)
        return self.last

    def due(self, rate: Rate, moment: float, now: int) -> int:
        """When the message with a moment may start."""
        return max(math.ceil(moment + self.lag) if moment > self.begun else now, self.may_start(rate, now))

    def start(self, rate: Rate, moment: float | None, now: int, earliest: int, latest: int) -> Start:
        """Note a start that is made between two moments; returns how it is noted, which may be for longer."""
        if moment is not None and moment > self.begun:
            self.begun = moment
            if earliest - moment > self.lag + LATE_MS:
                self.lag = earliest - moment
        last, count = self.starts[-1] if self.starts else (0, 0)
        latest = max(latest, earliest + SLACK_MS, last)
        step = _step(rate)
        if step and last // step == latest // step:
            # As of the latest of them, so that none is forgotten too early.
            self.starts[-1] = latest, count + 1
        else:
            self.starts.append((latest, 1))
        return Start(now, earliest, latest)

    def withdraw(self, rate: Rate, start: Start) -> None:
        """Forget a start that was noted and is not made, unless its period is over."""
        step = _step(rate)
        for position, (moment, count) in enumerate(self.starts):
            if moment == start.latest or (
                step and moment > start.latest and moment // step == start.latest // step
            ):
                self.starts[position : position + 1] = [(moment, count - 1)] if count > 1 else []
                return


def _step(rate: Rate) -> int:
    """How close together starts are kept as one, in milliseconds; 0 for a rate whose starts are kept one by one."""
    return rate.period // MOST_STARTS if rate.count > MOST_STARTS else 0
