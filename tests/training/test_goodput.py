import json

import pytest

from mpt_jax.training.goodput import Goodput, read_report


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def run(clock, goodput, *, startup=10, compiled=0, steps=0, data=0, save=0):
    clock.now += startup
    with goodput.spend("compile"):
        clock.now += compiled
    goodput.started()
    clock.now += steps
    with goodput.spend("data"):
        clock.now += data
    with goodput.spend("checkpoint"):
        clock.now += save
    return goodput.state()


def test_time_goes_to_what_it_was_spent_on(clock):
    goodput = Goodput(clock)
    state = run(clock, goodput, compiled=20, steps=55, data=10, save=5)
    assert state["seconds"] == {
        "productive": 55, "startup": 10, "compile": 20, "data": 10, "checkpoint": 5,
        "evaluation": 0, "lost": 0,
    }  # fmt: skip
    assert goodput.share() == 0.55
    assert goodput.describe() == (
        "goodput 55.0% of 0:01:40, 0 restarts: startup 10.0%, compile 20.0%, data "
        "10.0%, checkpoint 5.0%"
    )


def test_what_is_nested_counts_once(clock):
    goodput = Goodput(clock)
    goodput.started()
    with goodput.spend("checkpoint"):
        clock.now += 1
        with goodput.spend("data"):
            clock.now += 2
        clock.now += 4
    seconds = goodput.state()["seconds"]
    assert (seconds["checkpoint"], seconds["data"], seconds["productive"]) == (5, 2, 0)


def test_a_kill_loses_all_since_the_save(clock):
    first = Goodput(clock)
    saved = json.loads(json.dumps(run(clock, first, steps=90)))
    clock.now += 30  # of steps after the save, killed
    clock.now += 20  # until it is started again
    second = Goodput(clock)
    second.restore(saved, report=None)
    state = run(clock, second, steps=50)
    assert state["restarts"] == 1
    assert state["seconds"]["lost"] == 50
    assert state["seconds"]["productive"] == 140
    assert sum(state["seconds"].values()) == 10 + 90 + 50 + 10 + 50  # no second twice


def test_after_an_orderly_end_nothing_is_lost(clock, tmp_path):
    path = tmp_path / "goodput.json"
    assert read_report(path) is None
    first = Goodput(clock)
    saved = run(clock, first, steps=90)
    clock.now += 3  # the rest of the save
    first.write(path)
    assert json.loads(path.read_text())["goodput"] == pytest.approx(93 / 103)
    clock.now += 10**6
    second = Goodput(clock)
    second.restore(saved, report=read_report(path))
    seconds = second.state()["seconds"]
    assert (seconds["lost"], seconds["productive"]) == (0, 93)
    # Of a run that was killed after another one's orderly end, it says nothing.
    third = Goodput(clock)
    third.restore({**saved, "time": clock.now - 7}, report=read_report(path))
    seconds = third.state()["seconds"]
    assert (seconds["lost"], seconds["productive"]) == (7, 90)


def test_a_damaged_report_is_none(tmp_path):
    (tmp_path / "goodput.json").write_text("{")
    assert read_report(tmp_path / "goodput.json") is None
