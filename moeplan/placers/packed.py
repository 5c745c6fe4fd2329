"""Lina's packing: all experts on as few GPUs as hold them, in order, and the same on the next ones.

Reference: Li and others, "Accelerating Distributed MoE Training and Inference with Lina", USENIX ATC 2023, section 4.3.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._seats import filled, placed


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Groups of GPUs that each hold every expert, so that tokens need not leave a group.

    Lina doubles the experts of a GPU until an expert takes as long as an all-to-all; here the slots of a GPU say how
    many those are. Slots that make no whole group are filled by tokens.
    """
    start_s = clock_s()
    experts, gpus, per_gpu = problem.num_experts, problem.num_gpus, problem.slots_per_gpu
    group = -(-experts // per_gpu)
    replica_R = np.arange(min(problem.slots, gpus // group * experts))
    expert_R, copy_R = replica_R % experts, replica_R // experts
    here_EG = np.zeros((experts, gpus), np.bool_)
    here_EG[expert_R, copy_R * group + expert_R // per_gpu] = True
    here_EG = filled(here_EG, problem.tokens_E, slots=problem.slots, per_gpu=per_gpu)
    return placed(problem, *np.nonzero(here_EG), start_s=start_s)
