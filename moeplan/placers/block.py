"""Experts in order, as many on each GPU as it has slots; from the start again where slots are left."""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._seats import placed

KEEPS_ORDER = True


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """What frameworks do unasked: replica r is one of expert r mod E, and neighbours share a GPU."""
    start_s = clock_s()
    replicas = np.arange(problem.slots)
    gpu_R = replicas * problem.num_gpus // problem.slots
    return placed(problem, replicas % problem.num_experts, gpu_R, start_s=start_s)
