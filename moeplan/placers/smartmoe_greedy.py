"""SmartMoE's online placement: heaviest expert first onto the lightest GPU, kept only if that lowers the fullest one.

Reference: Zhai and others, "SmartMoE: Efficiently Training Sparsely-Activated Models through Combining Offline and
Online Parallelization", USENIX ATC 2023, section 5; ties as in its artifact, thu-pacman/SmartMoE-AE.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Floats, Ints, PlacedLayer, PlacementProblem
from moeplan.errors import PlanError
from moeplan.jit import clock_s
from moeplan.placers._seats import placed, present

REPLICAS = False
"""It permutes experts; of each there is one."""


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """The greedy placement, or the present one (`now`, else experts in order) if that is no worse.

    It does not count moves, so with `max_moves` its answer may be refused. Raises PlanError where slots are more than
    experts.
    """
    start_s = clock_s()
    experts, gpus = problem.num_experts, problem.num_gpus
    if problem.slots != experts:
        raise PlanError(
            f"smartmoe_greedy: {problem.slots} slots for {experts} experts, and it makes no replicas; "
            f"use {experts} slots, or the placer lpt or local_search"
        )
    old_E = np.arange(experts) * gpus // experts if problem.now is None else present(problem).gpu_R
    new_E = _greedy(problem.tokens_E, old_E, gpus=gpus, per_gpu=problem.slots_per_gpu)
    most = [np.bincount(gpu_E, weights=problem.tokens_E).max() for gpu_E in (old_E, new_E)]
    return placed(problem, np.arange(experts), new_E if most[1] < most[0] else old_E, start_s=start_s)


def _greedy(tokens_E: Floats, old_E: Ints, *, gpus: int, per_gpu: int) -> Ints:
    """The GPU of each expert: the lightest with a free slot, its old one if that is as light."""
    gpu_E, load_G, held_G = old_E.copy(), np.zeros(gpus), np.zeros(gpus, np.int64)
    for e in np.argsort(-tokens_E, kind="stable"):
        free_load_G = np.where(held_G < per_gpu, load_G, np.inf)
        old = old_E[e]
        gpu_E[e] = g = old if free_load_G[old] == free_load_G.min() else free_load_G.argmin()
        load_G[g] += tokens_E[e]
        held_G[g] += 1
    return gpu_E
