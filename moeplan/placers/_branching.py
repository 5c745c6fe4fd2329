"""Whole replica counts: branch and bound over ranges of counts, with the configuration LP in every range.

Axes of arrays: E expert, O option.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moeplan.domain.placement import PlacementProblem
from moeplan.placers._configurations import ConfigurationLP, Fractions, Prices
from moeplan.placers._counts import Range, any_counts

_RANGES = 300
"""Looked at before a limit is given up: layers of 32 experts are settled within 60, those of 256 seldom at all."""
_WHOLE = 1e-6


def refuted(
    problem: PlacementProblem,
    lp: ConfigurationLP,
    *,
    limit: float,
    stop_s: float,
    attempt: Callable[[Fractions], bool],
) -> bool:
    """Whether no placement is within the limit, as every range of counts is refuted by itself.

    False as soon as `attempt` made of a fractional solution a placement within the limit, or where work or time is up.
    A range of whole counts that is not refuted leaves the question open; others are still looked at.
    """
    ranges, is_open = [any_counts(problem)], False
    for _ in range(_RANGES):
        if not ranges:
            break
        here = ranges.pop()
        solution = lp.solve(limit=limit, within=here, stop_s=stop_s)
        if isinstance(solution, Prices):
            continue
        if solution is None or attempt(solution):
            return False
        halves = _halves(problem, here, solution)
        ranges += halves
        is_open |= not halves
    return not ranges and not is_open


def _halves(problem: PlacementProblem, here: Range, solution: Fractions) -> list[Range]:
    """The range cut at a count of an expert that has most tokens on both sides; nothing where all counts are whole.

    The half with more of the solution comes last, to be looked at first.
    """
    mean = problem.tokens_E.sum() / problem.num_gpus
    best, cut = _WHOLE * mean, None
    for expert in np.unique(solution.expert_O):
        mine_O = solution.expert_O == expert
        count_O, weight_O = solution.count_O[mine_O], solution.weight_O[mine_O]
        for count in count_O[:-1]:
            below = float(weight_O[count_O <= count].sum() / weight_O.sum())
            score = min(below, 1 - below) * (mean + problem.tokens_E[expert] / count)
            if score > best:
                best, cut = score, (int(expert), int(count), below)
    if cut is None:
        return []
    expert, count, below = cut
    least_E, most_E = here.least_E.copy(), here.most_E.copy()
    most_E[expert], least_E[expert] = count, count + 1
    few, many = replace(here, most_E=most_E), replace(here, least_E=least_E)
    return [many, few] if below > 0.5 else [few, many]
