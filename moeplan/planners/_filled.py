"""How full the memory of the fullest rank is, for all plans of a branch."""

from __future__ import annotations

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats
from moeplan.partition import footprint
from moeplan.planners._places import one_more
from moeplan.planners._space import Branch, Space


def filled(space: Space, branch: Branch, *, evened: bool = False, spare: bool = False) -> Floats:
    """Share of the usable memory that the fullest rank needs, by all choices but arbitration.

    `evened`: the least that any placement of experts needs; `spare`: with one slot more on each place.
    """
    sizes, scenario = [len(values) for values in branch.lists], space.scenario
    usable = scenario.cluster.gpu.usable_memory_bytes
    slots = {"placement": one_more(scenario.model, branch.layout.ep)} if spare else {}

    def plan(*index: int) -> Plan:
        return space.plan(branch, int(np.ravel_multi_index(index, sizes)))

    def states(d: int, e: int) -> Floats:
        return footprint.states(plan(0, 0, 0, 0, d, e, 0).model_copy(update=slots), scenario).total_P

    staying = np.array([[states(d, e) for e in range(sizes[5])] for d in range(sizes[4])])
    found = np.full(sizes[:6], np.inf)
    hopeless = staying.max(axis=2).min() > usable
    for m, r, o in np.ndindex(sizes[0], sizes[1], sizes[3]):
        if hopeless and (m, r, o) != (0, sizes[1] - 1, 0):
            continue  # one of the leanest is enough to tell by how much it fails
        passing = footprint.held(plan(m, r, 0, o, 0, 0, 0), scenario, evened=evened).total_P
        found[m, r, :, o] = (staying + passing).max(axis=2) / usable
    return found
