"""Placements of tiny layers against all that there are; HiGHS against CBC.

Axes of arrays: E expert, G GPU, A set of GPUs as a bit mask, P placement.
"""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.domain.placement import PlacementProblem
from moeplan.placers import ilp
from moeplan.placers._cbc import cbc_path
from moeplan.placers._check import value
from moeplan.placers._direct import solved_by_cbc, solved_by_highs, written_out

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
