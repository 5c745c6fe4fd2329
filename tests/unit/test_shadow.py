"""Shadowing: tokens are conserved, published rules are as published, the best prefix is never worse. Placements."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from moeplan.domain.placement import Floats, PlacedLayer, PlacementProblem, TokenPrices
from moeplan.placers import shadow_code, shadow_paper
from moeplan.placers._shadow import (
    ShadowCosts,
    ShadowProblem,
    as_workers,
    best_prefix,
    code_rule,
    first_rise,
    paper_rule,
    shadowed,
)
from moeplan.routers.drifting import route

RULES = {"paper": paper_rule, "code": code_rule, "first rise": first_rise, "best prefix": best_prefix}


def costs_of(*, width: int, flops_per_s: float, bytes_per_s: float, element_bytes: int) -> ShadowCosts:
    """The paper's terms for an expert of two matrices, twice as wide as the model."""
    return ShadowCosts(
        compute_s=4 * 2 * width**2 / flops_per_s, token_s=width * element_bytes / bytes_per_s,
        expert_s=2 * 2 * width**2 * element_bytes / bytes_per_s,
    )  # fmt: skip


JOHNNY = costs_of(width=1024, flops_per_s=11.5e12, bytes_per_s=50e9 / 8, element_bytes=4)
"""The defaults of FastMoE's rule: 11.5 TFLOP/s and 50 Gbit/s."""
INKY = costs_of(width=2560, flops_per_s=200e12, bytes_per_s=200e9 / 8, element_bytes=2)
"""The width of SmartMoE's model, on A100."""


def random_problem(rng: np.random.Generator, *, workers: int = 4, experts: int = 8) -> ShadowProblem:
    """A few hot experts and dear or cheap transfers."""
    tokens_WE = np.rint(rng.gamma(0.4, 500, experts) * rng.uniform(0.8, 1.2, (workers, experts)))
    compute, token, expert = 10.0 ** rng.uniform([-7, -7, -5], [-5, -5, -3])
    return ShadowProblem(
        tokens_WE=tokens_WE, owner_E=np.arange(experts) * workers // experts,
        costs=ShadowCosts(compute_s=compute, token_s=token, expert_s=expert),
    )  # fmt: skip


def hand_made(falling: list[float], *, expert_s: float, workers: int = 4) -> ShadowProblem:
    """One expert for each worker, every worker sends it the same; a token costs a second each way and in the expert."""
    tokens_WE = np.tile(np.array(falling) / workers, (workers, 1))
    costs = ShadowCosts(compute_s=1.0, token_s=1.0, expert_s=expert_s)
    return ShadowProblem(tokens_WE=tokens_WE, owner_E=np.arange(len(falling)), costs=costs)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_computed_once_whatever_is_shadowed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng)
    for size in range(9):
        shadows = tuple(rng.permutation(8)[:size].tolist())
        assert problem.computed_W(shadows).sum() == pytest.approx(problem.tokens_WE.sum())
    assert problem.computed_W(tuple(range(8))) == pytest.approx(problem.tokens_WE.sum(axis=1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(20))
def test_a_rule_takes_experts_by_falling_load(rule: str, seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed))
    shadows = RULES[rule](problem)
    assert shadows == problem.by_load[: len(shadows)]


@pytest.mark.parametrize("seed", range(50))
def test_the_best_prefix_is_never_worse_than_a_published_rule_or_none(seed: int) -> None:
    problem = random_problem(np.random.default_rng(seed))
    best_s = problem.seconds(best_prefix(problem))
    assert best_s <= min(problem.seconds(rule(problem)) for rule in (paper_rule, code_rule, first_rise))
    assert best_s <= problem.seconds(())
    sets = [each for size in range(9) for each in combinations(range(8), size)]
    assert best_s >= min(problem.seconds(each) for each in sets)


@pytest.mark.parametrize("seed", range(50))
def test_the_first_shadow_pays_by_the_papers_inequality(seed: int) -> None:
    """B_max > r alpha H, or 3 (B_max - B'_max) alpha H / (r alpha H - B_max) > P / W_net, of section 4.1."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng)
    alpha, width = 2.0, 64.0
    speed, wires = 10.0 ** rng.uniform(9, 11), 10.0 ** rng.uniform(6, 9)
    costs = ShadowCosts(
        compute_s=4 * alpha * width**2 / speed, token_s=width / wires, expert_s=2 * alpha * width**2 / wires
    )
    problem = ShadowProblem(tokens_WE=problem.tokens_WE, owner_E=problem.owner_E, costs=costs)
    before, after = (float(problem.computed_W(each).max()) for each in ((), problem.by_load[:1]))
    least = alpha * width
    pays = before > least or 3 * (before - after) * alpha * width / (least - before) > speed / wires
    if after <= before:  # else the shadow's tokens at home make another worker the busiest, which the letters leave out
        assert bool(paper_rule(problem)) == pays


def test_the_papers_rule_does_not_charge_tokens_that_still_move_and_the_code_does() -> None:
    problem = hand_made([100.0, 80.0, 4.0, 4.0], expert_s=50.0)
    assert problem.seconds(()) == 700
    assert problem.seconds((0,)) == 3 * 105 + 4 * 80 + 2 * 50
    assert paper_rule(problem) == (0, 1)  # 700, 3 * 105 + 100 = 415, 3 * 49 + 200 = 347, 3 * 49 + 300
    assert code_rule(problem) == (0, 1)  # 700, 7 * 80 + 50 = 610, 7 * 4 + 100 = 128, 7 * 4 + 150


def test_the_rules_disagree_where_a_shadow_costs_as_much_as_it_saves() -> None:
    problem = hand_made([100.0, 80.0, 80.0, 80.0], expert_s=150.0)
    assert paper_rule(problem) == (0,)  # 3 * 105 + 300 = 615 is less than 700, 3 * 125 + 600 is more
    assert code_rule(problem) == ()  # 7 * 80 + 150 = 710 is more


def test_where_several_experts_are_equally_hot_all_of_them_are_shadowed_or_none() -> None:
    problem = hand_made([100.0, 100.0, 100.0, 1.0], expert_s=20.0)
    assert code_rule(problem) == ()
    assert first_rise(problem) == ()
    assert best_prefix(problem) == (0, 1, 2)


@pytest.mark.parametrize("costs", [JOHNNY, INKY], ids=["V100", "A100"])
def test_on_loads_like_smartmoes_the_best_prefix_takes_a_fifth_less_time_than_the_first_rise(
    costs: ShadowCosts,
) -> None:
    """24 layers at 11 iterations of a run without a balancing loss, 32 experts on 16 workers."""
    owner_E, total = np.repeat(np.arange(16), 2), dict.fromkeys(RULES, 0.0)
    for iteration in range(1, 5002, 500):
        routing = route(
            num_layers=24, num_experts=32, top_k=2, num_sources=16, tokens_per_source=8192,
            rng=np.random.default_rng(0), iteration=iteration,
        )  # fmt: skip
        for tokens_SE in routing.tokens_LSE:
            problem = ShadowProblem(tokens_WE=tokens_SE.astype(np.float64), owner_E=owner_E, costs=costs)
            for name, rule in RULES.items():
                total[name] += problem.seconds(rule(problem))
    assert total["best prefix"] < 0.8 * total["first rise"]
    assert total["best prefix"] < 0.8 * total["paper"]
    assert total["best prefix"] < 0.9 * total["code"]


# ---- placements


def placed(place: Callable[..., PlacedLayer], tokens_E: Floats | list[float], **given: Any) -> PlacedLayer:
    problem = PlacementProblem(tokens_SE=np.array(tokens_E), **given)
    return place(problem, rng=np.random.default_rng(0), time_limit_s=1.0)


def gpus_of(found: PlacedLayer, expert: int) -> list[int]:
    return found.placement.gpu_R[found.placement.expert_R == expert].tolist()


PLACERS = pytest.mark.parametrize("place", [shadow_paper.place, shadow_code.place], ids=["paper", "code"])


@PLACERS
def test_a_shadowed_expert_stands_on_every_gpu_and_each_computes_its_part(place: Callable[..., PlacedLayer]) -> None:
    found = placed(place, [8.0, 1.0, 1.0, 1.0], num_gpus=4, slots=7)
    assert [gpus_of(found, expert) for expert in range(4)] == [[0, 1, 2, 3], [1], [2], [3]]
    assert found.placement.share_SR[0, :4] == pytest.approx(0.25)
    assert found.value == 3.0


@pytest.mark.parametrize("rule", [paper_rule, code_rule])
@pytest.mark.parametrize("slots", range(16, 65))
def test_the_hottest_that_slots_pay_for_stand_everywhere(
    rule: Callable[[ShadowProblem], tuple[int, ...]], slots: int
) -> None:
    problem = PlacementProblem(tokens_SE=0.6 ** np.arange(16.0), num_gpus=4, slots=slots)
    shadows = rule(as_workers(problem, np.arange(16) // 4))[: (slots - 16) // 3]
    count_E = np.bincount(shadowed(problem, rule, start_s=0.0).placement.expert_R)
    assert shadows == tuple(range(len(shadows)))
    assert (count_E[: len(shadows)] == 4).all()
    if rule is code_rule:
        assert len(shadows) == min(15, (slots - 16) // 3)


@PLACERS
def test_who_has_no_room_at_home_beside_the_shadows_goes_to_the_emptiest_gpu(place: Callable[..., PlacedLayer]) -> None:
    found = placed(place, [40.0, 10.0, 1.0, 1.0], num_gpus=2, slots=6)
    assert [gpus_of(found, expert) for expert in range(4)] == [[0, 1], [0, 1], [1], [0]]


PRICES = TokenPrices(gpus_per_node=1, compute_s=1.0, nic_s=1.0, nvlink_s=0.0)


@pytest.mark.parametrize("prices", [None, PRICES])
def test_the_papers_rule_stops_where_the_fullest_gpu_does_not_fall_and_the_codes_where_experts_are_alike(
    prices: TokenPrices | None,
) -> None:
    """Fullest GPU: 10, 10 / 4 + 9 = 11.5, 19 / 4 + 1 = 5.75, 20 / 4 + 1. With prices the first shadow ends exchange."""
    problem = PlacementProblem(tokens_SE=np.array([10.0, 9.0, 1.0, 1.0]), num_gpus=4, slots=13, prices=prices)
    workers = as_workers(problem, np.arange(4))
    assert code_rule(workers) == (0, 1)
    assert paper_rule(workers) == ((0, 1) if prices else ())
    assert shadowed(problem, code_rule, start_s=0.0).placement.expert_R.tolist().count(1) == 4


@PLACERS
def test_one_gpu_and_slots_for_nothing_more_leave_experts_in_order(place: Callable[..., PlacedLayer]) -> None:
    assert placed(place, [3.0, 1.0], num_gpus=1, slots=2).placement.gpu_R.tolist() == [0, 0]
    assert placed(place, [9.0, 1.0, 1.0, 1.0], num_gpus=2, slots=4).placement.gpu_R.tolist() == [0, 0, 1, 1]
