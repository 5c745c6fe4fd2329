"""Lina decides as published: micro-ops of 30 MB, experts packed until they outlast them, popular ones on many GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplan as mp
from moeplan.domain.placement import EMPTY
from moeplan.partition.footprint import filled_share
from moeplan.planners import lina
from moeplan.planners._published import is_runnable, plainest
from moeplan.planners._search import Search
from moeplan.planners._space import Space

EVEN = {"routing.router": "balanced"}
SKEWED = {"routing.router": "zipf", "routing.skew": 0.8}
TOKENS_BYTES = 16 * 1024 * 2 * 768 * 2
"""What a GPU of the testbed sends with 16 sequences: two copies of each token, two bytes for each of 768 numbers."""


def on_testbed(**changes: Any) -> tuple[Search, mp.Plan]:
    """GPT-2 with 16 experts on 4 machines of 4 A100, searched, and what its framework runs by default."""
    scenario = mp.load("lina-16xa100", EVEN | {"choose.micro_batch": 16} | changes)
    search = Search(Space(scenario), gap=None, time_limit_s=None, progress=None)
    return search, plainest(search)


def step_s(scenario: mp.Scenario, plan: mp.Plan) -> float:
    return mp.simulate(scenario, plan).figures.step_s


# ---- packing


@pytest.mark.parametrize(
    ("timed", "ep"),
    [
        ([(8.0, 2.0), (4.0, 2.0), (2.0, 2.0), (1.0, 2.0)], 4),
        ([(8.0, 2.0), (4.0, 2.5), (2.4, 3.0), (1.0, 4.0)], 4),
        ([(1.0, 2.0), (0.5, 2.0)], 16),
        ([(8.0, 2.0), (7.0, 2.0)], 8),
    ],
)
def test_experts_are_packed_until_they_take_as_long_as_their_exchange_and_no_further(
    timed: list[tuple[float, float]], ep: int
) -> None:
    plans = [mp.Plan(dp=16, ep=16 >> doubled, stages=(12,)) for doubled in range(len(timed))]
    asked: list[int] = []

    def micro_ops(plan: mp.Plan) -> lina.MicroOps:
        asked.append(plan.ep)
        return lina.MicroOps(*timed[len(asked) - 1])

    found = lina.enough(plans, micro_ops)
    assert found is not None
    assert found.ep == asked[-1] == ep
    assert lina.enough([], micro_ops) is None


def test_micro_ops_take_what_network_cards_and_kernels_take() -> None:
    """Of four GPUs, 12 of 16 parts, then 4 of 8, go through a card of 100 Gbit/s; of four experts none do."""
    search, plain = on_testbed()
    timed = {plan.ep: lina.micro_ops(search.exact.bounds, plan) for plan in lina.packings(search, plain)}
    start_s = search.scenario.cluster.gpu.exchange_start_s
    card, nvlink, part = 0.93 * 12.5e9, 0.8 * 100e9, TOKENS_BYTES / 2
    assert timed[16].sent_s == pytest.approx(4 * 3 / 4 * part / card, rel=0.02)
    assert timed[8].sent_s == pytest.approx(4 * 1 / 2 * part / card, rel=0.02)
    assert timed[4].sent_s == pytest.approx(start_s + 1 / 4 * part / nvlink, rel=0.1)
    assert timed[1].sent_s == 0
    least_s = 2 * 2 * 768 * 3072 * 16 * 1024 / (0.7 * 312e12)
    for ep in (16, 8, 4, 2):
        assert least_s < timed[ep].computed_s < 1.5 * least_s


def test_on_its_testbed_lina_packs_until_no_token_leaves_its_machine() -> None:
    search, plain = on_testbed()
    found = lina.packed(search, plain)
    assert (plain.ep, found.ep, found.edp) == (16, 4, 4)
    assert (found.arbitration, found.overlap_degree) == ("a2a_first", 2)
    open_to_all = {name: getattr(found, name) for name in ("ep", "zero_expert", "arbitration", "overlap_degree")}
    assert plain.model_copy(update=open_to_all) == found


def test_packing_ends_where_it_does_not_fit() -> None:
    changes = {"choose.zero_expert": 0, "choose.micro_batch": 4, "choose.recompute": "none"}
    search, plain = on_testbed(**changes, **{"cluster.gpu.memory": "8 GB"})
    assert [plan.ep for plan in lina.packings(search, plain)] == [16, 8]
    assert lina.packed(search, plain).ep == 8
    assert not is_runnable(plain.model_copy(update={"ep": 4}), search.scenario)
    roomy, plain = on_testbed(**changes)
    assert lina.packed(roomy, plain).ep == 4


def test_room_is_not_made_by_more_zero_than_the_dense_part_has() -> None:
    tight = {"choose.micro_batch": 4, "choose.recompute": "none", "cluster.gpu.memory": "8 GB"}
    for stage, packings in ((0, 2), (1, 4)):
        search, plain = on_testbed(**tight, **{"choose.zero_dense": stage})
        found = list(lina.packings(search, plain))
        assert len(found) == packings
        assert max(plan.zero_expert for plan in found) == stage


def test_packing_ends_where_the_scenario_allows_no_more() -> None:
    assert lina.packed(*on_testbed(**{"choose.ep": [16, 8, 2]})).ep == 8


def test_without_room_for_micro_ops_the_plan_is_the_frameworks() -> None:
    fixed = {"choose.recompute": "none", "choose.zero_dense": 1}
    search, plain = on_testbed(**fixed)
    cut = plain.model_copy(update={"overlap_degree": 2})
    shares = [filled_share(plan, search.scenario) for plan in (plain, cut)]
    assert shares[0] < shares[1]
    search, tight = on_testbed(**fixed, **{"cluster.gpu.memory": f"{40 * sum(shares) / 2:.6f} GB"})
    assert tight == plain
    assert lina.packed(search, tight) == tight


# ---- micro-ops


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"choose.micro_batch": 1}, 1),
        ({"choose.micro_batch": 8}, 1),
        ({"choose.micro_batch": 16}, 2),
        ({"choose.micro_batch": 16, "choose.precision.combine": "fp32"}, 4),
        ({"choose.micro_batch": 16, "model.hidden_size": 768 * 2}, 4),
        ({"choose.overlap_degree": [1, 3]}, 3),
        ({"choose.overlap_degree": [8, 4]}, 4),
        ({"choose.overlap_degree": 1}, 1),
    ],
)
def test_no_micro_op_is_over_30_megabytes_unless_the_scenario_says_so(changes: dict[str, Any], count: int) -> None:
    search, plain = on_testbed(**changes)
    assert lina.num_micro_ops(search.exact.bounds, plain) == count


# ---- what it is worth


def test_each_of_linas_measures_shortens_the_step_of_its_testbed() -> None:
    search, plain = on_testbed(**{"routing.router": "multinomial"})

    def steps() -> Iterator[mp.Plan]:
        yield (now := plain.model_copy(update={"all_to_all": "two_stage"}))
        yield (now := now.model_copy(update={"arbitration": "a2a_first"}))
        yield (now := now.model_copy(update={"overlap_degree": 2}))
        yield (now := now.model_copy(update={"ep": 8, "zero_expert": 1}))
        yield now.model_copy(update={"ep": 4, "all_to_all": "linear"})

    times = [step_s(search.scenario, plan) for plan in steps()]
    assert all(later < sooner for sooner, later in pairwise(times))


def test_with_eight_experts_lina_is_about_as_much_faster_as_reported() -> None:
    """1.73 times on 8 GPUs, against a two-stage all-to-all; with 8 sequences on each, for the paper gives no batch."""
    changes = {"nodes": 2, "model.parts.experts.num_experts": 8, "workload.global_batch": 64, "choose.micro_batch": 8}
    search, plain = on_testbed(**changes)
    found = mp.plan(search.scenario, planner="lina")
    theirs = plain.model_copy(update={"all_to_all": "two_stage"})
    assert 1.5 < step_s(search.scenario, theirs) / found.step_s < 2.0
    assert found.plan.ep == 4


def test_the_rule_does_not_see_the_gradients_of_packed_experts() -> None:
    """With two sequences on a GPU they take longer than all that is saved, and experts are packed all the same."""
    search, plain = on_testbed(**{"workload.global_batch": 32, "choose.micro_batch": 2})
    found = mp.plan(search.scenario, planner="lina")
    assert found.plan.ep == 4
    assert found.step_s > step_s(search.scenario, plain)


def test_every_stage_of_zero_up_to_that_of_the_dense_part_is_tried() -> None:
    result = mp.plan(on_testbed()[0].scenario, planner="lina")
    tried = [result.plan, *(each.plan for each in result.runners_up if each.step_s is not None)]
    assert {(plan.zero_dense, plan.zero_expert) for plan in tried} == {(1, 0), (1, 1)}


# ---- inference


def test_popular_experts_get_whole_gpus_and_a_part_that_others_share() -> None:
    """Of four GPUs 10 of 16 tokens are worth two and a half, and the rest three, two and one quarters."""
    found = lina.shared_out(np.array([10.0, 3.0, 2.0, 1.0]), 4)
    assert found.expert_R.tolist() == [0, 0, 0, 1, 2, 3]
    assert found.gpu_R.tolist() == [0, 1, 3, 2, 3, 2]
    assert found.share_SR[0].tolist() == pytest.approx([0.4, 0.4, 0.2, 1, 1, 1])


def test_a_part_for_which_nobody_has_room_goes_to_the_emptiest() -> None:
    found = lina.shared_out(np.array([6.0, 6.0, 6.0]), 2)
    assert (found.expert_R.tolist(), found.gpu_R.tolist()) == ([0, 1, 2], [0, 1, 0])


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=24).filter(any),
    st.integers(1, 12),
)
@settings(max_examples=200, deadline=None)
def test_every_expert_stands_somewhere_and_at_most_four_on_a_gpu(tokens: list[int], num_gpus: int) -> None:
    tokens_E = np.array(tokens, np.float64)
    found = lina.shared_out(tokens_E, num_gpus)
    assert set(found.expert_R.tolist()) == set(range(len(tokens)))
    assert np.bincount(found.gpu_R).max() <= max(4, 1 + -(-len(tokens) // num_gpus))
    assert len({*zip(found.expert_R.tolist(), found.gpu_R.tolist(), strict=True)}) == len(found.gpu_R)
    worth_E = num_gpus * tokens_E / tokens_E.sum()
    assert (np.bincount(found.expert_R) <= np.maximum(1, np.ceil(worth_E - 1e-9))).all()


@pytest.mark.parametrize("num_experts", [8, 16, 32])
def test_where_all_are_alike_experts_stand_in_order(num_experts: int) -> None:
    found = lina.shared_out(np.full(num_experts, 7.0), 8)
    assert found.gpu_R.tolist() == [expert * 8 // num_experts for expert in range(num_experts)]


def serving(**changes: Any) -> tuple[mp.Scenario, mp.Plan]:
    search, plain = on_testbed(**{"workload.phase": "prefill", "model.parts.experts.top_k": 1}, **changes)
    return search.scenario, plain


def test_a_popular_expert_stands_on_several_gpus_and_the_step_takes_less() -> None:
    scenario, plain = serving(**SKEWED)
    found = lina.placed(scenario, plain)
    assert found.placement is not None
    assert found.placement.num_slots <= 4 * plain.ep
    counts = [np.bincount([e for e in row if e != EMPTY]) for row in found.placement.experts]
    assert all(count.min() == 1 and count.max() > 1 for count in counts)
    assert plain == found.model_copy(update={"placement": None})
    assert 1.3 < step_s(scenario, plain) / step_s(scenario, found) < 2.0


def test_even_routing_and_one_gpu_leave_experts_where_they_are() -> None:
    scenario, plain = serving()
    assert lina.placed(scenario, plain) == plain
    alone = plain.model_copy(update={"ep": 1})
    assert lina.placed(serving(**SKEWED)[0], alone) == alone


def test_experts_stay_where_they_are_if_copies_do_not_fit() -> None:
    few = SKEWED | {"choose.micro_batch": 1}
    scenario, plain = serving(**few)
    fills = [filled_share(plan, scenario) for plan in (plain, lina.placed(scenario, plain))]
    assert fills[0] < fills[1]
    tight, same = serving(**few, **{"cluster.gpu.memory": f"{40 * sum(fills) / 2:.6f} GB"})
    assert same == plain
    assert lina.placed(tight, plain) == plain


def test_a_served_model_is_planned_too() -> None:
    scenario, plain = serving(**SKEWED)
    assert mp.plan(scenario, planner="lina").step_s <= step_s(scenario, plain)
