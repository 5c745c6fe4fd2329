"""How many replicas each expert may have when no GPU is above a limit.

Axes of arrays: E expert, O option (an expert with a number of replicas), sorted by size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.domain.placement import Floats, Ints, PlacementProblem

ROUNDING = 1e-12
"""Loads this much above a limit are still within it, so that no placement is ruled out by rounding."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Options:
    """Option o: expert `expert_O[o]` has `count_O[o]` replicas of `size_O[o]` tokens each."""

    expert_O: Ints
    count_O: Ints
    size_O: Floats


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Range:
    """Each expert e has `least_E[e]` to `most_E[e]` replicas."""

    least_E: Ints
    most_E: Ints


def any_counts(problem: PlacementProblem) -> Range:
    """The range that leaves nothing out: one replica to one on each GPU."""
    ones_E = np.ones(problem.num_experts, np.int64)
    return Range(least_E=ones_E, most_E=ones_E * problem.num_gpus)


def options(problem: PlacementProblem, *, limit: float, within: Range) -> Options | None:
    """Every number of replicas in the range that a placement within the limit could give an expert; None if none can.

    The other experts have at least their fewest, so an expert gets at most its own fewest and what then is left of the
    slots. No other count is left out.
    """
    fewest_E = np.maximum(within.least_E, np.ceil(problem.tokens_E / limit * (1 - ROUNDING)).astype(np.int64))
    spare = problem.slots - int(fewest_E.sum())
    if spare < 0 or (fewest_E > within.most_E).any():
        return None
    number_E = np.minimum(within.most_E - fewest_E, spare) + 1
    expert_O = np.repeat(np.arange(problem.num_experts), number_E)
    first_O = np.repeat(np.cumsum(number_E) - number_E, number_E)
    count_O = fewest_E[expert_O] + np.arange(expert_O.size) - first_O
    size_O = problem.tokens_E[expert_O] / count_O
    order = np.argsort(size_O, kind="stable")
    return Options(expert_O=expert_O[order], count_O=count_O[order], size_O=size_O[order])
