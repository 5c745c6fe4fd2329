"""Lina's inference placement: replicas in proportion to tokens, packed by first-fit decreasing.

Reference: Li and others, "Accelerating Distributed MoE Training and Inference with Lina", USENIX ATC 2023, section 5.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._seats import placed, proportional, room_G


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Each replica, largest first, on the first GPU that it does not fill above the mean; on an empty or any, if none.

    Lina gives an expert GPUs by its popularity and packs the rest, 4 experts at most; here slots take the place of both
    limits.
    """
    start_s = clock_s()
    tokens_E, gpus, per_gpu = problem.tokens_E, problem.num_gpus, problem.slots_per_gpu
    count_E = proportional(tokens_E, gpus=gpus, slots=problem.slots)
    size_E, mean = tokens_E / count_E, tokens_E.sum() / gpus
    here_EG = np.zeros((problem.num_experts, gpus), np.bool_)
    order = np.argsort(-size_E, kind="stable")
    for e in np.repeat(order, count_E[order]).tolist():
        may_G = room_G(here_EG, e, per_gpu=per_gpu)
        load_G = size_E @ here_EG
        for wanted_G in (load_G + size_E[e] <= mean, load_G == 0):
            if (may_G & wanted_G).any():
                here_EG[e, (may_G & wanted_G).argmax()] = True
                break
        else:
            here_EG[e, rng.choice(np.flatnonzero(may_G))] = True
    return placed(problem, *np.nonzero(here_EG), start_s=start_s)
