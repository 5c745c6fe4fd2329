"""FasterMoE's shadowing as its paper has it: the hottest experts on every GPU, while the fullest GPU's time falls.

Reference: He et al., "FasterMoE: Modeling and optimizing training of large-scale dynamic pre-trained models"
(PPoPP 2022), section 4.1.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._shadow import paper_rule, shadowed


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Shadows by the paper's rule, as many as slots pay for; where there are prices, the first one ends all exchange.

    The rule stops where the fullest GPU does not fall: at the first of several experts that are equally hot.
    """
    return shadowed(problem, paper_rule, start_s=clock_s())
