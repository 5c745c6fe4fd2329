"""Placements where nodes count against all that there are, for tiny layers: by seconds, and by nodes that tokens visit.

Axes of arrays: A set of GPUs as a bit mask, E expert, F another set, G GPU, K choice of a token, M and N node,
P placement, S source, U different sets of experts.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeplan.domain.placement import Floats, Ints, PlacementProblem, Split, TokenPrices, TokenVisits
from moeplan.domain.routing import TokenSets
from moeplan.placers import block, ilp
from moeplan.placers._cbc import cbc_path
from moeplan.placers._direct import solved_by_cbc, solved_by_highs, written_out
from moeplan.placers._makespan import NodeProblem, routed, unit_s, value_s
from moeplan.placers._node_ilp import Limits, model_of, slots_by_cbc
from moeplan.placers._node_search import estimate_s

CLOSE = 1e-6


def random_problem(rng: np.random.Generator, split: Split, *, experts: int) -> PlacementProblem:
    """A layer of 2 to `experts` experts, 3 on 6 GPUs, on 2 or 3 nodes of 1 or 2 GPUs, which send alike or not."""
    num_nodes, size = int(rng.integers(2, 4)), int(rng.integers(1, 3))
    num_gpus = num_nodes * size
    num_experts = int(rng.integers(2, (experts if num_gpus < 6 else 3) + 1))
    rows = 1 if rng.random() < 0.2 else num_nodes
    tokens_SE = np.round(np.exp(rng.normal(5, rng.uniform(0, 1.5), (rows, num_experts))))
    prices = TokenPrices(
        gpus_per_node=size, compute_s=float(rng.choice([0.05, 0.15, 2.0])) * 1e-6, nic_s=0.16e-6,
        nvlink_s=float(rng.choice([0.0, 0.05, 1.0])) * 1e-6, exchange_factor=3.0,
    )  # fmt: skip
    slots = int(rng.integers(num_experts, min(num_experts * num_gpus, num_experts + 3) + 1))
    return PlacementProblem(tokens_SE=tokens_SE, num_gpus=num_gpus, slots=slots, split=split, prices=prices)


def masks(problem: PlacementProblem) -> Ints:
    """`here_AG`: whether a set of GPUs has a GPU."""
    return np.asarray((np.arange(2**problem.num_gpus)[:, None] >> np.arange(problem.num_gpus)) & 1)


def all_placements(problem: PlacementProblem) -> Ints:
    """The set of each expert in each legal placement, without those that only exchange GPUs of a node."""
    gpus, here_AG = problem.num_gpus, masks(problem)
    mask_PE = np.zeros((1, 0), np.int64)
    for left in reversed(range(problem.num_experts)):
        new_A = np.arange(1, 2**gpus)
        mask_PE = np.concatenate([np.repeat(mask_PE, new_A.size, axis=0), np.tile(new_A, len(mask_PE))[:, None]], 1)
        held_PG = here_AG[mask_PE].sum(axis=1)
        slots_P = held_PG.sum(axis=1)
        mask_PE = mask_PE[
            (held_PG.max(axis=1) <= problem.slots_per_gpu)
            & (slots_P + left <= problem.slots)
            & (slots_P + left * gpus >= problem.slots)
        ]
    content_PG = (here_AG[mask_PE] << np.arange(problem.num_experts)[:, None]).sum(axis=1)
    content_PNG = content_PG.reshape(len(mask_PE), -1, NodeProblem.of(problem).gpus_per_node)
    return np.asarray(mask_PE[(np.diff(content_PNG, axis=2) >= 0).all(axis=(1, 2))])


def seconds_P(problem: PlacementProblem, mask_PE: Ints) -> Floats:
    """Seconds of each placement under an even split; under the best one what they are at least.

    For however copies are routed, those of experts that a node lacks leave it, foreign ones of experts that stand
    nowhere else come in, and of any GPUs the fullest has their mean of what can go nowhere else.
    """
    nodes, here_AG = NodeProblem.of(problem), masks(problem)
    count_A = np.maximum(here_AG.sum(axis=1), 1)
    inside_AN = here_AG.reshape(len(here_AG), nodes.num_nodes, -1).sum(axis=2) / count_A[:, None]
    kept_AN, taken_AN, load_AF = inside_AN, inside_AN, here_AG / count_A[:, None]
    if problem.split == "optimal":
        group_F = np.arange(1, len(here_AG))
        kept_AN, taken_AN = np.ceil(inside_AN), np.floor(inside_AN)
        load_AF = ((np.arange(len(here_AG))[:, None] & ~group_F) == 0) / count_A[group_F]
    tokens_EN, total_E = nodes.tokens_NE.T, nodes.tokens_NE.sum(axis=0)
    out_PN = (tokens_EN * (1 - kept_AN[mask_PE])).sum(axis=1)
    into_PN = ((total_E[:, None] - tokens_EN) * taken_AN[mask_PE]).sum(axis=1)
    load_P = (total_E[:, None] * load_AF[mask_PE]).sum(axis=1).max(axis=1)
    busy_P = np.maximum(out_PN, into_PN).max(axis=1)
    return np.asarray(np.maximum(nodes.nic_s * busy_P, nodes.nvlink_s * load_P) + nodes.compute_s * load_P)


def least_s(problem: PlacementProblem) -> float:
    """The least seconds of all legal placements; where splits are free they are routed, while any can be the least."""
    mask_PE = all_placements(problem)
    low_P = seconds_P(problem, mask_PE)
    if problem.split == "even":
        return float(low_P.min())
    best_s, here_AG = np.inf, masks(problem)
    for at in np.argsort(low_P):
        if low_P[at] >= best_s:
            break
        best_s = min(best_s, value_s(problem, routed(problem, *np.nonzero(here_AG[mask_PE[at]]))))
    return best_s


@pytest.mark.parametrize("split", ["even", "optimal"])
def test_150_tiny_layers_take_the_least_seconds_of_all_placements(split: Split) -> None:
    rng = np.random.default_rng(["even", "optimal"].index(split))
    for number in range(150):
        problem = random_problem(rng, split, experts=5 if number % 5 == 0 else 4)
        least = least_s(problem)
        placed = ilp.place(problem, rng=np.random.default_rng(number), time_limit_s=30)
        assert placed.value == pytest.approx(least, rel=CLOSE), (number, problem, placed.proof)
        assert placed.lower_bound <= least * (1 + 1e-9), (number, problem, placed.proof)
        assert placed.gap <= 1.1e-3, "a layer of this size is proven"


def random_visits(rng: np.random.Generator) -> PlacementProblem:
    """Up to 6 experts, as many on each of 2 or 3 nodes of 1 or 2 GPUs, and tokens that choose 2 or 3 of them."""
    shapes = [(2, 1, 1), (2, 1, 2), (2, 1, 3), (3, 1, 1), (3, 1, 2), (2, 2, 1), (3, 2, 1)]
    num_nodes, size, each = shapes[rng.integers(len(shapes))]
    num_experts = num_nodes * size * each
    popularity_E = np.exp(rng.normal(0, 1, num_experts))
    top_k = min(int(rng.integers(2, 4)), num_experts)
    ids_NK = np.array([
        rng.choice(num_experts, top_k, replace=False, p=popularity_E / popularity_E.sum()) for _ in range(30)
    ])  # fmt: skip
    visits = TokenVisits(sets=TokenSets.of(ids_NK), gpus_per_node=size, most_load=float(rng.choice([1.05, 1.3, 9.0])))
    tokens_E = np.bincount(ids_NK.ravel(), minlength=num_experts)
    return PlacementProblem(tokens_SE=tokens_E, num_gpus=num_nodes * size, slots=num_experts, visits=visits)


def fewest(problem: PlacementProblem) -> tuple[float, float]:
    """The least load of a node above what is allowed, and with it the fewest nodes that a token visits on average."""
    visits = problem.visits
    assert visits is not None
    num_nodes = problem.num_gpus // visits.gpus_per_node
    most = visits.most_load * problem.tokens_E.sum() / num_nodes
    found = []
    for node_E in itertools.product(range(num_nodes), repeat=problem.num_experts):
        if np.ptp(np.bincount(node_E, minlength=num_nodes)) == 0:
            load_N = np.bincount(node_E, problem.tokens_E, num_nodes)
            visited_U = [len({node_E[e] for e in row}) for row in visits.sets.experts_UK.tolist()]
            over = max(0.0, float(load_N.max()) - most * (1 + 1e-12))
            found.append((over, float(np.average(visited_U, weights=visits.sets.count_U))))
    return min(found)


def test_200_tiny_layers_are_grouped_so_that_tokens_visit_the_fewest_nodes() -> None:
    rng = np.random.default_rng(4)
    for number in range(200):
        problem = random_visits(rng)
        over, least = fewest(problem)
        placed = ilp.place(problem, rng=np.random.default_rng(number), time_limit_s=30)
        assert placed.value == pytest.approx(least, rel=CLOSE), (number, problem)
        assert over > 0 or placed.lower_bound <= least * (1 + 1e-9), (number, problem)


# ---- HiGHS against CBC


def random_nodes(rng: np.random.Generator) -> tuple[NodeProblem, Limits]:
    """Up to 8 experts on up to 3 nodes of up to 2 GPUs, and what solutions as good as a simple one keep."""
    num_nodes, size = int(rng.integers(2, 4)), int(rng.integers(1, 3))
    tokens_NE = np.round(np.exp(rng.normal(4, 1.0, (num_nodes, int(rng.integers(3, 9))))))
    experts = tokens_NE.shape[1]
    prices = TokenPrices(
        gpus_per_node=size, compute_s=float(rng.choice([0.05, 0.15, 2.0])), nic_s=0.16,
        nvlink_s=float(rng.choice([0.0, 0.05, 1.0])),
    )  # fmt: skip
    problem = PlacementProblem(
        tokens_SE=tokens_NE, num_gpus=num_nodes * size, slots=experts + int(rng.integers(0, 4)), split="optimal",
        prices=prices,
    )  # fmt: skip
    nodes = NodeProblem.of(problem)
    value_s = block.place(problem, rng=rng, time_limit_s=1.0).value
    return nodes, Limits.below(nodes, value_s, busiest_node=0.0, fullest_gpu=float(tokens_NE.sum()) / problem.num_gpus)


@pytest.mark.skipif(cbc_path() is None, reason="CBC is not installed")
def test_highs_and_cbc_agree_on_40_problems_of_nodes() -> None:
    rng = np.random.default_rng(11)
    for number in range(40):
        nodes, limits = random_nodes(rng)
        model, v = model_of(nodes, limits)
        cost = np.concatenate(model.cost)
        by_highs, by_cbc = model.solve(time_limit_s=20).values, model.solve_by_cbc(time_limit_s=20).values
        assert by_highs is not None
        assert by_cbc is not None
        least = float(cost @ by_highs)
        assert float(cost @ by_cbc) == pytest.approx(least, rel=CLOSE), number
        assert np.abs(by_cbc[v.x_EM] - by_cbc[v.x_EM].round()).max() < CLOSE
        slots = slots_by_cbc(nodes, limits, gap=0.0, time_limit_s=20)
        if slots is not None:
            assert np.bincount(slots.expert_K[slots.expert_K >= 0], minlength=nodes.num_experts).sum() == nodes.slots
            assert estimate_s(nodes, slots, is_even=False) >= least * unit_s(nodes) * (1 - CLOSE), number


@pytest.mark.skipif(cbc_path() is None, reason="CBC is not installed")
@pytest.mark.parametrize("split", ["even", "optimal"])
def test_highs_and_cbc_agree_on_20_layers_written_out_with_prices(split: Split) -> None:
    rng = np.random.default_rng(12)
    for number in range(20):
        problem = random_problem(rng, split, experts=3)
        model = written_out(problem, high=float(problem.tokens_E.sum()))
        answers = [solver(problem, model, gap=0.0, time_limit_s=20) for solver in (solved_by_highs, solved_by_cbc)]
        found = [value_s(problem, answer.placement) for answer in answers if answer.placement is not None]
        assert len(found) == 2
        assert found[0] == pytest.approx(found[1], rel=CLOSE), (number, problem)
        assert found[0] == pytest.approx(least_s(problem), rel=CLOSE), (number, problem)
        assert answers[0].bound <= found[0] * (1 + 1e-9)
