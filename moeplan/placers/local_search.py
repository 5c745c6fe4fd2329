"""A greedy start, descent and annealing over swaps and replica counts; a few moves only where a budget says so.

Reference: Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing", Science 220, 1983.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._balance import balanced, placement_of
from moeplan.placers._bounds import token_bounds
from moeplan.placers._check import certified
from moeplan.placers._moves import moved
from moeplan.placers._spread import spread


def place(
    problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float, gap: float = 1e-3
) -> PlacedLayer:
    """The best placement found until its gap is proven to be `gap` or less, or all walks are walked.

    The clock is looked at between walks, so the answer is the same wherever it does not run out. Prices are not looked
    at: what is lowered is the tokens of the fullest GPU.
    """
    start = clock_s()
    stop_s = start + time_limit_s
    bound = max(bound for bound, _ in token_bounds(problem))
    if problem.max_moves is not None:
        placement = moved(problem, target=bound * (1 + gap))
    elif problem.split == "optimal":
        placement = spread(problem, bound=bound, gap=gap, rng=rng, stop_s=stop_s)
    else:
        size = {"gpus": problem.num_gpus, "slots": problem.slots, "per_gpu": problem.slots_per_gpu}
        at_GC = balanced(problem.tokens_E, bound=bound, gap=gap, rng=rng, stop_s=stop_s, walks=None, **size)
        placement = placement_of(at_GC, problem.num_experts)
    return certified(problem, placement, seconds=clock_s() - start)
