"""Holds the library's books against each other and says, for each promise, whether it was kept.

Nothing here knows how the library works: only what `docs/guarantees.md` promises. A label stands for a message. What
was asked for before the end of a fault that destroys the store may be lost or come again; of that, one promise is
judged: what was told not to be stored never appears.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from tests.chaos.checker import Verdict
from tests.chaos.library.books import Books, Call, Period, Run
from tests.chaos.library.settings import (
    ABORTED,
    ACK_WAIT,
    DOOMED,
    ENQUEUE_TIMEOUT,
    EVERY,
    SUBSCRIBERS,
    TURNS,
    TURNS_TTL,
)

#: How much longer than promised a call may take where the machine is busy, in seconds.
GRACE = 8.0

#: After a fault the schedule may take this long until it ticks again, in seconds.
TICKS_AGAIN = 20.0

#: What a process that lived throughout may have gained.
MORE_MEMORY, MORE_THREADS, MORE_FILES = 80 * 2**20, 8, 16

#: What a store has lost or brings back may be a little older than the fault, in seconds.
NOT_YET = 3.0

#: The name of the fault that is none.
QUIET = "nothing"

#: Nothing follows these, so that they are done when they have ended.
PLAIN = frozenset({"work", "complete", *SUBSCRIBERS})

_ERROR_OF_ABORT = "Abort"


@dataclass
class Facts:
    """The books, sorted.

    Attributes:
      told: What each label was told.
      asked: The call that asked for a label.
      began, ended: The runs of a label that began, and that ended well.
      exempt: Whether a moment is before the end of a fault that destroyed the store.
    """

    books: Books
    told: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Call] = field(default_factory=dict)
    actors: dict[str, str] = field(default_factory=dict)
    began: defaultdict[str, list[Run]] = field(default_factory=lambda: defaultdict(list))
    ended: defaultdict[str, list[Run]] = field(default_factory=lambda: defaultdict(list))
    stopped: set[str] = field(default_factory=set)
    letters: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, books: Books) -> Facts:
        facts = cls(books)
        for call in books.calls:
            for position, label in enumerate(call.labels):
                facts.asked[label] = call
                facts.told[label] = call.told.get(label, "unknown")
                facts.actors[label] = call.actors[position] if call.actors else "event"
        for run in books.runs:
            if run.what == "began":
                facts.began[run.label].append(run)
            elif run.what == "ended":
                facts.ended[run.label].append(run)
            elif run.what == "skipped" or run.error == _ERROR_OF_ABORT:
                facts.stopped.add(run.label)
        facts.letters = {letter["label"] for letter in books.letters}
        return facts

    def exempt(self, call: Call, until: float = float("inf")) -> bool:
        """Whether a fault destroyed the store after a call was asked for and before a moment."""
        return any(
            call.asked_at <= period.ended and period.began - NOT_YET <= until
            for period in self.books.periods
            if period.destroys
        )

    def end_of(self, label: str) -> float:
        """When a label ended well for the first time; infinite when it did not, or not for all."""
        ends: dict[str, float] = {}
        for run in self.ended[label]:
            ends.setdefault(run.actor, run.at)
        wanted = len(SUBSCRIBERS) if self.actors.get(label) == "event" else 1
        return max(ends.values()) if len(ends) >= wanted else float("inf")

    def excused(self, label: str) -> bool:
        """Whether a label was on its way when a fault destroyed the store."""
        return self.exempt(self.asked[label], self.end_of(label))

    def finished(self, label: str) -> bool:
        """Whether all has become of a label that was promised."""
        if label in self.letters:
            return True
        call, actor = self.asked[label], self.actors[label]
        if actor == "event":
            return {run.actor for run in self.ended[label]} >= set(SUBSCRIBERS)
        if actor in ABORTED and label in self.stopped:
            return True
        if call.kind == "pipeline" and label != call.labels[0] and not self.finished(call.labels[0]):
            return False
        return actor not in DOOMED and bool(self.ended[label])

    def due(self) -> list[str]:
        """Return the labels that must have had an outcome."""
        return [label for label, told in self.told.items() if told == "stored" and not self.excused(label)]


def unfinished(books: Books, before: float = float("inf")) -> list[str]:
    """Return the labels that were told to be stored before a moment, and of which nothing has become yet."""
    facts = Facts.of(books)
    return [
        label
        for label in facts.due()
        if (facts.asked[label].told_at or 0) < before and not facts.finished(label)
    ]


def check(books: Books) -> list[Verdict]:
    """Return a verdict on every promise."""
    facts = Facts.of(books)
    return [judge(facts) for judge in PROMISES]


def stored_is_done(facts: Facts) -> Verdict:
    """What was told to be stored is done, or a dead letter."""
    due = facts.due()
    lost = {f"{facts.actors[label]} {label}" for label in due if not facts.finished(label)}
    return _verdict(
        "what is stored is done, or a dead letter", lost, f"{len(due)} stored, {len(lost)} not done"
    )


def not_stored_is_never_there(facts: Facts) -> Verdict:
    """What was told not to be stored is never run, never a letter, and never waits."""
    refused = {label for label, told in facts.told.items() if told == "not stored"}
    there = facts.began.keys() | facts.letters | facts.books.waiting_labels
    ghosts = {f"{facts.asked[label].kind} {label}" for label in refused & there}
    return _verdict(
        "what is not stored never appears", ghosts, f"{len(refused)} not stored, {len(ghosts)} appeared"
    )


def repeated_where_allowed(facts: Facts) -> Verdict:
    """A run is repeated only over a fault for which the guarantees say so.

    That is when its worker died or was away for longer than `ack_wait`, and when what follows it could not be stored. A
    server that was killed forgets what it delivered.
    """
    firsts: dict[tuple[str, str, int], Run] = {}
    repeated = 0
    wrong = set()
    allowing = [period for period in facts.books.periods if period.repeats or period.destroys]
    for run in facts.books.runs:
        if run.what != "began" or run.actor == "tick":
            continue
        key = (run.actor, run.id, run.retries)
        first = firsts.setdefault(key, run)
        if first is run:
            continue
        repeated += 1
        among = allowing if run.actor in PLAIN else facts.books.periods
        # It may have been delivered to both of them when the fault struck, and begun when it was over.
        delivered = max(first.stored / 1000, first.at - ACK_WAIT / 1000)
        if not any(_meets(period, delivered, run.at) for period in among):
            wrong.add(f"{run.actor} {run.label} at {first.at:.1f} and {run.at:.1f}")
        firsts[key] = run
    return _verdict(
        "a run is repeated only where that is said",
        wrong,
        f"{repeated} repeated, {len(wrong)} without a reason",
    )


def groups_complete_once(facts: Facts) -> Verdict:
    """The callback of a group is enqueued once, and after all its members."""
    groups = [call for call in facts.books.calls if call.callback]
    wrong = set()
    for call in groups:
        assert call.callback is not None
        if facts.exempt(call, facts.end_of(call.callback)):
            continue
        runs = facts.began[call.callback]
        # A last member that ran again, over a fault, is told once more that it is the last.
        again = any(len(facts.began[label]) > 1 for label in call.labels)
        if len({run.stored for run in runs if not run.retries}) > 1 and not again:
            wrong.add(f"{call.callback} twice")
        ends = [min((run.at for run in facts.ended[label]), default=None) for label in call.labels]
        if runs and any(end is None or end > runs[0].at for end in ends):
            wrong.add(f"{call.callback} early")
        if call.stored and not facts.ended[call.callback]:
            wrong.add(f"{call.callback} never")
    return _verdict(
        "a group's callback comes once, after all members", wrong, f"{len(groups)} groups, {len(wrong)} wrong"
    )


def keys_are_unique(facts: Facts) -> Verdict:
    """Of the calls with one unique key one message is run at most; those that were stored are known by it."""
    by_key: defaultdict[str, list[Call]] = defaultdict(list)
    for call in facts.books.calls:
        if call.key is not None and not facts.exempt(call, (call.told_at or call.asked_at) + GRACE):
            by_key[call.key].append(call)
    twice = {
        key
        for key, calls in by_key.items()
        if sum(1 for call in calls if facts.began[call.labels[0]]) > 1
        or sum(1 for call in calls if call.stored) > 1
    }
    return _verdict(
        "a unique key stands for one message", twice, f"{len(by_key)} keys, {len(twice)} not unique"
    )


def results_are_there(facts: Facts) -> Verdict:
    """What is done has its result."""
    done = {
        label
        for label, actor in facts.actors.items()
        if actor == "answer"
        and facts.ended[label]
        and (label in facts.books.results or not facts.exempt(facts.asked[label]))
    }
    missing = done - facts.books.results
    return _verdict("what is done has its result", missing, f"{len(done)} results, {len(missing)} missing")


def only_failures_are_letters(facts: Facts) -> Verdict:
    """Only what fails for good becomes a dead letter."""
    wrong = {
        f"{letter['actor']} {letter['label']}: {letter['reason']}: {letter['error']}"
        for letter in facts.books.letters
        if letter["actor"] not in DOOMED
    }
    count = len(facts.books.letters)
    return _verdict(
        "only what fails is a dead letter", wrong, f"{count} dead letters, {len(wrong)} without reason"
    )


def ticks_as_scheduled(facts: Facts) -> Verdict:
    """There is one tick for each time of the schedule; those that are due in an outage are made up for by one."""
    every = EVERY / 1000
    stamps = sorted(
        {run.stored / 1000 for run in facts.books.runs if run.actor == "tick" and run.what == "began"}
    )
    faults = [period for period in facts.books.periods if period.fault != QUIET]
    wrong = set()
    for before, after in pairwise([facts.books.began, *stamps, facts.books.ended]):
        disturbed = _disturbed(faults, before, after)
        if after - before - disturbed > 3 * every + GRACE:
            wrong.add(f"none between {before:.1f} and {after:.1f}")
    for before, after in pairwise(stamps):
        if after - before < every / 2 and not any(_meets(p, before - every, after + every) for p in faults):
            wrong.add(f"two at {before:.2f} and {after:.2f}")
    return _verdict("ticks come as scheduled", wrong, f"{len(stamps)} ticks, {len(wrong)} wrong")


def calls_end_in_time(facts: Facts) -> Verdict:
    """Every call returns or raises within its time, and raises nothing that is not documented."""
    # A group makes its barrier first, an atomic batch and a unique message ask before they store.
    slow = {
        f"{call.kind} {call.name}: {call.seconds:.1f} s"
        for call in facts.books.calls
        if call.seconds > 2 * ENQUEUE_TIMEOUT / 1000 + GRACE
    }
    strange = {f"{call.kind} {call.name}: {call.error}" for call in facts.books.calls if call.surprise}
    told = Counter(told for call in facts.books.calls for told in call.told.values())
    return _verdict(
        "every call ends in time, with a known error",
        slow | strange,
        f"{len(facts.books.calls)} calls ({', '.join(f'{n} {t}' for t, n in sorted(told.items()))}), "
        f"{len(slow)} too long, {len(strange)} with another error",
    )


def nothing_is_stuck(facts: Facts) -> Verdict:
    """In the end nothing waits."""
    waiting = facts.books.waiting
    return _verdict("nothing is stuck", set(waiting), f"{len(waiting)} wait")


def all_alive(facts: Facts) -> Verdict:
    """In the end every worker lives and takes messages, and producers came to their end."""
    unhealthy = facts.books.unhealthy
    return _verdict("every process and thread is alive", set(unhealthy), f"{len(unhealthy)} complaints")


def nothing_grows(facts: Facts) -> Verdict:
    """Processes that lived throughout have gained neither memory, threads nor open files, and no consumer is left."""
    grown = set()
    for pid, (first, last) in facts.books.sizes.items():
        if last.memory - first.memory > MORE_MEMORY:
            grown.add(f"{pid}: {first.memory >> 20} MiB at first, {last.memory >> 20} at last")
        if last.threads - first.threads > MORE_THREADS:
            grown.add(f"{pid}: {first.threads} threads at first, {last.threads} at last")
        if last.files - first.files > MORE_FILES:
            grown.add(f"{pid}: {first.files} files at first, {last.files} at last")
    for stream, names in facts.books.consumers.items():
        wanted = len(SUBSCRIBERS) if stream == "CHAOS" else 1
        if len(names) > wanted:
            grown.add(f"{stream} has the consumers {', '.join(names)}")
    return _verdict("nothing grows", grown, f"{len(facts.books.sizes)} processes lived throughout")


def turns_are_limited(facts: Facts) -> Verdict:
    """At no time more runs hold a turn at a limiter than it has.

    A turn that is held for longer than the limiter keeps it is free again, as that of a process that was away.
    """
    taken: dict[tuple[int, str, int], Run] = {}
    held: list[tuple[float, float]] = []
    for run in facts.books.runs:
        key = (run.pid, run.id, run.retries)
        if run.what == "took":
            taken[key] = run
        elif run.what == "gave" and (began := taken.pop(key, None)) is not None:
            held.append((began.at, min(run.at, began.at + TURNS_TTL / 1000)))
    wrong = set()
    for began, _ in held:
        at_once = sum(other <= began < end for other, end in held)
        # A store that was destroyed has forgotten who holds a turn.
        forgotten = any(
            p.destroys and p.began - NOT_YET <= began <= p.ended + TURNS_TTL / 1000
            for p in facts.books.periods
        )
        if at_once > TURNS and not forgotten:
            wrong.add(f"{at_once} at {began:.2f}")
    return _verdict(
        "a limiter gives no more turns than it has",
        wrong,
        f"{len(held)} turns, {len(wrong)} too many at once",
    )


PROMISES: tuple[Callable[[Facts], Verdict], ...] = (
    stored_is_done,
    not_stored_is_never_there,
    repeated_where_allowed,
    groups_complete_once,
    keys_are_unique,
    results_are_there,
    only_failures_are_letters,
    turns_are_limited,
    ticks_as_scheduled,
    calls_end_in_time,
    nothing_is_stuck,
    all_alive,
    nothing_grows,
)


def _meets(period: Period, begin: float, end: float) -> bool:
    return period.began <= end and begin <= period.ended


def _disturbed(periods: Iterable[Period], begin: float, end: float) -> float:
    """Return how many seconds between two moments there was a fault, or ticks had yet to come again."""
    seconds = 0.0
    reached = begin
    for period in sorted(periods, key=lambda period: period.began):
        until = min(end, period.ended + TICKS_AGAIN)
        seconds += max(0.0, until - max(reached, period.began))
        reached = max(reached, until)
    return seconds


def _verdict(promise: str, culprits: Iterable[str], numbers: str) -> Verdict:
    found = tuple(sorted(culprits))
    return Verdict(promise, not found, numbers, found)
