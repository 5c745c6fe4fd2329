"""Experts dealt out to the GPUs one by one, as cards are."""

from __future__ import annotations

from math import lcm

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._seats import placed

KEEPS_ORDER = True


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Replica r is one of expert r mod E on GPU r mod G, one GPU further whenever the two would meet again."""
    start_s = clock_s()
    replicas = np.arange(problem.slots)
    rounds_R = replicas // lcm(problem.num_experts, problem.num_gpus)
    gpu_R = (replicas + rounds_R) % problem.num_gpus
    return placed(problem, replicas % problem.num_experts, gpu_R, start_s=start_s)
