"""How far a change is enlarged before its worth is measured."""

from __future__ import annotations

import math

import pytest

from fourier_vllm.engine.measure.damage import FACTORS, NATS, _band, _factor

LOW, HIGH = NATS
GOAL = math.sqrt(LOW * HIGH)


@pytest.mark.parametrize("nats", [LOW, GOAL, HIGH])
def test_a_change_that_stands_out_is_left(nats):
    assert _factor(8, nats, NATS) is None


@pytest.mark.parametrize("nats", [LOW / 7, HIGH * 7])
def test_one_step_reaches_the_goal_of_a_quadratic(nats):
    better = _factor(8, nats, NATS)
    assert better is not None
    assert nats * (better / 8) ** 2 == pytest.approx(GOAL)


def test_bounds():
    assert _factor(8, 0, NATS) == FACTORS[1]
    assert _factor(FACTORS[1], 0, NATS) is None
    assert _factor(8, math.inf, NATS) == FACTORS[0]
    assert _factor(FACTORS[0], math.inf, NATS) is None


def test_the_band_rises_with_rounding():
    assert _band(0) == _band(LOW / 4) == NATS
    low, high = _band(LOW)
    assert low == pytest.approx(4 * LOW)
    assert high / low == pytest.approx(HIGH / LOW)
    assert _factor(8, LOW, (low, high)) == pytest.approx(8 * math.sqrt(4 * GOAL / LOW))
