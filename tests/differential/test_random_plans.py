"""No plan that anyone draws is faster than a certificate says, wherever its experts stand.

Axes of arrays: E expert, C slot of an expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import moeplan as mp
from moeplan.domain.placement import EMPTY, Placement
from moeplan.partition.footprint import filled_share
from moeplan.partition.legal import problems
from moeplan.planners._space import Space

SMALL = {"small-4-gpus": 400, "small-8-gpus": 300, "small-two-nodes": 300}
LARGE = {"mixtral-8x22b-128xh100": 10, "qwen3-30b-8xh100": 10}
"""Scenarios, and how many plans are drawn of each."""
MOST_MICROBATCHES = 32
"""Of a plan of a large scenario: what has more takes long to simulate."""


def random_placement(rng: np.random.Generator, scenario: mp.Scenario, ep: int) -> Placement:
    """In each layer every expert once, more of them in slots that are left, some slots empty; shares at random."""
    counts = [layer.experts.num_experts for layer in scenario.model.all_layers if layer.experts]
    per_place = max(counts) // ep + int(rng.integers(0, 3))
    rows = [_random_row(rng, count, ep, per_place) for count in counts]
    shares = [_random_shares(rng, row) for row in rows] if rng.random() < 0.5 else None
    return Placement(experts=tuple(map(tuple, rows)), shares=shares and tuple(map(tuple, shares)))


def _random_row(rng: np.random.Generator, num_experts: int, ep: int, per_place: int) -> list[int]:
    """No expert twice on a place."""
    places: list[list[int]] = [[] for _ in range(ep)]
    for expert in rng.permutation(num_experts).tolist():
        free = [held for held in places if len(held) < per_place]
        free[int(rng.integers(len(free)))].append(expert)
    for held in places:
        others = [expert for expert in rng.permutation(num_experts).tolist() if expert not in held]
        held += others[: int(rng.integers(0, per_place - len(held) + 1))]
    return [expert for held in places for expert in held + [EMPTY] * (per_place - len(held))]


def _random_shares(rng: np.random.Generator, row: list[int]) -> list[float]:
    expert_C = np.array(row)
    weight_C = np.where(expert_C == EMPTY, 0.0, rng.uniform(0, 1, expert_C.size))
    sum_E = np.bincount(expert_C + 1, weights=weight_C)
    return (weight_C / np.where(sum_E > 0, sum_E, 1.0)[expert_C + 1]).tolist()


def drawn(scenario: mp.Scenario, count: int, seed: int) -> Iterator[mp.Plan]:
    """Plans of the space that fit, in blocks or placed at random."""
    rng, space, given = np.random.default_rng(seed), Space(scenario), 0
    while given < count:
        branch = space.branches[int(rng.integers(len(space.branches)))]
        plan = space.plan(branch, int(rng.integers(branch.size)))
        if plan.ep > 1 and rng.random() < 0.7:
            plan = plan.model_copy(update={"placement": random_placement(rng, scenario, plan.ep)})
        few = plan.num_microbatches(scenario.workload.global_batch) <= MOST_MICROBATCHES
        if few and next(problems(plan, scenario), None) is None and filled_share(plan, scenario) <= 1:
            given += 1
            yield plan


def _hold(name: str, count: int, gap: float) -> None:
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
