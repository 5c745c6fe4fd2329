"""FasterMoE's shadowing as its code has it: the hottest experts on every GPU, while the next one is less hot.

Reference: FastMoE repository, `fmoe/fastermoe/shadow_policy.py`.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._shadow import code_rule, shadowed


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Shadows by the repository's rule, as many as slots pay for; it takes each expert to have a GPU for itself.

    The rule stops where the next expert is as hot. Before that, with nothing to pay for a shadow, slots alone end it.
    """
    return shadowed(problem, code_rule, start_s=clock_s())
