"""The checker on placements made by hand, the cheap bounds, the best split, few moves, and the simple placers."""

import os
from pathlib import Path
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt
import pytest

from moeplan.domain.placement import LayerPlacement, PlacedLayer, PlacementProblem, Split, TokenPrices
from moeplan.errors import PlanError
from moeplan.placers import block, eplb, local_search, lpt, packed, popularity, round_robin, smartmoe_greedy
from moeplan.placers._bounds import token_bounds
from moeplan.placers._check import certified, check, value
from moeplan.placers._split import best_shares

TRACES = Path(os.environ.get("MOEPLAN_SHARED", Path(__file__).parents[3] / "shared")) / "reference" / "traces"
recorded = pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not here; set MOEPLAN_SHARED")
PRICES = TokenPrices(gpus_per_node=2, compute_s=1e-6, nic_s=2e-6, nvlink_s=5e-7)


def problem(
    tokens: npt.ArrayLike = (4.0, 2.0, 1.0, 1.0), gpus: int = 2, slots: int = 5, **more: Any
) -> PlacementProblem:
    return PlacementProblem(tokens_SE=np.array(tokens), num_gpus=gpus, slots=slots, **more)


def solved(given: PlacementProblem, **more: Any) -> PlacedLayer:
    return local_search.place(given, rng=np.random.default_rng(0), time_limit_s=5.0, **more)


def test_a_legal_placement_is_worth_its_fullest_gpu() -> None:
    placement = LayerPlacement.even([0, 0, 1, 2, 3], [0, 1, 0, 1, 1])
    check(problem(), placement)
    assert value(problem(), placement) == 4.0
    assert value(problem([[4, 2, 1, 1], [0, 0, 6, 0]]), placement) == 10.0


@pytest.mark.parametrize(
    ("experts", "gpus", "message"),
    [
        ([0, 0, 1, 2], [0, 1, 0, 1], "expert 3 stands nowhere; give"),
        ([0, 0, 1, 2, 3], [0, 0, 0, 1, 1], "expert 0 stands twice on GPU 0, .*; put"),
        ([0, 0, 1, 2, 3], [0, 1, 1, 1, 1], "GPU 1 holds 4 replicas, above 3 = .*; move"),
        ([0, 1, 2, 3], [0, 1, 0, 1], "4 replicas for 5 slots; use every slot"),
        ([0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 0, 1], "6 replicas for 5 slots; use every slot"),
        ([0, 0, 1, 2, 3], [0, 2, 0, 1, 1], "GPU 2 .* not one of 0 to 1"),
        ([0, 0, 1, 2, 3], [0, -1, 0, 1, 1], "GPU .*-1 is not one of 0 to 1"),
        ([0, 0, 1, 2, 3, 4], [0, 1, 0, 1, 1, 0], "expert 4 .* not one of 0 to 3"),
    ],
)
def test_an_illegal_placement_is_refused_with_what_is_wrong(experts: list[int], gpus: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=f"placement: .*{message}"):
        check(problem(), LayerPlacement.even(experts, gpus))


def test_shares_must_suit_the_split_and_the_sources() -> None:
    share_SR = np.array([[0.75, 0.25, 1, 1, 1]])
    uneven = LayerPlacement(expert_R=np.array([0, 0, 1, 2, 3]), gpu_R=np.array([0, 1, 0, 1, 1]), share_SR=share_SR)
    with pytest.raises(PlanError, match=r"shares differ .*; set split to optimal"):
        check(problem(), uneven)
    check(problem(split="optimal"), uneven)
    two = LayerPlacement(expert_R=uneven.expert_R, gpu_R=uneven.gpu_R, share_SR=np.repeat(share_SR, 2, axis=0))
    with pytest.raises(PlanError, match="shares for 2 sources, and the load has 1; give"):
        check(problem(split="optimal"), two)
    assert value(problem([[4, 2, 1, 1], [0, 4, 0, 0]], split="optimal"), two) == 9.0


def test_more_moves_than_allowed_are_refused() -> None:
    now = LayerPlacement.even([0, 0, 1, 2, 3], [0, 1, 0, 1, 1])
    swapped = LayerPlacement.even([0, 0, 1, 2, 3], [0, 1, 1, 0, 1])
    check(problem(now=now, max_moves=2), swapped)
    with pytest.raises(PlanError, match=r"2 replicas stand .*, and max_moves is 1; move fewer"):
        check(problem(now=now, max_moves=1), swapped)


def test_a_bound_that_a_legal_placement_beats_is_never_certified() -> None:
    placement = LayerPlacement.even([0, 0, 1, 2, 3], [0, 1, 0, 1, 1])
    assert certified(problem(), placement, seconds=0.0).gap == pytest.approx(0)
    with pytest.raises(AssertionError, match=r"bound 4\.1 .* is above the value 4\.0"):
        certified(problem(), placement, bound=4.1, proof="wrong", seconds=0.0)


def test_a_certificate_names_the_bound_that_held() -> None:
    placement = LayerPlacement.even([0, 0, 1, 2, 3], [0, 1, 1, 0, 1])
    assert certified(problem(), placement, seconds=0.0).proof.startswith("mean: ")
    own = certified(problem(), placement, bound=4.001 * (1 - 1e-3), proof="my own", seconds=0.0)
    assert own.proof.startswith("mean: ")
    hot = problem([9.0, 1, 1, 1], slots=4)
    found = certified(hot, LayerPlacement.even([0, 1, 2, 3], [0, 0, 1, 1]), seconds=0.0)
    assert found.proof.startswith("companions: ")
    assert found.lower_bound == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "gpus", "slots", "split", "name", "bound"),
    [
        ([1.0, 1, 1, 1], 2, 4, "even", "mean", 2.0),
        ([8.0, 1, 1], 3, 4, "even", "largest replica", 4.0),
        ([8.0, 1, 1], 3, 4, "optimal", "largest replica", 4.0),
        ([5.0, 5, 5, 1, 1, 1], 2, 6, "even", "companions", 11.0),
        ([8.0, 2, 2, 2], 2, 4, "optimal", "companions", 10.0),
    ],
)
def test_each_cheap_bound_has_a_case_where_it_is_the_best(
    tokens: list[float], gpus: int, slots: int, split: Split, name: str, bound: float
) -> None:
    found = max(token_bounds(problem(tokens, gpus, slots, split=split)))
    assert found[0] == pytest.approx(bound, rel=1e-6)
    assert found[1].startswith(f"{name}: ")


def test_with_prices_a_bound_is_seconds_of_the_fullest_gpu_alone() -> None:
    tokens_SE = np.random.default_rng(0).lognormal(0, 1, (2, 12)) * 100
    for split in ("even", "optimal"):
        found = solved(problem(tokens_SE, 4, 16, split=split, prices=PRICES))
        assert 0 < found.lower_bound <= found.value
        assert found.proof.endswith("; exchanges left out")


def test_the_best_split_is_that_of_a_linear_programme() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        gpus, experts = int(rng.integers(1, 9)), int(rng.integers(1, 13))
        here_EG = rng.random((experts, gpus)) < rng.random()
        here_EG[np.arange(experts), rng.integers(0, gpus, experts)] = True
        tokens_E = rng.lognormal(0, 1.5, experts) * (rng.random(experts) < 0.9) + 1e-9
        expert_R, gpu_R = np.nonzero(here_EG)
        share_R = best_shares(tokens_E, expert_R, gpu_R, gpus)
        assert share_R.min() >= 0
        assert np.bincount(expert_R, weights=share_R) == pytest.approx(1)
        most = np.bincount(gpu_R, weights=share_R * tokens_E[expert_R]).max()
        assert most == pytest.approx(_least_maximum(tokens_E, expert_R, gpu_R, gpus), rel=1e-7, abs=1e-8)


def _least_maximum(tokens_E: Any, expert_R: Any, gpu_R: Any, gpus: int) -> float:
    """The same by HiGHS: min m, sum over replicas of e of x = tokens[e], sum over replicas on g of x <= m."""
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    most = model.addVariable(obj=1.0)
    tokens_R = [model.addVariable() for _ in expert_R]
    for e, tokens in enumerate(tokens_E):
        model.addConstr(sum(tokens_R[r] for r in np.flatnonzero(expert_R == e)) == tokens)
    for g in range(gpus):
        model.addConstr(sum(tokens_R[r] for r in np.flatnonzero(gpu_R == g)) - most <= 0)
    model.run()
    return float(model.getObjectiveValue())


@pytest.mark.parametrize("slots", [24, 27, 32])
def test_few_moves_never_make_it_worse_and_stay_within_their_number(slots: int) -> None:
    rng = np.random.default_rng(slots)
    tokens_E = rng.lognormal(0, 1, 24)
    now = solved(problem(tokens_E, 8, slots)).placement
    drifted_E = tokens_E * rng.lognormal(0, 0.5, 24)
    stay = value(problem(drifted_E, 8, slots), now)
    values = []
    for most in (0, 1, 2, 4, 8):
        found = solved(problem(drifted_E, 8, slots, now=now, max_moves=most))
        assert found.placement.moves_from(now) <= most
        values.append(found.value)
    assert values[0] == stay
    assert max(values) <= stay
    assert values[-1] < 0.95 * stay


def test_a_present_placement_of_other_slots_cannot_be_moved_from() -> None:
    now = LayerPlacement.even([0, 1, 2, 3], [0, 0, 1, 1])
    with pytest.raises(PlanError, match=r"now: .*4 replicas for 5 slots.*; or leave now and max_moves out"):
        solved(problem(now=now, max_moves=3))


def test_the_wanted_gap_ends_the_search() -> None:
    tokens_E = np.random.default_rng(1).lognormal(0, 0.8, 256)
    for gap in (0.01, 0.003, 0.001):
        assert solved(problem(tokens_E, 64, 288), gap=gap).gap <= gap


def test_with_gpus_less_one_slots_to_spare_the_best_split_meets_the_mean() -> None:
    tokens_E = np.random.default_rng(2).lognormal(0, 0.5, 32)
    assert solved(problem(tokens_E, 8, 39, split="optimal")).gap <= 1e-3


def _pairs(found: PlacedLayer) -> list[tuple[int, int]]:
    return list(zip(found.placement.expert_R.tolist(), found.placement.gpu_R.tolist(), strict=True))


def test_the_plain_placers_put_experts_where_their_names_say() -> None:
    given: dict[str, Any] = {"rng": np.random.default_rng(0), "time_limit_s": 1.0}
    four = problem([4.0, 3, 2, 1], 2, 4)
    assert _pairs(block.place(four, **given)) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert _pairs(round_robin.place(four, **given)) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert _pairs(lpt.place(four, **given)) == [(0, 0), (1, 1), (2, 1), (3, 0)]
    assert _pairs(smartmoe_greedy.place(four, **given)) == [(0, 0), (1, 1), (2, 1), (3, 0)]
    twice = problem([1.0, 1, 1, 1], 4, 8)
    assert _pairs(packed.place(twice, **given)) == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 1), (2, 3), (3, 1), (3, 3)]
    hot = popularity.place(problem([6.0, 1, 1], 4, 8), **given)
    assert np.bincount(hot.placement.expert_R).tolist() == [4, 2, 2]


def test_smartmoe_keeps_what_is_as_good() -> None:
    now = LayerPlacement.even([0, 1, 2, 3], [1, 0, 1, 0])
    given = problem([1.0, 1, 1, 1], 2, 4, now=now)
    found = smartmoe_greedy.place(given, rng=np.random.default_rng(0), time_limit_s=1.0)
    assert found.placement.moves_from(now) == 0


def test_eplb_as_published_may_put_an_expert_twice_on_a_gpu_and_ours_does_not() -> None:
    """Loads and groups of the example in its readme: 12 experts, 16 slots, 8 GPUs, 2 nodes, 4 groups."""
    tokens_E = np.array([90.0, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86])
    expert_R, gpu_R = eplb.raw(tokens_E, gpus=8, slots=16, nodes=2, groups=4)
    assert [sorted(expert_R[gpu_R == g].tolist()) for g in range(8)] == [
        [5, 6], [5, 7], [4, 8], [3, 4], [9, 10], [2, 10], [0, 1], [1, 11]
    ]  # fmt: skip
    rng, repaired = np.random.default_rng(0), 0
    for _ in range(50):
        tokens_E = rng.lognormal(0, 1.5, 12)
        expert_R, gpu_R = eplb.raw(tokens_E, gpus=4, slots=16)
        repaired += len(set(zip(expert_R.tolist(), gpu_R.tolist(), strict=True))) < 16
        eplb.place(problem(tokens_E, 4, 16), rng=rng, time_limit_s=1.0)
    assert repaired > 5


@recorded
@pytest.mark.parametrize(("gpus", "slots"), [(24, 72), (32, 96)])
def test_recorded_loads_are_balanced_within_a_proven_hundredth_and_better_than_by_eplb(gpus: int, slots: int) -> None:
    """DeepSeek-V2-Lite, four layers, loads of one task; in sample."""
    with np.load(TRACES / "deepseek_v2_lite_top6.npz") as trace:
        chosen_TLK = trace["topk_intent"]
    ours, theirs = [], []
    for layer in (0, 8, 16, 25):
        given = problem(np.bincount(chosen_TLK[:, layer].ravel(), minlength=64).astype(float), gpus, slots)
        found = solved(given)
        assert found.gap <= 0.01
        ours.append(found.value)
        theirs.append(eplb.place(given, rng=np.random.default_rng(0), time_limit_s=5.0).value)
    assert np.mean(np.divide(theirs, ours)) > 1.02
