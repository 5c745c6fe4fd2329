"""Placements out of fractional solutions: their replica counts are rounded, then the replicas are packed.

Axes of arrays: E expert, O option, G GPU, C slot of a GPU.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Ints, LayerPlacement, PlacementProblem
from moeplan.placers._anneal import annealed, packed
from moeplan.placers._balance import placement_of
from moeplan.placers._check import value
from moeplan.placers._configurations import Fractions

_SHORT, _LONG = 2_000, 20_000
"""Steps for each slot of a walk from counts that are mended, and from those of a whole solution."""
_TRIES = 3
_HOT, _COLD = 1e-4, 1e-7
"""Temperatures in squared means: the counts are good already, so a walk changes few of them."""

_AIM = 0.9995
"""Of the target: squares of a small excess weigh nothing, so walks end a little above what they aim at."""


def rounded_and_packed(
    problem: PlacementProblem, solution: Fractions, *, target: float, rng: np.random.Generator
) -> LayerPlacement:
    """A placement from a fractional solution; more is tried where its counts are whole already."""
    count_E = rounded(problem, solution)
    is_whole = solution.expert_O.size == problem.num_experts
    return (long_walks if is_whole else _pack)(problem, count_E, target=target, rng=rng)


def long_walks(problem: PlacementProblem, count_E: Ints, *, target: float, rng: np.random.Generator) -> LayerPlacement:
    """The best of some placements from counts that are worth trying hard."""
    best, least = None, np.inf
    for _ in range(_TRIES):
        found = _pack(problem, count_E, target=target, rng=rng, steps=_LONG)
        most = value(problem, found)
        if most < least:
            best, least = found, most
        if least <= target:
            break
    assert best is not None
    return best


def rounded(problem: PlacementProblem, solution: Fractions) -> Ints:
    """Whole replica counts: each expert's weightiest, mended to use every slot where that leads to its mean count."""
    experts = problem.num_experts
    total_E = np.bincount(solution.expert_O, weights=solution.weight_O, minlength=experts)
    mean_E = np.bincount(solution.expert_O, weights=solution.weight_O * solution.count_O, minlength=experts)
    mean_E = np.maximum(1.0, mean_E / np.maximum(total_E, 1e-9))
    count_E = np.rint(mean_E).astype(np.int64)
    rising = np.argsort(solution.weight_O, kind="stable")
    count_E[solution.expert_O[rising]] = solution.count_O[rising]
    while (short := problem.slots - int(count_E.sum())) != 0:
        step = 1 if short > 0 else -1
        room_E = count_E < problem.num_gpus if short > 0 else count_E > 1
        count_E[np.where(room_E, step * (mean_E - count_E), -np.inf).argmax()] += step
    return count_E


def _pack(
    problem: PlacementProblem, count_E: Ints, *, target: float, rng: np.random.Generator, steps: int = _SHORT
) -> LayerPlacement:
    """A placement from these counts, annealed towards `target` tokens on the fullest GPU."""
    at_GC = packed(problem.tokens_E, count_E, problem.num_gpus, problem.slots_per_gpu)
    seed = int(rng.integers(2**31))
    at_GC = annealed(at_GC, problem.tokens_E, _AIM * target, target, steps * problem.slots, seed, _HOT, _COLD)
    return placement_of(at_GC, problem.num_experts)
