"""No plan that anyone draws is faster than a certificate says, wherever its experts stand.

`benchmarks/random_plans.py` draws the plans; run by itself it draws ten times as many.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import moeplan as mp

HOUSE = Path(__file__).parents[2]
SMALL = {"small-4-gpus": 400, "small-8-gpus": 300, "small-two-nodes": 300}
LARGE = {"mixtral-8x22b-128xh100": 10, "qwen3-30b-8xh100": 10}
"""Scenarios, and how many plans are drawn of each."""


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HOUSE / "benchmarks")


def _hold(name: str, count: int, gap: float) -> None:
    from random_plans import drawn

    scenario = mp.load(name)
    bound_s = mp.plan(scenario, gap=gap).lower_bound_s
    for plan in drawn(scenario, count, seed=count):
        assert mp.simulate(scenario, plan).figures.step_s >= bound_s * (1 - 1e-9), plan


@pytest.mark.parametrize("name", SMALL)
def test_no_plan_of_a_small_scenario_is_faster_than_the_certificate(name: str) -> None:
    _hold(name, SMALL[name], gap=0.0)


@pytest.mark.parametrize("name", LARGE)
def test_no_plan_of_a_large_scenario_is_faster_than_the_certificate(name: str) -> None:
    _hold(name, LARGE[name], gap=0.5)
