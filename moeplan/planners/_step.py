"""Lower bounds of whole steps: the passes, and what is done once a step (or, under ZeRO 2 and 3, in every pass)
around them.

D, E: the ZeRO stages listed for dense weights and for experts. U, P, V as in `_bounds.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moeplan import menu
from moeplan.compiler.compile_plan import orders
from moeplan.domain.placement import Placement
from moeplan.domain.plan import DTYPE_BYTES, Plan
from moeplan.domain.program import Floats, Ints
from moeplan.partition.stages import pipeline
from moeplan.partition.weights import weights_of
from moeplan.planners._bounds import Bounds
from moeplan.planners._chains import beside_s
from moeplan.planners._groups import cheapest, grid_of
from moeplan.planners._outline import outline_of
from moeplan.planners._passes import BACKWARD, FORWARD, INPUT_GRADIENT, Passes, at_ends
from moeplan.planners._places import one_more
from moeplan.planners._ports import Ports, busiest_s
from moeplan.planners._prices import Wire
from moeplan.planners._space import Branch, Layout, branch_of
from moeplan.schedules import Order, Paths, Slot, finish_times


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights of each virtual stage on one rank, and in how many layers they come: [V], dense and experts."""

    dense: Floats
    expert: Floats
    dense_layers: Floats
    expert_layers: Floats


_REDUCTIONS = {0: 2.0, 1: 1.0}
"""Once a step, by ZeRO stage: an all-reduce is two."""
_SCATTERS = {2: 1.0, 3: 1.0}
"""Behind each pass that makes gradients of weights."""
_GATHERS = {1: 1.0, 2: 1.0}
"""Once a step."""


class Ends(NamedTuple):
    """When a pipeline rank ends its last pass; begin, end and chunk of each that makes gradients of weights."""

    end_s: float
    begin_s: Floats
    over_s: Floats
    chunk: Ints


@dataclass
class StepBounds:
    """Bounds of whole steps of the plans of a scenario."""

    bounds: Bounds
    _weights: dict[tuple[object, ...], Weights] = field(default_factory=dict)

    def branch_s(self, branch: Branch) -> Floats:
        """[U, D, E]: at least the seconds of a step of every plan of a branch; arbitration cannot lower it."""
        passes = self.bounds.passes(branch)
        fill, work, drain = self.bounds.ranks_s(branch, passes, closely=True)
        ends_PU = fill + work
        best = (ends_PU + drain).max(axis=0)[:, None, None]
        if not self.bounds.training:
            return np.asarray(best)
        opening, closing, occupied = self._once(branch, passes)
        best = np.maximum(best, self._beside_s(branch, fill, drain))
        last = closing + ends_PU[:, :, None, None]
        drained = (ends_PU + drain)[:, :, None, None] + closing.min(axis=0)[None]
        found = np.maximum(last, drained).max(axis=0) + opening
        return np.asarray(np.maximum(np.maximum(best, found), occupied))

    def _beside_s(self, branch: Branch, fill_PU: Floats, drain_PU: Floats) -> Floats:
        """[U, D, E]: kernels of the first, a middle and the last pipeline rank beside all that the links next to it
        carry: in its passes alone, and in the whole step.
        """
        if not self.bounds.prices.is_even:
            return np.zeros((1, 1, 1))
        found = np.zeros((1, 1, 1))
        shares, layout = self.bounds.prices.cost_model.shares, branch.layout
        work_VU, idle_VU = self._kernels_s(branch), self._idle_s(branch)
        update_PDE = self._update(branch)
        for rank in sorted({0, layout.pp // 2, layout.pp - 1}):
            ports = Ports(self.bounds, branch, rank)
            work, idle = (ports.each * each[ports.held].sum(axis=0) for each in (work_VU, idle_VU))
            carried = {link: seconds[:, None, None] for link, seconds in ports.in_passes_s().items()}
            inside = busiest_s(carried)
            within = beside_s(work[:, None, None], inside, inside, shares, idle[:, None, None])
            found = np.maximum(found, within + (fill_PU + drain_PU)[rank][:, None, None])
            for axis, amount in zip(("dense", "edp"), self._ring_bytes(branch, ports), strict=True):
                carried = ports.add_rings(carried, axis, amount)
            all_in_all = busiest_s(carried)
            all_work = work[:, None, None] + update_PDE[rank]
            found = np.maximum(found, beside_s(all_work, all_in_all, all_in_all, shares, idle[:, None, None]))
        return found

    def _kernels_s(self, branch: Branch) -> Floats:
        """[V, U]: of one micro-batch in each virtual stage."""
        work_VU = self.bounds.summed(branch, 0, "busy")
        if not self.bounds.training:
            return work_VU
        backward = self.bounds.summed(branch, 1, "busy")
        if outline_of(branch.layout, True).splits:
            chains, counts_VK = self.bounds.chains(branch), self.bounds.shape(branch.layout).counts_VK
            backward = np.minimum(backward, self.bounds.summed(branch, 2, "busy") + counts_VK @ chains.weights)
        return work_VU + backward

    def _idle_s(self, branch: Branch) -> Floats:
        """[V, U]: in which a rank can compute nothing, of one micro-batch; 0 where it works on two at a time."""
        shape, chains = self.bounds.shape(branch.layout), self.bounds.chains(branch)
        if branch.layout.copies > 1:
            return np.zeros((shape.counts_VK.shape[0], chains.ends.shape[-1]))
        forward, backward, gradient = (
            np.maximum(self.bounds.summed(branch, p, "idle") - sum(at_ends(p, shape, chains)), 0.0)
            for p in (FORWARD, BACKWARD, INPUT_GRADIENT)
        )
        return np.asarray(forward + np.minimum(backward, gradient))

    def _ring_bytes(self, branch: Branch, ports: Ports) -> tuple[Floats, Floats]:
        """[U, D, 1] and [U, 1, E]: of all gathers and scatters of a pipeline rank in a step, dense and experts."""
        weights, precision = self.weights(branch), self.bounds.scenario.choices.precision
        scatter, gather = DTYPE_BYTES[precision.gradients], DTYPE_BYTES[precision.weights]
        found = []
        for held_V, zeros in ((weights.dense, branch.zero_dense), (weights.expert, branch.zero_expert)):
            once = np.array([{0: 2 * scatter, 1: scatter + gather, 2: gather, 3: 0.0}[zero] for zero in zeros])
            each = np.array([(zero >= 2) * scatter + (zero == 3) * 2 * gather for zero in zeros])
            found.append(held_V[ports.held].sum() * (once + ports.each[:, None] * each))
        return found[0][:, :, None], found[1][:, None, :]

    def _once(self, branch: Branch, passes: Passes) -> tuple[Floats, Floats, Floats]:
        """Before the first pass [U, D, E]; behind a rank's last pass [P, U, D, E]; of the sharding stream alone [U,
        D, E].
        """
        layout, shape = branch.layout, self.bounds.shape(branch.layout)
        outline, choices = outline_of(layout, True), self.bounds.scenario.choices
        each_VDE, once_VDE = self._reduced(branch)
        gather_VDE = self._sharding(branch, _GATHERS, "weights")
        pass_VDE = self._in_passes(branch)
        microbatches = self.bounds.microbatches(branch)
        update_PDE = self._update(branch)
        closing, occupied = [], []
        for rank, held in enumerate(shape.virtual):
            stages, last = list(held), held[outline.last[rank][1]]
            overlapping = each_VDE[last] + (once_VDE[last] if choices.overlap_gradients else 0.0)
            behind = np.maximum(overlapping - passes.any_backward[last][:, None, None], 0.0) + update_PDE[rank]
            if not choices.overlap_gradients:
                behind = behind + once_VDE[last] + gather_VDE[stages].sum(axis=0)
            closing.append(behind)
            each = pass_VDE[stages].sum(axis=0) * microbatches[:, None, None] / layout.copies
            occupied.append(each + update_PDE[rank])
        first = gather_VDE[0] - passes.forward[0][:, None, None]
        opening = np.maximum(first, 0.0) if choices.overlap_gradients else np.zeros_like(first)
        return opening, np.array(closing), np.array(occupied).max(axis=0)

    # ---- weights and their exchanges

    def weights(self, branch: Branch) -> Weights:
        """Counted by the compiler's own rule."""
        layout = branch.layout
        key = (layout.stages, layout.schedule, layout.vpp, layout.tp, layout.ep, layout.etp)
        if key not in self._weights:
            scenario, plan = self.bounds.scenario, self._plan(layout, placement=self._slots(layout.ep))
            stages = pipeline(scenario.model, plan, scenario.workload).stages
            found = [list(weights_of(stage, scenario.model, plan)) for stage in stages]
            self._weights[key] = Weights(
                dense=np.array([sum(w.dense for w in stage) for stage in found], np.float64),
                expert=np.array([sum(w.expert for w in stage) for stage in found], np.float64),
                dense_layers=np.array([sum(w.dense > 0 for w in stage) for stage in found], np.float64),
                expert_layers=np.array([sum(w.expert > 0 for w in stage) for stage in found], np.float64),
            )
        return self._weights[key]

    @staticmethod
    def _plan(layout: Layout, **more: object) -> Plan:
        names = ("dp", "tp", "cp", "pp", "ep", "etp", "vpp", "stages", "schedule")
        return Plan(**({name: getattr(layout, name) for name in names} | more))

    def _slots(self, ep: int) -> Placement | None:
        """As many slots as the weights are counted for: where there may be replicas, one more than experts need."""
        bounds = self.bounds
        return one_more(bounds.scenario.model, ep) if bounds.coarse and bounds.replicas else bounds.placement

    def _wires(self, branch: Branch) -> tuple[Wire, Wire]:
        grid, none = grid_of(branch.layout), Wire()
        dense, expert = branch.layout.replicas
        prices = self.bounds.prices
        return (
            cheapest(prices, grid, "dense") if dense > 1 else none,
            cheapest(prices, grid, "edp") if expert > 1 else none,
        )

    def _exchanged_s(self, branch: Branch, what: str) -> tuple[Floats, Floats]:
        """[V] seconds of one gather of the weights (or scatter of the gradients) of each virtual stage: dense,
        experts.
        """
        weights, size = self.weights(branch), DTYPE_BYTES[getattr(self.bounds.scenario.choices.precision, what)]
        dense, expert = self._wires(branch)
        return (
            dense.latency_s * weights.dense_layers + dense.per_byte_s * weights.dense * size,
            expert.latency_s * weights.expert_layers + expert.per_byte_s * weights.expert * size,
        )

    def _reduced(self, branch: Branch) -> tuple[Floats, Floats]:
        """[V, 1, D, E]: reductions behind each pass that makes gradients of weights, and those once a step."""
        return self._sharding(branch, _SCATTERS, "gradients"), self._sharding(branch, _REDUCTIONS, "gradients")

    def _sharding(self, branch: Branch, times: Mapping[int, float], what: str) -> Floats:
        """[V, 1, D, E]: seconds of so many gathers of weights, or scatters of gradients, by ZeRO stage."""
        dense_V, expert_V = self._exchanged_s(branch, what)
        dense = np.array([times.get(zero, 0.0) for zero in branch.zero_dense])
        expert = np.array([times.get(zero, 0.0) for zero in branch.zero_expert])
        return np.asarray((dense_V[:, None, None] * dense[None, :, None] + expert_V[:, None, None] * expert)[:, None])

    def _in_passes(self, branch: Branch) -> Floats:
        """[V, 1, D, E]: of each micro-batch."""
        return self._sharding(branch, _SCATTERS, "gradients") + self._sharding(branch, {3: 2.0}, "weights")

    def _update(self, branch: Branch) -> Floats:
        """[P, 1, D, E]: of the optimizer."""
        weights, shape = self.weights(branch), self.bounds.shape(branch.layout)
        dense_replicas, expert_replicas = branch.layout.replicas
        dense = np.array([1 / dense_replicas if zero else 1.0 for zero in branch.zero_dense])
        expert = np.array([1 / expert_replicas if zero else 1.0 for zero in branch.zero_expert])
        held_PV = [list(held) for held in shape.virtual]
        dense_P = np.array([weights.dense[held].sum() for held in held_PV])
        expert_P = np.array([weights.expert[held].sum() for held in held_PV])
        updated = dense_P[:, None, None] * dense[None, :, None] + expert_P[:, None, None] * expert
        return self.bounds.prices.optimizer_s(updated)[:, None]

    # ---- one plan

    def plan_s(self, plan: Plan) -> float:
        """A closer bound of one plan."""
        assert self.bounds.coarse or plan.placement == self.bounds.placement
        copies = menu.module("schedules", plan.schedule).COPIES if self.bounds.training else 1
        return float(self.row_s(branch_of(plan, copies, (plan.dp * plan.cp * copies, plan.edp * copies)))[0, 0])

    def row_s(self, branch: Branch) -> Floats:
        """[D, E]: closer bounds of a branch of one row: its passes run in the schedule's order, each as long as its
        chain.
        """
        passes = self.bounds.passes(branch)
        ends = self._ends_s(branch, passes)
        if not self.bounds.training:
            return np.full((1, 1), max(each.end_s for each in ends))
        return np.asarray(self._closed_s(branch, ends) + self._once(branch, passes)[0][0])

    def _closed_s(self, branch: Branch, ends: list[Ends]) -> Floats:
        """[D, E]: when the last rank has made its update.

        The sharding stream reduces what a pass (under ZeRO 2 and 3) or all passes of a chunk together have left of
        gradients, one after another, none before that pass or the chunk's last one begins (or, where gradients do not
        overlap, ends).
        """
        overlaps = self.bounds.scenario.choices.overlap_gradients
        each_VDE, once_VDE = (seconds[:, 0] for seconds in self._reduced(branch))
        gather_VDE = self._sharding(branch, _GATHERS, "weights")[:, 0]
        update_PDE = self._update(branch)[:, 0]
        closed_DE = np.zeros(each_VDE.shape[1:])
        for (end_s, begin_s, over_s, chunk), stages, update_DE in zip(
            ends, map(list, self._virtual(branch)), update_PDE, strict=True
        ):
            reduced_DE = np.zeros_like(closed_DE)
            if each_VDE.any():
                left_DE = np.cumsum(each_VDE[stages][chunk[::-1]], axis=0)[::-1]
                reduced_DE = np.where(each_VDE.any(axis=0), (begin_s[:, None, None] + left_DE).max(axis=0), 0.0)
            last = len(chunk) - 1 - np.array([np.argmax(chunk[::-1] == each) for each in np.unique(chunk)])
            ready_s = (begin_s if overlaps else over_s)[last]
            for at in np.argsort(ready_s, kind="stable"):
                reduced_DE = np.maximum(reduced_DE, ready_s[at]) + once_VDE[stages[chunk[last[at]]]]
            gathered_DE = 0.0 if overlaps else gather_VDE[stages].sum(axis=0)
            closed_DE = np.maximum(closed_DE, np.maximum(end_s, reduced_DE) + update_DE + gathered_DE)
        return closed_DE

    def _virtual(self, branch: Branch) -> tuple[tuple[int, ...], ...]:
        """[rank][chunk] the virtual stage."""
        return self.bounds.shape(branch.layout).virtual

    def _ends_s(self, branch: Branch, passes: Passes) -> list[Ends]:
        """Of each pipeline rank."""
        layout, virtual = branch.layout, self._virtual(branch)
        plan = self._plan(layout, micro_batch=branch.micro_batch[0])

        def pair_s(stage: int, slot: Slot) -> Paths:
            paths = self._pair_s(branch, passes, stage, next(action.chunk for action in slot if action.kind == "F"))
            return paths if slot[0].kind == "F" else tuple(row[::-1] for row in paths[::-1])

        durations = [
            [
                {
                    "F": float(passes.forward[v, 0]), "B": float(passes.backward[v, 0]),
                    "I": float(passes.input_gradient[v, 0]), "W": float(passes.weight_gradient[v, 0]),
                }
                for v in held
            ]
            for held in virtual
        ]  # fmt: skip
        every = orders(plan, self.bounds.scenario)
        times = finish_times(
            every, virtual_stages=virtual, durations_s=durations, hop_s=float(passes.hop[0]),
            before_s=_before(passes), pair_s=pair_s if layout.copies > 1 else None,
        )  # fmt: skip
        found = []
        for order, start_s, finish_s in zip(every, times.start_s, times.finish_s, strict=True):
            slots, chunk = _gradients(order)
            found.append(Ends(finish_s[-1], np.array(start_s)[slots], np.array(finish_s)[slots], chunk))
        return found

    def _pair_s(self, branch: Branch, passes: Passes, rank: int, forward: int) -> Paths:
        """From the beginning of F (chunk `forward`) and of B to the end of each, in one slot."""
        held = self.bounds.shape(branch.layout).virtual[rank]
        f, b = held[forward], held[1 - forward]
        own = (float(passes.forward[f, 0]), float(passes.backward[b, 0]))
        if not self.bounds.prices.is_even:
            return ((own[0], 0.0), (0.0, own[1]))
        exact = [
            self.bounds.pairs.paths_s(branch, rank, forward, 1 - forward, begin=each)[:, 0].tolist() for each in (0, 1)
        ]
        return ((max(own[0], exact[0][0]), exact[0][1]), (exact[1][0], max(own[1], exact[1][1])))


@lru_cache(maxsize=256)
def _gradients(order: Order) -> tuple[Ints, Ints]:
    """In which slots a rank makes gradients of weights, and of which chunk."""
    found = [(at, action.chunk) for at, slot in enumerate(order) for action in slot if action.kind in "BW"]
    slots, chunk = np.array(found, np.int64).reshape(-1, 2).T
    return slots, chunk


def _before(passes: Passes) -> dict[str, list[float]]:
    """Of one plan, as `finish_times` asks for it."""
    forward, backward = passes.before_forward[:, 0].tolist(), passes.before_backward[:, 0].tolist()
    return {"F": forward, "B": backward, "I": backward}
