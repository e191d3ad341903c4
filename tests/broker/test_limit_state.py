"""The arithmetic of limits: what starts when, without a server."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream.limits import Rate
from dramatiq_jetstream.worker.limit_state import LimitState, Turn

NOW = 1_800_000_000_000

rates = st.builds(Rate, st.integers(1, 300), st.sampled_from([1_000, 10_000, 60_000]))


def run(rate, arrivals, lateness):
    """Start messages that arrive at these times, each of which comes at its moment and so much later."""
    state, starts = LimitState(), []
    events = sorted((NOW + at, number, None) for number, at in enumerate(arrivals))
    late = iter(lateness)
    while events:
        now, number, moment = events.pop(0)
        state = LimitState.decode(state.encode())
        if moment is None:
            moment = state.reserve(rate, now, 0)
        due = state.may_start(rate, now) if moment is None else state.due(rate, moment, now)
        if due <= now:
            state.start(rate, moment, now)
            starts.append((now, number))
        else:
            events.append((due + next(late, 0), number, moment))
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
)
def test_no_period_has_more_starts_than_the_rate(rate, arrivals, lateness):
    """Whenever messages come, and however late they are at their moment; and all of them start."""
    starts = run(rate, arrivals, lateness)
    assert sorted(number for _, number in starts) == list(range(len(arrivals)))
    assert most_within(starts, rate.period) <= rate.count


@given(rates, st.integers(1, 200))
def test_messages_that_come_on_time_start_in_their_order_and_at_the_rate(rate, count):
    """A burst starts first come, first served, and takes as long as the rate says."""
    starts = run(rate, range(count), [])
    assert [number for _, number in starts] == list(range(count))
    periods = max(0, count - rate.count) / rate.count + 1
    assert starts[-1][0] - NOW <= count + periods * (rate.period + 10) + 10


def test_a_fleet_that_was_away_goes_on_in_order():
    """Messages that are all late keep their places and their pace, and the period after that is not fuller."""
    rate = Rate(5, 1_000)
    state = LimitState()
    for _ in range(5):
        state.start(rate, state.reserve(rate, NOW, 0), NOW)
    waiting = [state.reserve(rate, NOW, 0) for _ in range(20)]
    back = NOW + 3_600_000
    state.start(rate, waiting[0], back)
    dues = [state.due(rate, moment, back) for moment in waiting[1:]]
    assert dues == sorted(dues)
    assert [round(later - sooner) for sooner, later in pairwise(dues[5:])] == [200] * 13
    straggler = state.due(rate, waiting[0], back + 10)
    assert straggler == back + 10


def test_of_a_high_rate_a_few_starts_are_kept():
    """The state stays small, whatever the rate; those that are kept as one count as of the latest."""
    rate, state = Rate(1_000, 1_000), LimitState()
    for number in range(900):
        state.start(rate, None, NOW + number)
    assert len(state.starts) <= 65
    assert sum(count for _, count in state.starts) == 900


def test_a_state_is_stored_as_it_is():
    """Turns, places and starts come back; what is empty takes no room."""
    state = LimitState([Turn("a", 5, NOW)], 7, [(NOW, 1)], NOW + 0.5, NOW, 250.25)
    assert LimitState.decode(state.encode()) == state
    assert LimitState().encode() == b"{}"


def test_a_turn_is_its_messages():
    """It is given back once, and a state with a turn does not expire."""
    state = LimitState([Turn("a", 5, NOW)])
    assert state.kept_ms(None, NOW) is None
    assert state.give_back("a")
    assert not state.give_back("a")
    assert state.kept_ms(None, NOW) is not None
