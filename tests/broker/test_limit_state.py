"""The arithmetic of limits: what starts when, without a server."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream.limits import Rate
from dramatiq_jetstream.worker.limit_state import GUARD_MS, SLACK_MS, LimitState, Start, Turn

NOW = 1_800_000_000_000

rates = st.builds(Rate, st.integers(1, 300), st.sampled_from([1_000, 10_000, 60_000]))


def run(rate, arrivals, lateness, held_up=()):
    """Start messages that arrive at these times, each of which comes at its moment and so much later.

    A thread that may start is held up for so long before it does, and asks again if it is too late then.
    """
    state, starts = LimitState(), []
    events = sorted((NOW + at, number, None, None) for number, at in enumerate(arrivals))
    late, held = iter(lateness), iter(held_up)
    while events:
        now, number, moment, start = events.pop(0)
        state = LimitState.decode(state.encode())
        if start is not None and now <= start.latest + GUARD_MS:
            starts.append((now, number))
            continue
        if start is not None:
            state.withdraw(rate, start)
            moment = NOW  # it goes before those that wait
        elif moment is None:
            moment = state.reserve(rate, now, 0)
        due = state.may_start(rate, now) if moment is None else state.due(rate, moment, now)
        if due <= now:
            events.append((now + next(held, 0), number, moment, state.start(rate, moment, now, now, now)))
        else:
            events.append((due + next(late, 0), number, moment, None))
        events.sort(key=lambda event: event[:2])
    return starts


def most_within(starts, period):
    """The most starts in any period."""
    moments = [moment for moment, _ in starts]
    return max(sum(moment <= other < moment + period for other in moments) for moment in moments)


@given(
    rates,
    st.lists(st.integers(0, 5_000), min_size=1, max_size=60),
    st.lists(st.integers(0, 3_000), max_size=60),
    st.lists(st.one_of(st.integers(0, 30), st.integers(0, 3_000)), max_size=60),
)
def test_no_period_has_more_starts_than_the_rate(rate, arrivals, lateness, held_up):
    """Whenever messages come, however late they are at their moment, and however long their threads are held up."""
    starts = run(rate, arrivals, lateness, held_up)
    assert sorted(number for _, number in starts) == list(range(len(arrivals)))
    assert most_within(starts, rate.period) <= rate.count


@given(rates, st.integers(1, 200))
def test_messages_that_come_on_time_start_in_their_order_and_at_the_rate(rate, count):
    """A burst starts first come, first served, and takes as long as the rate says."""
    starts = run(rate, range(count), [])
    assert [number for _, number in starts] == list(range(count))
    periods = max(0, count - rate.count) / rate.count + 1
    assert starts[-1][0] - NOW <= count + (periods + 1) * (GUARD_MS + SLACK_MS) + periods * rate.period


def test_a_fleet_that_was_away_goes_on_in_order():
    """Messages that are all late keep their places and their pace, and the period after that is not fuller."""
    rate = Rate(5, 1_000)
    state = LimitState()
    for _ in range(5):
        state.start(rate, state.reserve(rate, NOW, 0), NOW, NOW, NOW)
    waiting = [state.reserve(rate, NOW, 0) for _ in range(20)]
    back = NOW + 3_600_000
    state.start(rate, waiting[0], back, back, back)
    dues = [state.due(rate, moment, back) for moment in waiting[1:]]
    assert dues == sorted(dues)
    assert [round(later - sooner) for sooner, later in pairwise(dues[5:])] == [200] * 13
    straggler = state.due(rate, waiting[0], back + 10)
    assert straggler == back + 10


def test_of_a_high_rate_a_few_starts_are_kept():
    """The state stays small, whatever the rate; those that are kept as one count as of the latest."""
    rate, state = Rate(1_000, 1_000), LimitState()
    for number in range(900):
        state.start(rate, None, NOW, NOW + number, NOW)
    assert len(state.starts) <= 65
    assert sum(count for _, count in state.starts) == 900


def test_a_state_is_stored_as_it_is():
    """Turns, places and starts come back; what is empty takes no room."""
    state = LimitState([Turn("a", 5, NOW)], 7, [(NOW, 1)], NOW + 0.5, NOW, 250.25, 9)
    assert LimitState.decode(state.encode()) == state
    assert LimitState().encode() == b"{}"


def test_a_turn_is_its_messages():
    """It is given back once, and a state with a turn does not expire."""
    state = LimitState([Turn("a", 5, NOW)])
    assert state.kept_ms(None, NOW) is None
    assert state.give_back("a")
    assert not state.give_back("a")
    assert state.kept_ms(None, NOW) is not None


def test_what_is_stored_is_json_with_short_names():
    """Programs of different versions read each other's states."""
    state = LimitState([Turn("a", 5, NOW)], 7, [(NOW, 1)], NOW + 0.5, NOW, 250.25, 9)
    assert json.loads(state.encode()) == {
        "turns": [["a", 5, NOW]],
        "line": 7,
        "called": 9,
        "starts": [[NOW, 1]],
        "last": NOW + 0.5,
        "begun": NOW,
        "lag": 250.25,
    }
    assert LimitState.decode(b"{}") == LimitState([], 0, [], 0, 0, 0)


@pytest.mark.parametrize(
    ("state", "rate", "kept"),
    [
        (LimitState(), None, 60_000),
        (LimitState(), Rate(5, 1_000), 61_000),
        (LimitState(last=NOW + 0.5, lag=2), Rate(5, 1_000), 61_003),
        (LimitState(last=NOW - 5, lag=2), Rate(5, 1_000), 61_000),
        (LimitState(line=7), Rate(5, 1_000), None),
        (LimitState([Turn("a", 5, NOW)]), Rate(5, 1_000), None),
    ],
)
def test_a_state_is_kept_until_its_last_moment_and_its_period_are_over(state, rate, kept):
    assert state.kept_ms(rate, NOW) == kept


def test_a_turn_that_is_given_back_leaves_the_others():
    first, second = Turn("a", 5, NOW), Turn("b", 6, NOW)
    state = LimitState([first, second])
    assert (state.turn_of("b"), state.turn_of("c")) == (second, None)
    assert not state.give_back("c")
    assert state.give_back("a")
    assert state.turns == [second]


@pytest.mark.parametrize(
    ("starts", "count", "now", "earliest"),
    [
        ([], 1, NOW, NOW),
        ([(NOW, 1)], 2, NOW, NOW),
        ([(NOW, 1)], 1, NOW, NOW + 1_010),
        ([(NOW, 1)], 1, NOW + 1_009, NOW + 1_010),
        ([(NOW, 1)], 1, NOW + 1_010, NOW + 1_010),
        ([(NOW - 5, 1), (NOW - 3, 1), (NOW, 1)], 2, NOW, NOW + 1_007),
        ([(NOW - 5, 1), (NOW, 2)], 2, NOW, NOW + 1_010),
        ([(NOW - 5, 1), (NOW, 2)], 3, NOW, NOW + 1_005),
        ([(NOW - 5, 1), (NOW, 2)], 4, NOW, NOW),
    ],
)
def test_the_next_start_waits_for_the_period_of_an_earlier_one(starts, count, now, earliest):
    """And a few milliseconds longer; what is over is forgotten."""
    state = LimitState(starts=list(starts))
    assert state.may_start(Rate(count, 1_000), now) == earliest
    assert state.starts == [(moment, number) for moment, number in starts if moment + 1_010 > now]


def test_moments_are_given_away_one_interval_after_the_other():
    """A message that may start soon gets none; the first that may not gets the earliest, and the lag counts."""
    rate, state = Rate(2, 1_000), LimitState()
    assert state.reserve(rate, NOW, 0) is None
    assert (state.last, state.begun, state.lag) == (NOW, NOW, 0)
    state.start(rate, None, NOW, NOW, NOW)
    state.start(rate, None, NOW, NOW, NOW)
    assert state.reserve(rate, NOW, 1_014) == NOW + 1_015
    assert state.reserve(rate, NOW, 1_014) == NOW + 1_515
    assert state.due(rate, NOW + 1_015, NOW) == NOW + 1_015
    state.lag = 20
    assert state.due(rate, NOW + 1_515, NOW) == NOW + 1_535
    assert state.reserve(rate, NOW, 5_000) == NOW + 2_015
    assert state.last == NOW + 2_015


def test_a_message_may_wait_a_little_for_its_start():
    """It is given no moment then, and the next one's is counted from its start."""
    rate, state = Rate(1, 1_000), LimitState(starts=[(NOW, 1)], lag=7)
    assert state.reserve(rate, NOW, 1_010) is None
    assert (state.last, state.begun, state.lag) == (NOW + 1_010, NOW + 1_010, 0)
    late = LimitState(last=NOW - 3, lag=3)
    assert late.reserve(rate, NOW + 5, 0) is None
    assert (late.last, late.begun, late.lag) == (NOW + 5, NOW + 5, 0)
    waiting = LimitState(last=NOW - 3, lag=4)
    assert waiting.reserve(rate, NOW, 0) == NOW + 997


def test_a_message_is_given_a_moment_among_those_that_wait_and_are_late():
    """All of them are later by the same lag, so its moment is earlier by that than its start can be."""
    state = LimitState(starts=[(NOW, 1)], last=NOW - 45, lag=50)
    moment = state.reserve(Rate(1, 1_000), NOW, 0)
    assert (moment, state.due(Rate(1, 1_000), moment, NOW)) == (NOW + 960, NOW + 1_010)
    assert LimitState(last=NOW).reserve(Rate(1, 1_000), NOW, 0) is None


def test_a_message_whose_moment_is_over_starts_now():
    """However late those are that wait."""
    rate, state = Rate(1, 1_000), LimitState(begun=NOW)
    late = LimitState(begun=NOW, lag=100)
    assert [late.due(rate, NOW + later, NOW) for later in (-1, 0, 1)] == [NOW, NOW, NOW + 101]
    assert state.due(rate, NOW, NOW + 5) == NOW + 5
    assert state.due(rate, NOW + 0.5, NOW - 5) == NOW + 1
    state.starts = [(NOW, 1)]
    assert state.due(rate, NOW + 0.5, NOW + 5) == NOW + 1_010


@pytest.mark.parametrize(
    ("count", "latest", "left"),
    [
        (5, 100, [(150, 2), (300, 1)]),
        (5, 150, [(100, 1), (150, 1), (300, 1)]),
        (5, 140, [(100, 1), (150, 2), (300, 1)]),
        (5, 301, [(100, 1), (150, 2), (300, 1)]),
        (65, 140, [(100, 1), (150, 1), (300, 1)]),
        (65, 99, [(100, 1), (150, 2), (300, 1)]),
        (65, 200, [(100, 1), (150, 2), (300, 1)]),
    ],
)
def test_a_start_that_is_not_made_is_withdrawn(count, latest, left):
    """That one and no other; of a high rate the one that it was put together with."""
    state = LimitState(starts=[(100, 1), (150, 2), (300, 1)])
    state.withdraw(Rate(count, 6_400), Start(0, 0, latest))
    assert state.starts == left


def test_a_start_is_noted_as_of_the_latest_moment_at_which_it_may_be_made():
    """A thread has a few milliseconds at least, and one is never noted before another."""
    rate, state = Rate(5, 1_000), LimitState()
    assert state.start(rate, None, NOW, NOW, NOW) == Start(NOW, NOW, NOW + 5)
    assert state.start(rate, None, NOW, NOW, NOW + 20) == Start(NOW, NOW, NOW + 20)
    assert state.start(rate, None, NOW, NOW + 10, NOW + 6) == Start(NOW, NOW + 10, NOW + 20)
    assert state.starts == [(NOW + 5, 1), (NOW + 20, 1), (NOW + 20, 1)]


def test_a_message_that_starts_late_makes_all_that_wait_later():
    """By as much, and not for the little by which the server is always late."""
    rate, state = Rate(5, 1_000), LimitState()
    state.start(rate, NOW, NOW, NOW + 400, NOW)
    assert (state.begun, state.lag, state.starts) == (NOW, 0, [(NOW + 405, 1)])
    state.start(rate, NOW + 1, NOW, NOW + 402, NOW)
    assert (state.begun, state.lag) == (NOW + 1, 401)
    state.start(rate, NOW + 1, NOW, NOW + 9_000, NOW)
    assert (state.begun, state.lag) == (NOW + 1, 401)
    state.start(rate, NOW + 2, NOW, NOW + 803, NOW)
    assert (state.lag, state.starts[-1]) == (401, (NOW + 9_005, 1))
    state.start(rate, NOW + 3, NOW, NOW + 805, NOW)
    assert state.lag == 802


@pytest.mark.parametrize(
    ("count", "period", "moments", "starts"),
    [
        (64, 6_400, (0, 1), [(0, 1), (1, 1)]),
        (65, 6_400, (0, 99), [(99, 2)]),
        (65, 6_400, (0, 100), [(0, 1), (100, 1)]),
        (65, 63, (0, 0), [(0, 1), (0, 1)]),
    ],
)
def test_only_of_a_high_rate_starts_that_are_close_are_kept_as_one(count, period, moments, starts):
    state = LimitState()
    base = NOW - NOW % 100
    for moment in moments:
        state.start(Rate(count, period), None, NOW, base - 100, base + moment)
    assert state.starts == [(base + moment, number) for moment, number in starts]
