"""Placements of tiny layers against all that there are; HiGHS against CBC.

Axes of arrays: E expert, G GPU, A set of GPUs as a bit mask, M node, P placement.
"""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.domain.placement import PlacementProblem, TokenPrices
from moeplan.placers import block, ilp
from moeplan.placers._cbc import cbc_path
from moeplan.placers._check import value
from moeplan.placers._direct import solved_by_cbc, solved_by_highs, written_out
from moeplan.placers._makespan import NodeProblem
from moeplan.placers._node_ilp import Limits, integer_slots, model_of, slots_by_cbc
from moeplan.placers._node_search import estimate_s

CLOSE = 1e-6
KINDS = ("no replicas", "even", "optimal", "moves")


def random_problem(rng: np.random.Generator, kind: str, *, experts: int = 6) -> PlacementProblem:
    """A layer of up to 6 experts on up to 3 GPUs, with loads that are alike, skewed, equal or nothing."""
    num_gpus, num_experts = int(rng.integers(1, 4)), int(rng.integers(2, experts + 1))
    tokens_E = np.round(rng.choice([1.0, 10.0, 100.0]) * rng.lognormal(sigma=rng.uniform(0, 1.5), size=num_experts), 3)
    tokens_E[1:][rng.random(num_experts - 1) < 0.1] = 0.0
    most = num_experts * num_gpus
    slots = num_experts if kind == "no replicas" else int(rng.integers(num_experts, most + 1))
    given = {"tokens_SE": tokens_E, "num_gpus": num_gpus, "slots": slots}
    if kind != "moves":
        return PlacementProblem(**given, split="optimal" if kind == "optimal" else "even")
    now = ilp.place(
        PlacementProblem(**(given | {"tokens_SE": rng.permutation(tokens_E) + 1})), rng=rng, time_limit_s=10
    ).placement
    return PlacementProblem(**given, now=now, max_moves=int(rng.integers(0, slots + 1)))


def brute_force(problem: PlacementProblem) -> float:
    """The least value of all legal placements: each expert on each set of GPUs."""
    gpus = problem.num_gpus
    masks_A = np.arange(1, 2**gpus)
    here_AG = (masks_A[:, None] >> np.arange(gpus)) & 1
    value_PA, held_PG, moves_P = np.zeros((1, masks_A.size)), np.zeros((1, gpus), np.int64), np.zeros(1, np.int64)
    for expert, tokens in enumerate(problem.tokens_E):
        new_A = here_AG.sum(axis=1)
        if problem.now is not None:
            stood_G = np.isin(np.arange(gpus), problem.now.gpu_R[problem.now.expert_R == expert])
            new_A = (here_AG & ~stood_G).sum(axis=1)
        held_PG = (held_PG[:, None] + here_AG).reshape(-1, gpus)
        moves_P = (moves_P[:, None] + new_A).ravel()
        value_PA = (value_PA[:, None] + tokens * _bound_AA(problem, masks_A, here_AG)).reshape(-1, masks_A.size)
        legal_P = (held_PG <= problem.slots_per_gpu).all(axis=1)
        legal_P &= moves_P <= (problem.slots if problem.max_moves is None else problem.max_moves)
        value_PA, held_PG, moves_P = value_PA[legal_P], held_PG[legal_P], moves_P[legal_P]
    return float(value_PA[held_PG.sum(axis=1) == problem.slots].max(axis=1).min())


def _bound_AA(problem: PlacementProblem, masks_A: np.ndarray, here_AG: np.ndarray) -> np.ndarray:
    """What one token of an expert on the GPUs of the first set adds to the second set's mean.

    With the best split the fullest GPU has the greatest mean of a set, of the tokens that can go nowhere else; with an
    even split only sets of one GPU count.
    """
    if problem.split == "optimal":
        return ((masks_A[:, None] & ~masks_A) == 0) / here_AG.sum(axis=1)
    alone_A = here_AG.sum(axis=1) == 1
    return ((masks_A[:, None] & masks_A) > 0) * alone_A / here_AG.sum(axis=1)[:, None]


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


@pytest.mark.parametrize("kind", KINDS)
def test_250_tiny_layers_get_the_best_placement_of_all(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    for number in range(250):
        problem = random_problem(rng, kind, experts=6 if number % 5 == 0 else 5)
        best = brute_force(problem)
        placed = ilp.place(problem, rng=rng, time_limit_s=30, gap=1e-7)
        assert placed.value == pytest.approx(best, rel=CLOSE), (number, problem, placed.proof)
        assert placed.lower_bound <= best * (1 + 1e-9), (number, problem, placed.proof)


@pytest.mark.skipif(cbc_path() is None, reason="CBC is not installed")
def test_highs_and_cbc_agree_on_200_layers() -> None:
    rng = np.random.default_rng(7)
    for number in range(200):
        problem = random_problem(rng, KINDS[number % 4], experts=5)
        high = float(problem.tokens_E.sum())
        answers = [
            solver(problem, written_out(problem, high=high), gap=0.0, time_limit_s=20)
            for solver in (solved_by_highs, solved_by_cbc)
        ]
        found = [value(problem, answer.placement) for answer in answers if answer.placement is not None]
        assert len(found) == 2
        assert found[0] == pytest.approx(found[1], rel=CLOSE), (number, problem)
        assert answers[0].bound <= found[0] * (1 + 1e-9)


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
        assert float(cost @ by_highs) == pytest.approx(float(cost @ by_cbc), rel=CLOSE), number
        assert np.abs(by_cbc[v.x_EM] - by_cbc[v.x_EM].round()).max() < CLOSE
        slots = slots_by_cbc(nodes, limits, gap=0.0, time_limit_s=20)
        _, bound_s = integer_slots(nodes, limits, gap=0.0, time_limit_s=20)
        if slots is not None:
            assert np.bincount(slots.expert_K[slots.expert_K >= 0], minlength=nodes.num_experts).sum() == nodes.slots
            assert estimate_s(nodes, slots, is_even=False) >= bound_s * (1 - CLOSE), number
