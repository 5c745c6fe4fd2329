"""How full the memory of the fullest rank is, for all plans of a branch."""

from __future__ import annotations

from collections.abc import Callable
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
        self._counted: dict[tuple[object, ...], Floats] = {}

    def share(self, branch: Branch, *, evened: bool = False, spare: bool = False) -> Floats:
        """Share of the usable memory that the fullest rank needs, by all choices but arbitration.

        `evened`: the least that any placement of experts needs; `spare`: with one slot more on each place.
        """
        usable = self.space.scenario.cluster.gpu.usable_memory_bytes
        staying = self._known(branch, ("zero_dense", "zero_expert"), spare, self._staying)
        found = np.full([len(values) for values in branch.lists[:6]], np.inf)
        some = found
        if staying.max(axis=-1).min() > usable:  # one of the leanest is enough to tell by how much it fails
            some = found[:1, -1:, :, -1:]
            branch = replace(
                branch, micro_batch=branch.micro_batch[:1], recompute=branch.recompute[-1:],
                overlap_degree=branch.overlap_degree[-1:],
            )  # fmt: skip
        passing = self._known(branch, ("micro_batch", "recompute", "overlap_degree"), evened, self._passing)
        some[:] = (staying + passing[..., None, None, :]).max(axis=-1) / usable
        return found

    def _known(
        self, branch: Branch, names: tuple[str, ...], how: bool, count: Callable[[Branch, bool], Floats]
    ) -> Floats:
        layout = replace(branch.layout, rank_order="tp-cp-ep-dp-pp")
        key = (layout, names, how, *(getattr(branch, name) for name in names))
        if key not in self._counted:
            self._counted[key] = count(branch, how)
        return self._counted[key]

    def _plan(self, branch: Branch, *index: int) -> Plan:
        return self.space.plan(branch, int(np.ravel_multi_index(index, [len(values) for values in branch.lists])))

    def _staying(self, branch: Branch, spare: bool) -> Floats:
        """[D, E, P] bytes of weights, gradients and optimizer."""
        scenario = self.space.scenario
        slots = {"placement": one_more(scenario.model, branch.layout.ep)} if spare else {}

        def states(d: int, e: int) -> Floats:
            plan = self._plan(branch, 0, 0, 0, 0, d, e, 0)
            return footprint.states(plan.model_copy(update=slots), scenario).total_P

        dense_DP = np.array([states(d, 0) for d in range(len(branch.zero_dense))])
        expert_EP = np.array([states(0, e) for e in range(len(branch.zero_expert))])
        return np.asarray(dense_DP[:, None] + (expert_EP - dense_DP[0]))

    def _passing(self, branch: Branch, evened: bool) -> Floats:
        """[M, R, 1, O, P] bytes of activations and buffers, the same for all all-to-alls."""
        sizes = [len(values) for values in (branch.micro_batch, branch.recompute, branch.overlap_degree)]
        found = [
            footprint.held(self._plan(branch, m, r, 0, o, 0, 0, 0), self.space.scenario, evened=evened).total_P
            for m, r, o in np.ndindex(*sizes)
        ]
        return np.array(found).reshape(*sizes[:2], 1, sizes[2], -1)
