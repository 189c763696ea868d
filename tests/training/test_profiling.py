"""Which steps --profile traces, whatever a trace is."""

import jax
import pytest

from mpt_jax.training.profiling import Profile


@pytest.fixture
def events(monkeypatch):
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda to: found.append(to))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def steps(profile, events, numbers):
    """As the loop makes them: a step is done once the next one is dispatched."""
    before = None
    for number in numbers:
        profile.begin(number)
        events.append(number)
        if before is not None:
            profile.end(before)
        before = number
    profile.end(before)


@pytest.mark.parametrize(
    ("asked", "numbers", "expected"),
    [
        ((2, 3), range(1, 6), [1, "here", 2, 3, 4, "stop", 5]),
        ((2, 2), range(1, 4), [1, "here", 2, 3, "stop"]),
        ((1, 5), range(1, 3), ["here", 1, 2]),  # the run is shorter: close() ends it
        ((2, 4), range(3, 7), ["here", 3, 4, 5, "stop", 6]),  # resumed in between
        ((2, 3), range(7, 9), [7, 8]),  # resumed later
        (None, range(1, 3), [1, 2]),
    ],
)
def test_it_traces_those_that_were_asked_for(events, asked, numbers, expected):
    profile = Profile(asked, "here")
    steps(profile, events, numbers)
    assert events == expected
    open_still = "here" in expected and "stop" not in expected
    profile.close()
    assert events == [*expected, "stop"] if open_still else expected
