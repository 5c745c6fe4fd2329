"""How full the memory of the fullest rank is, for all plans of a branch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats
from moeplan.partition import footprint
from moeplan.planners._places import one_more
from moeplan.planners._space import Branch, Space


class Filled:
    """Remembers what it has worked out: branches that order ranks in another way, or list other all-to-alls, need the
    same memory.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._known: dict[tuple[object, ...], Floats] = {}

    def share(self, branch: Branch, *, evened: bool = False, spare: bool = False) -> Floats:
        """Share of the usable memory that the fullest rank needs, by all choices but arbitration.

        `evened`: the least that any placement of experts needs; `spare`: with one slot more on each place.
        """
        layout = replace(branch.layout, rank_order="tp-cp-ep-dp-pp")
        lists = (branch.micro_batch, branch.recompute, branch.overlap_degree, branch.zero_dense, branch.zero_expert)
        key = (layout, lists, evened, spare)
        if key not in self._known:
            self._known[key] = self._share(branch, evened=evened, spare=spare)
        sizes = [len(values) for values in branch.lists[:6]]
        return np.broadcast_to(self._known[key], sizes)

    def _share(self, branch: Branch, *, evened: bool, spare: bool) -> Floats:
        """The same for all all-to-alls, shape [M, R, 1, O, D, E]."""
        sizes, scenario = [len(values) for values in branch.lists], self.space.scenario
        usable = scenario.cluster.gpu.usable_memory_bytes
        slots = {"placement": one_more(scenario.model, branch.layout.ep)} if spare else {}

        def plan(*index: int) -> Plan:
            return self.space.plan(branch, int(np.ravel_multi_index(index, sizes)))

        def states(d: int, e: int) -> Floats:
            return footprint.states(plan(0, 0, 0, 0, d, e, 0).model_copy(update=slots), scenario).total_P

        dense_DP = np.array([states(d, 0) for d in range(sizes[4])])
        expert_EP = np.array([states(0, e) for e in range(sizes[5])])
        staying = dense_DP[:, None] + (expert_EP - dense_DP[0])
        found = np.full([*sizes[:2], 1, *sizes[3:6]], np.inf)
        hopeless = staying.max(axis=2).min() > usable
        for m, r, o in np.ndindex(sizes[0], sizes[1], sizes[3]):
            if hopeless and (m, r, o) != (0, sizes[1] - 1, 0):
                continue  # one of the leanest is enough to tell by how much it fails
            passing = footprint.held(plan(m, r, 0, o, 0, 0, 0), scenario, evened=evened).total_P
            found[m, r, 0, o] = (staying + passing).max(axis=2) / usable
        return found
