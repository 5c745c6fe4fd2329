"""The best counts of replicas, then each replica, largest first, on the lightest GPU that lacks the expert.

Reference: Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Applied Mathematics 17, 1969.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._anneal import apportioned, packed
from moeplan.placers._balance import replicas_in
from moeplan.placers._seats import placed


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Longest processing time first, with as many replicas on a GPU as it has slots."""
    start_s = clock_s()
    count_E = apportioned(problem.tokens_E, problem.num_gpus, problem.slots)
    at_GC = packed(problem.tokens_E, count_E, problem.num_gpus, problem.slots_per_gpu)
    return placed(problem, *replicas_in(at_GC, problem.num_experts), start_s=start_s)
