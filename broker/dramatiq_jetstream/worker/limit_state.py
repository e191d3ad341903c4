"""What is known of one limit, as a value: who has a turn, when messages started, and which moments are given away.

Nothing here talks to a server. `limits` reads a state, changes it with these methods, and stores it by compare-and-set.

Turns (`concurrency`): each turn belongs to a message, not to a process. A message whose worker died comes again and
still has its turn. A turn whose message is gone is found by its sequence in the stream.

Starts (`rate`): a message that is over the limit gets the next free moment, once. A fleet that falls behind does not
give out new moments: all that wait are later by the same `lag`, in the order that they have. What keeps the limit exact
is the list of the last starts: with `count` of them within the period, nothing starts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from dramatiq_jetstream.limits import Rate

__all__ = ["LimitState", "Turn"]

#: How much later than its moment a message may start before all that wait are later too, in milliseconds: the server
#: is up to 250 ms late.
LATE_MS = 400

#: How much longer than the period its starts are kept, in milliseconds: a thread that may go on does so in a moment.
GUARD_MS = 10

#: The most starts that are kept one by one; of a higher rate, starts that are close together are kept as one.
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


@dataclass
class LimitState:
    """The state of one limit, for one value of its key.

    Attributes:
      turns: The turns that are taken.
      line: No message that waits for a turn was stored before this sequence; 0 when none waits.
      starts: When messages were started, and how many, the earliest first.
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

    def withdraw(self, start: int) -> None:
        """Forget a start that was noted, and was not made then."""
        for position, (moment, count) in enumerate(self.starts):
            if moment >= start:
                self.starts[position : position + 1] = [(moment, count - 1)] if count > 1 else []
                return

    def start(self, rate: Rate, moment: float | None, now: int) -> None:
        """Note a start."""
        if moment is not None and moment > self.begun:
            self.begun = moment
            if now - moment > self.lag + LATE_MS:
                self.lag = now - moment
        latest, count = self.starts[-1] if self.starts else (0, 0)
        now = max(now, latest)
        step = rate.period // MOST_STARTS
        if rate.count > MOST_STARTS and step and latest // step == now // step:
            self.starts[-1] = now, count + 1  # as of the latest of them, so that none is forgotten too early
        else:
            self.starts.append((now, 1))
