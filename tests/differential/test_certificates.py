"""Certificates against brute force: the optimum is the least of all plans, and no bound is above a simulated step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import moeplan as mp
from moeplan import menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.placement import Placement
from moeplan.partition import footprint
from moeplan.planners._bounds import Bounds
from moeplan.planners._space import Branch, Space
from moeplan.planners._step import StepBounds
from moeplan.simulator.simulate import simulate

ROUNDING = 1e-9
SMALL = ("small-4-gpus", "small-8-gpus", "small-two-nodes")
MOST_TASKS = 12_000
"""Of a plan drawn at random: what is larger takes long to simulate and says no more."""

FP16 = dict.fromkeys(("compute", "weights", "activations", "dispatch", "combine", "cache"), "fp16")
WIDE: dict[str, Any] = {
    "choose.tp": [1, 2, 4], "choose.cp": [1, 2], "choose.etp": [1, 2], "choose.micro_batch": [1, 2, 4],
    "choose.rank_order": ["tp-cp-ep-dp-pp", "tp-cp-dp-ep-pp", "tp-cp-ep-pp-dp"], "choose.overlap_degree": [1, 2, 4],
    "choose.schedule": ["gpipe", "one_f_one_b", "interleaved", "zero_bubble", "zbv", "dual_pipe"],
    "choose.arbitration": ["fair", "fifo", "a2a_first"], "choose.recompute": ["none", "selective", "full"],
    "choose.zero_dense": [0, 1, 2, 3], "choose.zero_expert": [0, 1, 2, 3], "choose.vpp": [1, 2, 4],
}  # fmt: skip
MIXTRAL = {"cluster.nodes": 2, "workload.global_batch": 32, "workload.sequence": 1024}
DEEPSEEK = {"cluster.nodes": 2, "workload.global_batch": 16, "workload.sequence": 512}
FEW = {"workload.sequence": 64}
COPIES = {"choose.all_to_all": ["node_dedup", "tp_coordinated"], "choose.rank_order": "tp-cp-dp-ep-pp"}
"""Each token goes to a node once; experts are far apart, so that there are several nodes."""
ALL_TO_ALLS = {
    "choose.all_to_all": [
        name for name in menu.names("collectives") if "all_to_all" in menu.module("collectives", name).OPERATIONS
    ]
}


def beside(compute: str, exchange: str) -> dict[str, str]:
    """What kernels and exchanges of one GPU leave each other."""
    gpu = "cluster.gpu"
    return {f"{gpu}.compute_share_beside_exchange": compute, f"{gpu}.exchange_share_beside_compute": exchange}


TORUS = {"extends": "tpu-v4-torus", "nodes": 4, "fabric": {"shape": [4, 2, 2]}}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "balanced": ("mixtral-8x7b-64xh100", MIXTRAL, 10),
    "skewed": ("mixtral-8x7b-64xh100", MIXTRAL | {"routing.skew": 0.9}, 8),
    "drawn": ("mixtral-8x7b-64xh100", MIXTRAL | {"cluster.nodes": 1, "routing.router": "multinomial"}, 6),
    "dropped": (
        "mixtral-8x7b-64xh100",
        MIXTRAL | {"routing.skew": 0.9, "choose.capacity": {"rule": "drop", "factor": 1.1}},
        6,
    ),
    "padded": (
        "mixtral-8x7b-64xh100",
        MIXTRAL | {"routing.skew": 0.9, "choose.capacity": {"rule": "pad", "factor": 1.25}},
        6,
    ),
    "gradients-in-the-open": ("mixtral-8x7b-64xh100", MIXTRAL | {"choose.overlap_gradients": False}, 6),
    "fat-tree": ("mixtral-8x7b-64xh100", {**MIXTRAL, "cluster": "hgx-h100-fat-tree", "cluster.nodes": 2}, 8),
    "prediction": ("deepseek-v3-2048xh800", DEEPSEEK, 4),
    "prediction-in-two-directions": ("deepseek-v3-2048xh800", DEEPSEEK | {"choose.schedule": "dual_pipe"}, 4),
    "prediction-skewed": ("deepseek-v3-2048xh800", {**DEEPSEEK, "cluster.nodes": 1, "routing.skew": 0.8}, 3),
    "sockets": ("fastermoe-johnny-16xv100", {"workload.global_batch": 32, "choose.pp": [1, 2, 4]}, 8),
    "drifting": ("smartmoe-inky-16xa100", {"workload.global_batch": 64, "choose.zero_dense": [0, 1, 2, 3]}, 6),
    "torus": ("small-8-gpus", WIDE | FEW | {"cluster": TORUS}, 12),
    "cube-mesh": (
        "small-two-nodes",
        WIDE | FEW | {"cluster": {"extends": "p3.16xlarge", "nodes": 1}, "choose.precision": FP16},
        12,
    ),
    "wide": ("small-two-nodes", WIDE, 24),
    "padded-to-the-most": ("small-8-gpus", WIDE | FEW | {"choose.capacity": {"rule": "pad_to_max"}}, 10),
    "fewer-tokens-than-experts": ("small-two-nodes", WIDE | FEW | {"model": "switch-base-128"}, 12),
    "layers-of-two-sizes": ("small-two-nodes", WIDE | FEW | {"model": "pr-moe-350m", "routing.skew": 0.7}, 8),
    "encoder-and-decoder": ("small-two-nodes", WIDE | FEW | {"model": "nllb-54b"}, 6),
    "states-instead-of-attention": ("small-two-nodes", WIDE | FEW | {"model": "nemotron-3-super"}, 5),
    "hyper-connections": ("small-two-nodes", WIDE | FEW | {"model": "deepseek-v4-flash"}, 5),
    "prefill": ("mixtral-8x7b-prefill-8xh100", {"choose.pp": [1, 2, 4], "workload.global_batch": 16}, 8),
    "decode": ("deepseek-v3-decode-128xh800", {"nodes": 1, "workload.global_batch": 32, "choose.pp": [1, 2]}, 4),
    "one-copy-to-a-node": ("mixtral-8x7b-64xh100", MIXTRAL | COPIES, 6),
    "one-copy-to-a-node-skewed": ("mixtral-8x7b-64xh100", MIXTRAL | COPIES | {"routing.skew": 0.9}, 6),
    "one-copy-to-a-node-drawn": ("mixtral-8x7b-64xh100", MIXTRAL | COPIES | {"routing.router": "multinomial"}, 4),
    "one-copy-to-a-node-dropped": (
        "mixtral-8x7b-64xh100",
        MIXTRAL | COPIES | {"routing.skew": 0.9, "choose.capacity": {"rule": "drop", "factor": 1.1}},
        4,
    ),
    "one-copy-to-a-node-of-a-group": ("deepseek-v3-2048xh800", DEEPSEEK | COPIES, 3),
    "every-all-to-all": ("small-two-nodes", WIDE | ALL_TO_ALLS, 24),
    "every-all-to-all-skewed": (
        "small-two-nodes",
        WIDE | FEW | ALL_TO_ALLS | {"cluster.nodes": 4, "routing.skew": 0.9},
        24,
    ),
    "every-all-to-all-on-a-torus": ("small-8-gpus", WIDE | FEW | ALL_TO_ALLS | {"cluster": TORUS}, 12),
    "in-each-others-way": ("small-two-nodes", WIDE | beside("60 %", "50 %"), 24),
    "one-or-the-other": ("small-two-nodes", WIDE | beside("30 %", "40 %"), 24),
    "parts-in-each-others-way": (
        "mixtral-8x7b-64xh100",
        MIXTRAL | beside("70 %", "60 %") | {"choose.overlap_degree": [2, 4]},
        8,
    ),
    "two-directions-in-each-others-way": (
        "deepseek-v3-2048xh800",
        DEEPSEEK | COPIES | beside("60 %", "90 %") | {"choose.schedule": "dual_pipe"},
        4,
    ),
    "skewed-in-each-others-way": ("small-two-nodes", WIDE | FEW | beside("60 %", "50 %") | {"routing.skew": 0.9}, 12),
    "dense": ("llama-3-70b-128xh100", {"nodes": 2, "workload.global_batch": 32, "workload.sequence": 1024}, 6),
}
PLACED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "even": ("small-two-nodes", WIDE | FEW | {"choose.ep": 2}, 6, 8),
    "skewed": ("small-two-nodes", WIDE | FEW | {"choose.ep": 4, "routing.skew": 0.9}, 3, 12),
    "drawn": ("small-two-nodes", WIDE | FEW | {"choose.ep": 4, "routing.router": "multinomial"}, 5, 8),
    "every-all-to-all": (
        "small-two-nodes",
        WIDE | FEW | ALL_TO_ALLS | {"cluster.nodes": 4, "routing.skew": 0.9, "choose.ep": 8},
        2,
        12,
    ),
    "prediction": ("deepseek-v3-2048xh800", {**DEEPSEEK, "cluster.nodes": 1, "choose.ep": 8}, 36, 2),
    "decode": ("deepseek-v3-decode-128xh800", {"nodes": 1, "workload.global_batch": 32, "choose.ep": 8}, 40, 2),
}
"""Scenario, changes, slots of a place, and how many plans are drawn of it; experts and empty slots stand anywhere."""
"""Scenario, changes that make it small, and how many plans are drawn of it."""


def bounds_of(steps: StepBounds, branch: Branch) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The bound of every plan of a branch, in the order of its numbers."""
    found = steps.branch_s(branch)[..., None]
    return np.broadcast_to(found, (*found.shape[:-1], len(branch.arbitration))).ravel()


def simulated_s(plan: mp.Plan, scenario: mp.Scenario) -> float:
    return simulate(compile_plan(plan, scenario), CostModel(gpu=scenario.cluster.gpu)).step_s


@cache
def everything(name: str) -> tuple[tuple[mp.Plan, float, float, float], ...]:
    """Every plan of a scenario with the bound of its branch, its own bound and its simulated seconds."""
    scenario = mp.load(name)
    space, steps = Space(scenario), StepBounds(Bounds(scenario))
    found = []
    for branch in space.branches:
        for index, bound_s in enumerate(bounds_of(steps, branch).tolist()):
            plan = space.plan(branch, index)
            found.append((plan, bound_s, steps.plan_s(plan), simulated_s(plan, scenario)))
    return tuple(found)


@pytest.mark.parametrize("name", SMALL)
def test_the_certified_optimum_is_the_least_of_all_plans_that_fit(name: str) -> None:
    scenario, result = mp.load(name), mp.plan(name, planner="exhaustive", gap=0.0)
    steps_s = [each[3] for each in everything(name) if footprint.filled_share(each[0], scenario) <= 1]
    assert len(everything(name)) == result.evaluated.legal
    assert result.step_s == min(steps_s)
    assert result.lower_bound_s == pytest.approx(min(steps_s), rel=ROUNDING)
    assert result.gap <= ROUNDING


@pytest.mark.parametrize("name", SMALL)
def test_no_bound_of_any_plan_is_above_its_simulated_step(name: str) -> None:
    for plan, branch_s, plan_s, step_s in everything(name):
        assert branch_s <= step_s * (1 + ROUNDING), plan
        assert plan_s <= step_s * (1 + ROUNDING), plan


@pytest.mark.parametrize("name", SMALL)
def test_no_coarse_bound_of_any_plan_is_above_its_simulated_step(name: str) -> None:
    space = Space(mp.load(name))
    coarse = StepBounds(Bounds(space.scenario, coarse=True, replicas=False))
    bounds = [bound_s for branch in space.branches for bound_s in bounds_of(coarse, branch).tolist()]
    for bound_s, (plan, _, _, step_s) in zip(bounds, everything(name), strict=True):
        assert bound_s <= step_s * (1 + ROUNDING), plan


@pytest.mark.parametrize("name", SMALL)
def test_the_bound_before_a_branch_is_opened_is_below_those_of_its_plans(name: str) -> None:
    space = Space(mp.load(name))
    steps = StepBounds(Bounds(space.scenario))
    for branch in space.branches:
        assert steps.bounds.pipeline_s(branch).min() <= bounds_of(steps, branch).min() * (1 + ROUNDING)


def placement_of(scenario: mp.Scenario, per_place: int) -> Placement:
    """Each expert once, the next places' experts again as far as there is room, places shuffled in each layer."""
    assert scenario.choices.ep is not None
    (ep,), layers = scenario.choices.ep, [layer.experts for layer in scenario.model.all_layers if layer.experts]
    rng = random.Random(20)
    table = []
    for experts in layers:
        own = [list(range(experts.num_experts))[place::ep] for place in range(ep)]
        rows = [(held + own[(place + 1) % ep])[: per_place - (place == 0)] for place, held in enumerate(own)]
        rows = [row + [-1] * (per_place - len(row)) for row in rows]
        rng.shuffle(rows)
        table.append(tuple(expert for row in rows for expert in row))
    return Placement(experts=tuple(table))


def drawn(
    scenario: mp.Scenario, space: Space, count: int, *, placement: Placement | None = None
) -> Iterator[tuple[mp.Plan, Branch, int, float]]:
    """Plans with few micro-batches and few tasks: plan, branch, number and simulated seconds."""
    rng, given = random.Random(20), 0
    while given < count:
        branch = rng.choice(space.branches)
        index = rng.randrange(branch.size)
        plan = space.plan(branch, index).model_copy(update={"placement": placement})
        if plan.num_microbatches(scenario.workload.global_batch) > 16:
            continue
        program = compile_plan(plan, scenario)
        if len(program.tasks.lane_T) <= MOST_TASKS:
            given += 1
            yield plan, branch, index, simulate(program, CostModel(gpu=scenario.cluster.gpu)).step_s


@pytest.mark.parametrize("case", CASES)
def test_no_bound_of_a_plan_drawn_at_random_is_above_its_simulated_step(case: str) -> None:
    name, changes, count = CASES[case]
    _check_bounds(mp.load(name, changes), count)


@pytest.mark.parametrize("case", PLACED)
def test_no_bound_of_a_plan_with_a_placement_is_above_its_simulated_step(case: str) -> None:
    name, changes, per_place, count = PLACED[case]
    scenario = mp.load(name, changes)
    _check_bounds(scenario, count, placement=placement_of(scenario, per_place))


def _check_bounds(scenario: mp.Scenario, count: int, *, placement: Placement | None = None) -> None:
    """Those of this placement, and those of any placement, with replicas if this one has some."""
    space = Space(scenario)
    every = [Bounds(scenario, placement=placement), Bounds(scenario, coarse=True, replicas=placement is not None)]
    for plan, branch, index, step_s in drawn(scenario, space, count, placement=placement):
        for steps in map(StepBounds, every):
            assert steps.bounds.floor_s(branch) <= step_s * (1 + ROUNDING), plan
            assert steps.bounds.pipeline_s(branch).min() <= step_s * (1 + ROUNDING), plan
            assert bounds_of(steps, branch)[index] <= step_s * (1 + ROUNDING), plan
            assert steps.plan_s(plan) <= step_s * (1 + ROUNDING), plan


# plans that once broke a bound, the compiler or the simulator

LITTLE = {"workload.global_batch": 16, "choose.overlap_degree": [1, 2], "choose.schedule": "zero_bubble"}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "what evens out many tokens leaves few uneven": (
        LITTLE
        | {"workload.sequence": 4, "routing.router": "hot_experts", "routing.seed": 346, "routing.share": 0.4}
        | {"choose.capacity": {"rule": "drop", "factor": 0.5}},
        {"dp": 2, "pp": 2, "ep": 2, "stages": (2, 2), "zero_dense": 0, "zero_expert": 0, "overlap_degree": 2},
    ),
    "drawn tokens are fewer than evened out": (
        LITTLE
        | {"workload.sequence": 2, "routing.router": "multinomial", "routing.seed": 415}
        | {"choose.capacity": {"rule": "drop", "factor": 0.5}},
        {"dp": 2, "pp": 2, "ep": 2, "stages": (2, 2), "zero_dense": 0, "zero_expert": 0, "overlap_degree": 2},
    ),
    "an exchange of nothing takes its latency": (
        LITTLE | {"workload.sequence": 8, "choose.etp": 2, "choose.capacity": {"rule": "drop", "factor": 0.5}},
        {"dp": 2, "tp": 2, "ep": 2, "etp": 2, "stages": (4,), "overlap_degree": 4, "schedule": "gpipe"},
    ),
    "all tokens stay where they are": (
        LITTLE
        | {"workload.sequence": 1, "routing.router": "multinomial", "routing.seed": 3}
        | {"choose.capacity": {"rule": "drop", "factor": 0.5}},
        {"dp": 4, "ep": 2, "stages": (4,), "zero_dense": 0, "zero_expert": 0, "schedule": "gpipe"},
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_no_bound_is_above_what_once_was_simulated_faster(case: str) -> None:
    changes, options = BROKEN[case]
    scenario = mp.load("small-two-nodes", changes)
    given = {"schedule": "zero_bubble", "capacity": scenario.choices.capacity, **options}
    plan = mp.Plan(**given)
    assert StepBounds(Bounds(scenario)).plan_s(plan) <= simulated_s(plan, scenario) * (1 + ROUNDING)


def test_a_plan_without_any_exchange_is_simulated() -> None:
    scenario = mp.load("small-4-gpus", {"cluster.gpus_per_node": 1, "cluster.nic.per_node": 1})
    plan = mp.Plan(dp=1, stages=(4,))
    assert 0 < StepBounds(Bounds(scenario)).plan_s(plan) <= simulated_s(plan, scenario) * (1 + ROUNDING)


def test_a_place_that_is_done_sooner_begins_its_shared_branch_sooner() -> None:
    scenario = mp.load("deepseek-v3-decode-128xh800", {"nodes": 2, "workload.global_batch": 64})
    plan = mp.Plan(
        dp=16, ep=16, stages=(61,), zero_dense=0, zero_expert=0, micro_batch=4, schedule="gpipe",
        precision=scenario.choices.precision,
    )  # fmt: skip
    assert StepBounds(Bounds(scenario)).plan_s(plan) <= simulated_s(plan, scenario) * (1 + ROUNDING)
