"""The space of plans is exactly what is legal within the lists, each once, and its stages are cut as they say."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest

import moeplan as mp
from moeplan import menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.partition.legal import problems
from moeplan.partition.ranks import groups, ranks_of_stage
from moeplan.planners import _space
from moeplan.planners._space import Space, layer_flops, splits
from moeplan.simulator.simulate import simulate

AXES = (("tp",), ("cp",), ("ep",), ("etp",), ("edp",), ("cp", "dp"))
NARROW: dict[str, Any] = {
    "choose.cp": [1], "choose.etp": [1], "choose.micro_batch": [1], "choose.recompute": "none",
    "choose.overlap_degree": 1, "choose.arbitration": "fair", "choose.zero_dense": 1, "choose.zero_expert": 1,
    "choose.schedule": "one_f_one_b", "choose.vpp": 1, "choose.tp": [1, 2, 4],
    "choose.rank_order": list(_space.RANK_ORDERS),
}  # fmt: skip
TWO_GPUS = {"cluster.nodes": 1, "choose.tp": [1, 2]}
TINY: dict[str, dict[str, Any]] = {
    "degrees and orders": NARROW | {"choose.cp": [1, 2, 4], "choose.etp": [1, 2, 4], "choose.micro_batch": [1, 2, 4]},
    "orders over nodes": NARROW
    | {"cluster.nodes": 4, "choose.tp": [1, 2], "choose.all_to_all": ["linear", "two_stage"]},
    "schedules and chunks": NARROW
    | TWO_GPUS
    | {"choose.schedule": list(menu.names("schedules")), "choose.vpp": [1, 2, 3, 4, 6, 8]}
    | {"choose.micro_batch": [1, 2, 4]},
    "sharding": NARROW
    | {"choose.zero_dense": [0, 1, 2, 3], "choose.zero_expert": [0, 1, 2, 3]}
    | {"choose.arbitration": ["fair", "fifo", "a2a_first"]}
    | {"choose.schedule": ["gpipe", "dual_pipe"], "choose.vpp": [1, 2]},
    "sharding from stage 2": NARROW
    | {"choose.zero_dense": [3, 2], "choose.zero_expert": [2], "choose.schedule": "gpipe"},
    "overlap and recomputation": NARROW
    | {"choose.overlap_degree": [1, 2, 4], "choose.recompute": ["none", "selective", "full"], "choose.etp": [1, 2]},
}  # fmt: skip
BIG = (
    "mixtral-8x7b-64xh100", "deepseek-v3-2048xh800", "qwen3-235b-256xh100", "llama-3-70b-128xh100",
    "deepseek-v3-decode-128xh800",
)  # fmt: skip


def listed(space: Space) -> list[mp.Plan]:
    return [space.plan(branch, index) for branch in space.branches for index in range(branch.size)]


def layout_of(plan: mp.Plan) -> tuple[bytes, ...]:
    """Which GPUs meet in every group of every stage, and in which order: what a rank order is for."""
    stages = [ranks_of_stage(plan, stage) for stage in range(plan.pp)]
    met = [ranks[groups(plan, axes)] for ranks in stages for axes in AXES]
    return tuple(np.ascontiguousarray(each).tobytes() for each in (*stages, *met))


def every_legal_plan(scenario: mp.Scenario) -> list[mp.Plan]:
    """The product of all fields, filtered by the compiler's rules and by nothing else."""
    c, gpus = scenario.choices, scenario.cluster.num_gpus
    divisors = [number for number in range(1, gpus + 1) if gpus % number == 0]
    found = []
    for tp, cp, pp, ep, etp in product(c.tp, c.cp, c.pp or divisors, c.ep or divisors, c.etp):
        if gpus % (tp * cp * pp):
            continue
        for schedule, vpp in product(c.schedule, c.vpp):
            least, most = menu.load("schedules", schedule, "CHUNKS")
            if vpp < least or (most is not None and vpp > most):
                continue
            virtual = menu.load("schedules", schedule, "num_virtual_stages")(pp, vpp)
            for stages in splits(scenario, virtual) if virtual <= len(scenario.model.all_layers) else ():
                rest = (
                    c.micro_batch, c.rank_order, c.recompute, c.all_to_all or _space.all_to_alls(), c.overlap_degree,
                    c.zero_dense, c.zero_expert, c.arbitration,
                )  # fmt: skip
                for mb, order, recompute, all_to_all, overlap, dense, expert, arbitration in product(*rest):
                    plan = mp.Plan(
                        dp=gpus // (tp * cp * pp), tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, vpp=vpp, stages=stages,
                        schedule=schedule, micro_batch=mb, rank_order=order, recompute=recompute, all_to_all=all_to_all,
                        overlap_degree=overlap, zero_dense=dense, zero_expert=expert, arbitration=arbitration,
                        capacity=c.capacity, precision=c.precision, overlap_gradients=c.overlap_gradients,
                    )  # fmt: skip
                    if next(problems(plan, scenario), None) is None:
                        found.append(plan)
    return found


def first_alike(plan: mp.Plan, scenario: mp.Scenario) -> mp.Plan:
    """The first plan of the lists that cannot be told from `plan`: same groups, nothing sharded over one replica."""
    choices, copies = scenario.choices, menu.load("schedules", plan.schedule, "COPIES")
    changes: dict[str, Any] = {}
    for order in choices.rank_order:
        other = plan.model_copy(update={"rank_order": order})
        if next(problems(other, scenario), None) is None and layout_of(other) == layout_of(plan):
            changes["rank_order"] = order
            break
    replicas = (plan.dp * plan.cp * copies, plan.edp * copies)
    if replicas[0] == 1:
        changes["zero_dense"] = choices.zero_dense[0]
    if replicas[1] == 1:
        changes["zero_expert"] = choices.zero_expert[0]
    if max(replicas) == 1:
        changes["arbitration"] = choices.arbitration[0]
    return plan.model_copy(update=changes)


@cache
def compared(case: str) -> tuple[mp.Scenario, list[mp.Plan], list[mp.Plan]]:
    scenario = mp.load("small-two-nodes", TINY[case])
    return scenario, listed(Space(scenario)), every_legal_plan(scenario)


@pytest.mark.parametrize("case", TINY)
def test_the_space_is_every_legal_plan_but_those_like_an_earlier_one(case: str) -> None:
    scenario, space, legal = compared(case)
    wanted = {first_alike(plan, scenario) for plan in legal}
    assert set(space) - wanted == set()
    assert wanted - set(space) == set()


@pytest.mark.parametrize("case", TINY)
def test_no_plan_stands_in_the_space_twice(case: str) -> None:
    scenario, space, _ = compared(case)
    assert [plan for plan, count in Counter(space).items() if count > 1] == []
    assert Space(scenario).size == len(space)


@pytest.mark.parametrize("case", ["degrees and orders", "orders over nodes", "sharding"])
def test_a_plan_that_is_left_out_takes_as_long_as_the_one_it_is_like(case: str) -> None:
    scenario, space, legal = compared(case)
    left_out = [plan for plan in legal if plan not in set(space)]
    for plan in random.Random(3).sample(left_out, min(10, len(left_out))):
        both = [compile_plan(each, scenario) for each in (plan, first_alike(plan, scenario))]
        step_s, like_s = (simulate(each, CostModel(gpu=scenario.cluster.gpu)).step_s for each in both)
        assert step_s == pytest.approx(like_s, rel=1e-9), plan


@pytest.mark.parametrize("name", BIG)
def test_plans_drawn_from_a_big_scenario_are_legal(name: str) -> None:
    scenario = mp.load(name)
    space, rng = Space(scenario), random.Random(11)
    for _ in range(200):
        branch = rng.choice(space.branches)
        plan = space.plan(branch, rng.randrange(branch.size))
        assert list(problems(plan, scenario)) == [], plan


def test_plans_of_one_branch_are_numbered_in_the_order_of_its_lists() -> None:
    space = Space(mp.load("small-two-nodes"))
    branch = max(space.branches, key=lambda each: each.size)
    names = ("micro_batch", "recompute", "all_to_all", "overlap_degree", "zero_dense", "zero_expert", "arbitration")
    plans = [space.plan(branch, index) for index in range(branch.size)]
    assert [tuple(getattr(plan, name) for name in names) for plan in plans] == list(product(*branch.lists))


# stages


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 16, 27])
def test_stages_hold_every_layer_and_none_is_empty(name: str, parts: int) -> None:
    scenario = mp.load(name)
    found = splits(scenario, parts)
    assert 1 <= len(found) <= 2
    for stages in found:
        assert len(stages) == parts
        assert sum(stages) == len(scenario.model.all_layers)
        assert min(stages) >= 1
    assert max(found[-1]) - min(found[-1]) <= 1


def largest(flops: tuple[int, ...], stages: tuple[int, ...]) -> float:
    starts = np.cumsum((0, *stages))
    return max(sum(flops[a:b]) for a, b in pairwise(starts))


def cuts(layers: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to cut `layers` into `parts` that are not empty."""
    places = [(0, *inner, layers) for inner in combinations(range(1, layers), parts - 1)]
    return [tuple(b - a for a, b in pairwise(each)) for each in places]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "llama-4-scout", "pr-moe-350m", "nllb-54b", "olmoe-1b-7b"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_first_split_has_the_smallest_largest_stage_of_all(name: str, parts: int) -> None:
    scenario = mp.load("small-two-nodes", {"model": name})
    model, workload = scenario.model, scenario.workload
    flops = layer_flops(model, workload.sequence, train_mtp=workload.train_mtp)
    best = min(largest(flops, stages) for stages in cuts(len(flops), parts))
    assert largest(flops, splits(scenario, parts)[0]) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_any_costs_are_cut_as_well_as_by_trying_all(seed: int) -> None:
    rng = random.Random(seed)
    costs = tuple(rng.choice((1, rng.randrange(1, 50), 1000)) for _ in range(rng.randrange(3, 11)))
    parts = rng.randrange(1, len(costs) + 1)
    best = min(largest(costs, stages) for stages in cuts(len(costs), parts))
    assert largest(costs, _space._balanced(costs, parts)) == best


def test_the_ends_of_the_model_count_in_the_flop_of_their_layers() -> None:
    scenario = mp.load("deepseek-v3-2048xh800")
    sequence = scenario.workload.sequence
    with_mtp, without = (layer_flops(scenario.model, sequence, train_mtp=each) for each in (True, False))
    assert with_mtp[:-1] == without[:-1]
    assert with_mtp[-1] > without[-1] > without[-2]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_serving_has_one_schedule_and_nothing_that_only_training_has(phase: str) -> None:
    scenario = mp.load("mixtral-8x7b-prefill-8xh100", {"workload.phase": phase, "choose.pp": [1, 2, 4]})
    plans = listed(Space(scenario))
    assert {plan.pp for plan in plans} == {1, 2, 4}
    fixed = {(plan.schedule, plan.vpp, plan.recompute, plan.zero_dense, plan.zero_expert) for plan in plans}
    assert fixed == {("gpipe", 1, "none", 0, 0)}
    assert len(set(plans)) == len(plans)
    assert all(next(problems(plan, scenario), None) is None for plan in plans)
