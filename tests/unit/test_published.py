"""Published planners decide as published: PipeMoE's closed form, Tutel's dictionary, FasterMoE's groups, one layout."""

from __future__ import annotations

from itertools import pairwise
from math import log, sqrt
from typing import Any

import numpy as np
import pytest

import moeplan as mp
from moeplan.domain.plan import Plan
from moeplan.domain.scenario import Scenario
from moeplan.planners import fastermoe, tutel
from moeplan.planners._bounds import Bounds
from moeplan.planners._published import Trials, is_runnable, plainest
from moeplan.planners._search import Search
from moeplan.planners._space import Space
from moeplan.planners.pipemoe import Line, best_degree, fitted, layer_s, line_through, optimum

NAMES = ("pipemoe", "tutel", "fastermoe", "lina")
EVERY = tuple(range(1, 65))


def searched(scenario: Scenario) -> Search:
    return Search(Space(scenario), gap=None, time_limit_s=None, progress=None)


def random_lines(seed: int) -> list[tuple[Line, Line]]:
    """Exchanges and experts whose parts are over four orders of magnitude."""
    rng = np.random.default_rng(seed)
    numbers = 10.0 ** rng.uniform(-2, 2, (400, 4))
    return [(Line(fixed_s=a, whole_s=b), Line(fixed_s=c, whole_s=d)) for a, b, c, d in numbers.tolist()]


def run_s(exchange: Line, experts: Line, degree: int) -> float:
    """All parts out, one after another; experts of a part when it has come; all parts back when they are done."""
    sent_s, busy_s, done, at = exchange.seconds(degree), experts.seconds(degree), [], 0.0
    for part in range(degree):
        at = max(at, (part + 1) * sent_s) + busy_s
        done.append(at)
    at = degree * sent_s
    for end in done:
        at = max(at, end) + sent_s
    return at


# ---- PipeMoE


@pytest.mark.parametrize("seed", range(4))
def test_the_model_of_pipemoe_is_a_schedule_that_is_run(seed: int) -> None:
    for exchange, experts in random_lines(seed):
        for degree in (1, 2, 3, 8):
            assert layer_s(exchange, experts, degree) == pytest.approx(run_s(exchange, experts, degree), rel=1e-12)


@pytest.mark.parametrize("degrees", [EVERY, (1, 2, 4), (1, 2, 4, 8, 16, 32, 64), (3, 5, 7), (6,)])
@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_finds_what_trying_every_degree_finds(seed: int, degrees: tuple[int, ...]) -> None:
    for exchange, experts in random_lines(seed):
        least_s = min(layer_s(exchange, experts, degree) for degree in degrees)
        chosen = best_degree(exchange, experts, degrees)
        assert chosen in degrees
        assert layer_s(exchange, experts, chosen) == pytest.approx(least_s, rel=1e-9)


def test_where_experts_take_long_the_degree_is_the_root_of_exchange_over_launch() -> None:
    exchange, experts = Line(fixed_s=0.0, whole_s=8.0), Line(fixed_s=1.0, whole_s=1e6)
    assert optimum(exchange, experts) == pytest.approx(sqrt(2 * 8.0 / 1.0))
    assert best_degree(exchange, experts, EVERY) == 4


def test_where_exchanges_take_long_the_degree_is_the_least_that_hides_the_experts() -> None:
    exchange, experts = Line(fixed_s=1.0, whole_s=100.0), Line(fixed_s=0.1, whole_s=150.0)
    hiding = [r for r in EVERY if r * experts.seconds(r) <= (2 * r - 2) * exchange.seconds(r)]
    assert abs(best_degree(exchange, experts, EVERY) - hiding[0]) <= 1
    assert optimum(exchange, experts) <= hiding[0] < optimum(exchange, experts) + 1


def test_more_parts_are_never_worse_where_nothing_is_paid_for_each() -> None:
    exchange, experts = Line(fixed_s=0.0, whole_s=1.0), Line(fixed_s=0.0, whole_s=2.0)
    times = [layer_s(exchange, experts, degree) for degree in EVERY]
    assert all(later <= sooner for sooner, later in pairwise(times))
    assert best_degree(exchange, experts, (1, 2, 4)) == 4


def test_a_line_goes_through_what_lies_on_it_and_never_below_zero() -> None:
    degrees = np.array([1, 2, 4, 8])
    line = line_through(degrees.tolist(), 3.0 + 5.0 / degrees)
    assert (line.fixed_s, line.whole_s) == pytest.approx((3.0, 5.0))
    assert line_through(degrees.tolist(), 5.0 / degrees - 0.5).fixed_s == 0.0


def test_the_constants_are_what_the_wires_and_kernels_take() -> None:
    scenario = mp.load("small-two-nodes")
    plan = plainest(searched(scenario))
    bounds = Bounds(scenario)
    exchange, experts = fitted(bounds, plan)
    slower, _ = fitted(Bounds(mp.load(scenario.document, {"cluster.nic.bandwidth": "5 GB/s"})), plan)
    assert slower.whole_s > 2 * exchange.whole_s > 0
    assert exchange.fixed_s > 0
    larger = fitted(bounds, plan.model_copy(update={"micro_batch": plan.micro_batch * 8}))
    assert larger[0].whole_s == pytest.approx(8 * exchange.whole_s, rel=0.1)
    assert larger[1].whole_s > experts.whole_s


def test_pipemoe_plans_the_degree_that_its_model_calls_best() -> None:
    scenario = mp.load("small-two-nodes", {"choose.overlap_degree": [1, 2, 3, 4, 8], "workload.global_batch": 64})
    found = mp.plan(scenario, planner="pipemoe").plan
    lines = fitted(Bounds(scenario), found)
    assert found.overlap_degree == min((1, 2, 3, 4, 8), key=lambda degree: layer_s(*lines, degree))


# ---- Tutel


@pytest.mark.parametrize("size", range(1, 40))
def test_a_ternary_search_finds_the_least_of_what_falls_and_then_rises(size: int) -> None:
    values = tuple(3 * k for k in range(size))
    for least in values:
        asked: list[int] = []
        assert tutel.ternary(values, lambda v, m=least, a=asked: a.append(v) or abs(v - m)) == least  # type: ignore[misc, func-returns-value]
        assert len(set(asked)) <= 2 * (log(size) / log(1.5) + 2)


def test_the_dictionary_keeps_its_best_and_tries_nothing_twice() -> None:
    tried: list[tutel.Setting] = []

    def trial(setting: tutel.Setting) -> float:
        tried.append(setting)
        return abs(setting.r - 2) + abs(setting.overlap_degree - 4) + 0.5 * (setting.all_to_all == "linear")

    dictionary = tutel.Dictionary(
        rs=(0, 1, 2, 4, 8), degrees=(1, 2, 4, 8), algorithms=("linear", "two_dh"), trial=trial
    )
    assert dictionary.best(300) == tutel.Setting(2, 4, "two_dh")
    assert len(tried) == len(set(tried))
    count = len(tried)
    assert dictionary.best(383) is dictionary.best(256)
    assert len(tried) == count
    dictionary.best(384)
    assert len(tried) == 2 * count
    assert set(dictionary.known) == {2, 3}


@pytest.mark.parametrize("name", ["mixtral-8x7b-64xh100", "small-two-nodes"])
def test_every_r_is_the_same_gpus_with_the_experts_spread_otherwise(name: str) -> None:
    search = searched(mp.load(name))
    plain, scenario = plainest(search, shards_experts=True), search.scenario
    spread = tutel.spreads(search.space, plain)
    assert list(spread) == sorted(spread)
    assert spread[1] == plain
    for r, plan in spread.items():
        assert (plan.ep, plan.etp) == ((1, 1) if r == 0 else (plain.ep, r))
        assert is_runnable(plan, scenario)
        same = {"ep": plan.ep, "etp": plan.etp, "zero_expert": plan.zero_expert, "rank_order": plan.rank_order}
        assert plain.model_copy(update=same) == plan


def test_tutel_is_the_fastest_of_its_trials_and_no_slower_than_its_r_of_one() -> None:
    scenario = mp.load("small-two-nodes", {"choose.etp": [1, 2], "choose.zero_expert": [1, 3]})
    result = mp.plan(scenario, planner="tutel")
    search = searched(scenario)
    for plan in tutel.spreads(search.space, plainest(search, shards_experts=True)).values():
        assert result.step_s <= mp.simulate(scenario, plan).figures.step_s
    assert all(each.step_s is None or each.step_s >= result.step_s for each in result.runners_up)


def test_the_capacity_is_that_of_the_busiest_expert() -> None:
    even, hot = (
        mp.load("small-8-gpus", {"routing.share": share}) for share in (0.125, 0.4)
    )  # fmt: skip
    plan = plainest(searched(even))
    assert tutel.capacity_of(hot, plan) == pytest.approx(3.2 * tutel.capacity_of(even, plan), rel=0.02)


# ---- FasterMoE


def test_nodes_are_the_groups_of_fastermoe_and_fours_of_gpus_within_one() -> None:
    johnny = mp.load("fastermoe-johnny-16xv100")
    plain = Plan(dp=16, ep=16, stages=(len(johnny.model.all_layers),))
    assert fastermoe.num_groups(johnny, plain) == 2
    assert fastermoe.degrees(johnny, plain) == (1, 2)
    assert fastermoe.num_groups(johnny, plain.model_copy(update={"ep": 8})) == 2
    assert fastermoe.degrees(mp.load(johnny.document, {"choose.overlap_degree": [2, 4]}), plain) == (2,)
    assert fastermoe.degrees(mp.load(johnny.document, {"choose.overlap_degree": [4]}), plain) == (4,)


def test_the_exchange_of_fastermoe_goes_from_group_to_group() -> None:
    scenario = mp.load("small-two-nodes", {"choose.all_to_all": ["grouped_pairwise", "linear"]})
    search = mp.plan(scenario, planner="fastermoe")
    tried = {search.plan.all_to_all, *(each.plan.all_to_all for each in search.runners_up)}
    assert "grouped_pairwise" in tried


# ---- what they share


@pytest.mark.parametrize("name", ["small-4-gpus", "small-8-gpus", "small-two-nodes"])
def test_the_plainest_layout_is_data_and_expert_parallelism_over_all_gpus(name: str) -> None:
    scenario = mp.load(name)
    plan, gpus = plainest(searched(scenario)), scenario.cluster.num_gpus
    assert (plan.dp, plan.tp, plan.pp, plan.cp, plan.etp) == (gpus, 1, 1, 1, 1)
    assert plan.ep == gpus
    assert (plan.all_to_all, plan.overlap_degree) == ("linear", 1)


def test_the_layout_is_cut_further_where_nothing_fits_without() -> None:
    scenario = mp.load("mixtral-8x7b-64xh100", {"nodes": 1, "choose.zero_dense": 0, "choose.zero_expert": 0})
    with pytest.raises(mp.InfeasibleError, match="no plan fits"):
        plainest(searched(scenario))
    plan = plainest(searched(mp.load("mixtral-8x7b-64xh100", {"choose.zero_dense": 1, "choose.zero_expert": 0})))
    assert plan.tp * plan.pp * plan.cp > 1


@pytest.mark.parametrize("planner", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {"choose.overlap_degree": 2},
        {"choose.all_to_all": "linear"},
        {"choose.tp": 2},
        {"choose.ep": 1},
    ],
)
def test_choices_of_the_scenario_are_kept(planner: str, changes: dict[str, Any]) -> None:
    plan = mp.plan(mp.load("small-two-nodes", changes), planner=planner).plan
    for key, value in changes.items():
        name = key.removeprefix("choose.")
        assert getattr(plan, name) == value or (name == "overlap_degree" and plan.ep == 1)


@pytest.mark.parametrize("planner", NAMES)
def test_a_model_without_experts_gets_the_plain_layout(planner: str) -> None:
    scenario = mp.load("llama-3-70b-128xh100", {"model": "tiny-dense", "nodes": 1, "workload.sequence": 512})
    plan = mp.plan(scenario, planner=planner).plan
    assert (plan.ep, plan.overlap_degree, plan.all_to_all) == (1, 1, "linear")


@pytest.mark.parametrize("planner", NAMES)
def test_a_scenario_in_which_nothing_fits_is_infeasible(planner: str) -> None:
    scenario = mp.load("small-4-gpus", {"model": "deepseek-v3", "workload.sequence": 4096})
    with pytest.raises(mp.InfeasibleError, match="no plan fits"):
        mp.plan(scenario, planner=planner)


def test_a_plan_that_does_not_run_is_no_trial() -> None:
    search = searched(mp.load("small-4-gpus"))
    trials, plan = Trials(search), plainest(search)
    assert trials.step_s(plan.model_copy(update={"ep": 3})) == float("inf")
    assert search.tried == []
    assert trials.step_s(plan) == trials.step_s(plan) == search.tried[0].step_s
    assert len(search.tried) == 1
