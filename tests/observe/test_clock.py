"""The clock adds up, survives resumes and predicts the end; time is a number that the tests move."""

from __future__ import annotations

import json
import math

import pytest

from vlpjax.observe.clock import Clock


class Time:
    """A time function whose hands the test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def time():
    return Time()


def running_clock(time, **kwargs):
    clock = Clock(now=time, **kwargs)
    clock.start()
    return clock


def test_setup_and_pauses_are_not_training_and_everything_adds_up(time):
    clock = Clock(now=time)
    time.pass_by(5)
    clock.start()
    time.pass_by(10)
    with clock.pause("evaluate"):
        time.pass_by(3)
        with clock.pause("save"):
            time.pass_by(2)
        time.pass_by(1)
    time.pass_by(7)

    assert clock.training_seconds == 17
    assert clock.pauses == {"setup": 5, "evaluate": 4, "save": 2}
    assert clock.program_seconds == 28


def test_a_pause_ends_with_an_exception(time):
    clock = running_clock(time)
    with pytest.raises(RuntimeError), clock.pause("evaluate"):
        time.pass_by(3)
        raise RuntimeError
    time.pass_by(4)
    assert (clock.training_seconds, clock.pauses["evaluate"]) == (4, 3)


def test_waiting_for_input_is_a_part_of_training(time):
    clock = running_clock(time)
    clock.tick(0, 0)
    for step in range(1, 5):
        with clock.wait("input"):
            time.pass_by(1)
        time.pass_by(3)
        clock.tick(step, step * 32)
    assert clock.training_seconds == 16
    assert clock.waits == {"input": 4}
    assert clock.input_wait == 0.25


def test_speed_is_recent_and_ignores_pauses(time):
    clock = running_clock(time, window=10)
    clock.tick(0, 0)
    for step in range(1, 101):
        time.pass_by(4 if step <= 50 else 1)  # A slow first half must be forgotten.
        if step == 95:
            with clock.pause("evaluate"):
                time.pass_by(1000)
        clock.tick(step, step * 64)
    assert clock.examples_per_second == 64
    assert clock.step_seconds == 1


def test_speed_of_steps_longer_than_the_window_is_known(time):
    clock = running_clock(time, window=1)
    for step in range(3):
        clock.tick(step, step * 8)
        time.pass_by(4)
    assert clock.examples_per_second == 2


def test_eta_counts_pauses_that_come_again_but_not_those_paid_once(time):
    clock = Clock(now=time)
    time.pass_by(500)
    clock.start()
    with clock.pause("compile"):
        time.pass_by(60)
    clock.tick(0, 0)
    time.pass_by(10)
    clock.tick(10, 10)
    with clock.pause("evaluate"):
        time.pass_by(5)
    assert clock.eta(10, 30) == 20 * 1.5
    assert clock.eta(30, 30) == 0


def test_nothing_is_claimed_before_the_second_tick(time):
    clock = running_clock(time)
    clock.tick(0, 0)
    assert math.isnan(clock.examples_per_second)
    assert math.isnan(clock.input_wait)
    assert math.isnan(clock.eta(0, 10))


def test_a_resumed_clock_goes_on(time):
    clock = running_clock(time)
    time.pass_by(10)
    with clock.wait():
        time.pass_by(2)
    with clock.pause("save"):
        time.pass_by(1)
        state = json.loads(json.dumps(clock.state()))

    time.pass_by(10_000)  # Between kill and resume nothing counts.
    later = Clock(now=time)
    later.tick(0, 0)
    time.pass_by(4)
    later.restore(state)
    later.tick(10, 320)  # The jump of the totals is not speed.
    later.start()
    time.pass_by(5)
    assert later.training_seconds == 17
    assert later.pauses == {"setup": 4, "save": 1}
    assert later.waits == {"input": 2}
    assert math.isnan(later.examples_per_second)


def test_a_clock_is_made_from_a_state(time):
    state = {"training_seconds": 12.0, "pauses": {"save": 1.0}, "waits": {}}
    clock = Clock.from_state(state, now=time)
    assert clock.state() == state | {"pauses": {"save": 1.0, "setup": 0.0}}
