"""Lower bounds of the step time, for all plans of a branch at once: no plan can be simulated faster.

U rows of a branch (micro-batch, recomputation, algorithm, overlap), K kinds of layer, V virtual stages, P pipeline
ranks.

A pipeline rank works through its passes one after another: its first waits for one micro-batch to come through the
stages before it (fill), its last is followed by the passes that other ranks still have to do (drain), and each pass
takes at least its chain. Wires are priced as if nothing else used them, at position 0 of a stage; that position's
groups are as late as anyone's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import numpy as np

from moeplan import menu
from moeplan.cost.cost_model import Shares
from moeplan.domain.model import Layer
from moeplan.domain.placement import Placement
from moeplan.domain.program import Floats
from moeplan.domain.scenario import Scenario
from moeplan.partition.route import Load
from moeplan.planners._chains import Chain, Exchanges, backward, forward, weights
from moeplan.planners._groups import Grid, cheapest, even_wire, even_wires, grid_of, send_wire, uneven_wires
from moeplan.planners._outline import Outline, outline_of
from moeplan.planners._pairs import Pairs
from moeplan.planners._passes import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Chains,
    Passes,
    Shape,
    at_ends,
    between,
)
from moeplan.planners._prices import ENDS, WORKS, Kind, Prices, hottest
from moeplan.planners._space import Branch, Layout

_F, _B, _I, _W = FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT


@dataclass
class Bounds:
    """Bounds of the branches of one scenario."""

    scenario: Scenario
    coarse: bool = False
    """Bounds that hold wherever experts stand; under uneven routing they are faster than those of one placement."""
    replicas: bool = True
    """Coarse: of plans with at least one slot more on each place than experts need; else each expert stands once."""
    placement: Placement | None = None
    """Not coarse: of all plans that are asked for. The sum of the gradients of an expert's replicas is left out."""
    prices: Prices = field(init=False)
    _chains: dict[tuple[object, ...], Chains] = field(default_factory=dict)
    _of_branch: dict[int, tuple[Branch, Chains]] = field(default_factory=dict)
    _floors: dict[int, tuple[Floats, Floats, Floats]] = field(default_factory=dict)
    _shapes: dict[tuple[object, ...], Shape] = field(default_factory=dict)
    _pipelines: dict[tuple[object, ...], Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prices = Prices(
            self.scenario, coarse=self.coarse, replicas=self.replicas, placement=self.placement
        )  # fmt: skip

    @cached_property
    def _shares(self) -> Shares:
        """What kernels and exchanges leave each other; under uneven routing nothing is said of it."""
        return self.prices.cost_model.shares if self.prices.is_even else Shares()

    @cached_property
    def training(self) -> bool:
        """Whether there is a backward pass."""
        return self.scenario.workload.is_training

    # ---- the whole

    def floor_s(self, branch: Branch) -> float:
        """At least the seconds of every row, at a glance: all passes spread over all pipeline ranks, without a bubble.

        The mean over the ranks is no more than the last rank takes. Exchanges count where nothing else hides them:
        under even routing, and without slots of two, all but those at the ends of virtual stages.
        """
        layout, chains = branch.layout, self.chains(branch)
        if id(chains) not in self._floors:
            self._floors[id(chains)] = self._micro_batch_s(chains)
        busy, span, ends = self._floors[id(chains)]
        once = busy
        if layout.copies == 1 and self.prices.is_even and not self.coarse:
            once = np.maximum(once, span - len(layout.stages) * ends)
        return float((self.microbatches(branch) * once).min() / layout.pp)

    def _micro_batch_s(self, chains: Chains) -> tuple[Floats, Floats, Floats]:
        """[U]: kernels of a micro-batch in the whole model, its chains, and what may be hidden in a virtual stage."""
        of_layer = self.prices.kinds[1]
        counts_K = np.bincount(of_layer, minlength=len(self.prices.kinds[0])).astype(np.float64)
        onward, back, split = (chains.by_pass[name] for name in ("forward", "backward", "input_gradient"))
        last = chains.ends[:2].sum(axis=0)
        if not self.training:
            return (
                counts_K @ onward.busy + last[_F],
                counts_K @ onward.span + last[_F],
                (onward.lead + onward.trail).max(axis=0),
            )
        found = []
        for what in ("busy", "span"):
            backward = np.minimum(counts_K @ getattr(back, what), counts_K @ (getattr(split, what) + chains.weights))
            found.append(
                counts_K @ getattr(onward, what) + backward + last[_F] + np.minimum(last[_B], last[_I] + last[_W])
            )
        loose = [(chain.lead + chain.trail).max(axis=0) for chain in (onward, back, split)]
        return found[0], found[1], loose[0] + np.maximum(loose[1], loose[2])

    def pipeline_s(self, branch: Branch) -> Floats:
        """[U]: of all passes, without what is done once a step; orders of ranks with the same wires share it."""
        layout = branch.layout
        shape = (layout.stages, layout.schedule, layout.vpp, layout.pp)
        key = (id(self.chains(branch)), *shape, send_wire(self.prices, layout))
        if key not in self._pipelines:
            fill, work, drain = self.ranks_s(branch, self.passes(branch))
            self._pipelines[key] = (fill + work + drain).max(axis=0)
        return self._pipelines[key]

    def ranks_s(self, branch: Branch, passes: Passes, *, closely: bool = False) -> tuple[Floats, Floats, Floats]:
        """[P, U]: when each pipeline rank can start, how long it works, and what must follow its last pass.

        `closely`: slots of two are looked at step by step on one rank, which takes longer.
        """
        layout, shape = branch.layout, self.shape(branch.layout)
        outline = outline_of(layout, self.training)
        none = np.zeros((1, len(passes.hop)))
        then = np.concatenate([passes.before_forward[1:], none])
        onward = np.concatenate([none, np.cumsum(passes.forward + passes.hop + then, axis=0)])
        least = np.minimum(passes.backward, passes.input_gradient) + passes.before_backward
        backward = np.concatenate([none, np.cumsum(least + passes.hop, axis=0)])
        ends = [outline.last[rank] for rank in range(layout.pp)]
        fill = onward[[held[start[1]] for held, start in zip(shape.virtual, outline.first, strict=True)]]
        drain = np.array(
            [self._drain_s(end, held, onward, backward) for end, held in zip(ends, shape.virtual, strict=True)]
        )
        return fill, self._work_s(passes, branch, outline, closely=closely and self.prices.is_even), drain

    @staticmethod
    def _drain_s(end: tuple[str, int], held: Sequence[int], onward: Floats, backward: Floats) -> Floats:
        if end[0] == "F":
            return np.asarray(onward[-1] - onward[held[end[1]] + 1])
        return backward[held[end[1]]] if end[0] in "BI" else np.zeros_like(backward[0])

    def _work_s(self, passes: Passes, branch: Branch, outline: Outline, *, closely: bool) -> Floats:
        """[P, U]: `closely`: slots of two are looked at step by step on one rank."""
        layout, microbatches = branch.layout, self.microbatches(branch)
        held_PC = np.array(self.shape(layout).virtual)
        once = passes.forward + passes.any_backward if self.training else passes.forward
        if layout.copies == 1 or not self.training:
            return np.asarray(microbatches * once[held_PC].sum(axis=1))
        paired = np.array([np.maximum(a + b * microbatches, 0.0) for a, b in outline.pairs])
        down, up = held_PC.T
        pair = np.minimum(passes.pair_s(down, up), passes.pair_s(up, down))
        if closely:
            rank = layout.pp // 2
            exact = [self.pairs.paths_s(branch, rank, *chunks, begin=0).max(axis=0) for chunks in ((0, 1), (1, 0))]
            pair[rank] = np.maximum(pair[rank], np.minimum(*exact))
        return np.asarray(paired * pair + (microbatches - paired) * once[held_PC].min(axis=1))

    @cached_property
    def pairs(self) -> Pairs:
        """Slots of two passes."""
        return Pairs(self)

    def microbatches(self, branch: Branch) -> Floats:
        """[U]: micro-batches of each row."""
        per_replica = self.scenario.workload.global_batch // branch.layout.dp
        sizes = np.array(branch.micro_batch, np.float64)
        return _spread(per_replica / sizes[:, None, None, None], tuple(len(values) for values in branch.lists[:4]))

    # ---- passes through stages

    def passes(self, branch: Branch) -> Passes:
        """The chains of every virtual stage: its layers, the embedding before the first, head and predictions after
        the last.
        """
        layout, shape, chains = branch.layout, self.shape(branch.layout), self.chains(branch)
        ends = chains.ends
        forward = self._stages(chains.by_pass["forward"].span, _F, shape, chains)
        backward = self._stages(chains.by_pass["backward"].span, _B, shape, chains)
        input_gradient, weight_gradient = backward, np.zeros_like(backward)
        if outline_of(layout, self.training).splits:
            input_gradient = self._stages(chains.by_pass["input_gradient"].span, _I, shape, chains)
            weight_gradient = shape.counts_VK @ chains.weights
            weight_gradient[-1] += ends[1, _W]
            for kind in shape.extra:
                weight_gradient[-1] += chains.weights[kind] + ends[1, _W] + ends[2, _W]
        early = chains.exchanges[0].early
        if outline_of(layout, self.training).splits and (self.coarse or not self.prices.is_even):
            weight_gradient = np.maximum(weight_gradient - early, 0.0)
            ahead = self._ahead_s(chains)
            forward, backward, input_gradient = (
                np.maximum(each - ahead, 0.0) for each in (forward, backward, input_gradient)
            )
        busy = [np.zeros((1, 1))] * 6
        if layout.copies > 1:
            busy = [self.summed(branch, p, what) for p in (_F, _B) for what in ("busy", "sent", "flow")]
            busy[0] = np.maximum(busy[0] - early, 0.0)
        hop, size = send_wire(self.prices, layout), self.send_bytes(branch)
        before = between(shape, chains)
        return Passes(
            before_forward=before[0], before_backward=before[1],
            forward=forward, backward=backward, input_gradient=input_gradient, weight_gradient=weight_gradient,
            busy_forward=busy[0], sent_forward=busy[1], flow_forward=busy[2],
            busy_backward=busy[3], sent_backward=busy[4], flow_backward=busy[5], shares=self._shares,
            hop=(hop.latency_s + hop.per_byte_s * size) if len(shape.virtual) > 1 else np.zeros_like(size),
        )  # fmt: skip

    def summed(self, branch: Branch, p: int, what: str) -> Floats:
        """[V, U]: kernels (the model's ends too), exchanges or flows of one pass through each virtual stage."""
        shape, chains = self.shape(branch.layout), self.chains(branch)
        found: Floats = shape.counts_VK @ getattr(chains.by_pass[("forward", "backward", "input_gradient")[p]], what)
        if what == "busy":
            found[0] += chains.ends[0, p]
            found[-1] += chains.ends[1, p]
        return found

    def _ahead_s(self, chains: Chains) -> Floats:
        """[U]: at most what the shared branch of a pass's first layer delays its experts.

        Under uneven routing a place that has worked on weight gradients longer than the hottest one comes behind it,
        and the hottest one's shared branch may be over by then.
        """
        found = np.zeros_like(chains.exchanges[0].early)
        for cost_P, x in zip(chains.costs, chains.exchanges, strict=True):
            for cost in cost_P[:_W]:
                found = np.maximum(found, x.tensor + cost["shared"] - x.early - x.dispatch_hottest)
        return found

    @staticmethod
    def _stages(span_KU: Floats, p: int, shape: Shape, chains: Chains) -> Floats:
        """[V, U]: one pass through each virtual stage, less the exchanges at its ends that others may hide."""
        ends, (loose, trail) = chains.ends[:, p], at_ends(p, shape, chains)
        total = shape.counts_VK @ span_KU
        if p != _I:
            total[0] += ends[0]
        total[-1] += ends[1]
        for kind in shape.extra:
            total[-1] += span_KU[kind] + ends[1] + ends[2]
        return np.maximum(total - loose - trail, 0.0)

    def send_bytes(self, branch: Branch) -> Floats:
        """[U]: of one send."""
        layout, model, workload = branch.layout, self.scenario.model, self.scenario.workload
        sizes = np.array(branch.micro_batch, np.float64)[:, None, None, None] * workload.query_length
        tokens = np.ceil(sizes / (layout.cp if workload.phase != "decode" else 1) / layout.tp)
        width = model.hidden_size * max(1, model.layers[0].hyper_streams)
        size = tokens * width * self.prices.element_bytes("activations")
        return _spread(size, tuple(len(values) for values in branch.lists[:4]))

    def shape(self, layout: Layout) -> Shape:
        """How the kinds of layer are spread over the virtual stages."""
        key = (layout.stages, layout.schedule, layout.vpp, layout.pp)
        if key not in self._shapes:
            kinds, of_layer, extra = self.prices.kinds
            bounds = np.cumsum([0, *layout.stages])
            counts = np.zeros((len(layout.stages), len(kinds)))
            for stage, (start, end) in enumerate(pairwise(bounds)):
                counts[stage] = np.bincount(of_layer[start:end], minlength=len(kinds))
            machine = menu.module("schedules", layout.schedule)
            virtual = tuple(
                tuple(
                    machine.virtual_stage(rank, c, num_stages=layout.pp, num_chunks=layout.vpp)
                    for c in range(layout.vpp)
                )
                for rank in range(layout.pp)
            )
            trained = self.training and self.scenario.workload.train_mtp
            self._shapes[key] = Shape(
                counts_VK=counts, kinds_V=tuple(of_layer[a:b] for a, b in pairwise(bounds)),
                first_V=np.array([of_layer[b] for b in bounds[:-1]]),
                last_V=np.array([of_layer[b - 1] for b in bounds[1:]]), extra=extra if trained else (), virtual=virtual,
            )  # fmt: skip
        return self._shapes[key]

    # ---- chains of layers

    def chains(self, branch: Branch) -> Chains:
        """The chains of the layers in every row; branches with the same lists, degrees and wires share them."""
        if (known := self._of_branch.get(id(branch))) is not None and known[0] is branch:
            return known[1]
        found = self._shared(branch)
        self._of_branch[id(branch)] = (branch, found)
        return found

    def _shared(self, branch: Branch) -> Chains:
        grid = grid_of(branch.layout)
        wires = [cheapest(self.prices, grid, axis) for axis in ("tp", "cp", "etp")]
        if grid.ep > 1 and self.prices.is_even:
            wires += even_wires(self.prices, grid, branch)
        which = () if self.prices.is_even else (grid.far, grid.edp, grid.block, grid.pp)
        degrees = (grid.tp, grid.cp, grid.ep, grid.etp)
        key = (*degrees, *wires, *which, branch.micro_batch, branch.recompute, branch.all_to_all, branch.overlap_degree)
        if key not in self._chains:
            self._chains[key] = self._build(branch, grid)
        return self._chains[key]

    def _build(self, branch: Branch, grid: Grid) -> Chains:
        sizes = tuple(len(values) for values in branch.lists[:4])
        layers = [[self.prices.layers(grid.tp, grid.cp, m, r) for r in branch.recompute] for m in branch.micro_batch]
        table_MRKWP = np.array([[table for table, _ in row] for row in layers])
        ends_MREP = np.array([[ends for _, ends in row] for row in layers])
        exchanges, experts = self._exchanges(branch, grid)
        full = _spread(np.array([each == "full" for each in branch.recompute])[None, :, None, None], sizes)
        built: dict[str, list[Chain]] = {"forward": [], "backward": [], "input_gradient": []}
        gradient: list[Floats] = []
        costs: list[list[dict[str, Floats]]] = []
        for k, kind in enumerate(self.prices.kinds[0]):
            cost = [
                {w: _spread(table_MRKWP[:, :, None, None, k, at, p], sizes) for at, w in enumerate(WORKS)}
                | {
                    name: _spread(experts[:, :, None, :, k, at, p], sizes)
                    for at, name in enumerate(("experts", "steady_experts"))
                }
                for p in range(4)
            ]
            costs.append(cost)
            onward = _by_parts(forward, cost[_F], exchanges[k], branch, kind.layer)
            built["forward"].append(onward)
            for name, p in (("backward", _B), ("input_gradient", _I)):
                chain = _by_parts(backward, cost[p], exchanges[k], branch, kind.layer)
                built[name].append(_where(full, onward.then(chain), chain))
            parts = _spread(np.array(branch.overlap_degree)[None, None, None, :], sizes)
            gradient.append(weights(cost[_W], parts=parts))
        ends = np.array(
            [[_spread(ends_MREP[:, :, None, None, e, p], sizes) for p in range(4)] for e in range(len(ENDS))]
        )
        return Chains(
            by_pass={name: _stacked(chains) for name, chains in built.items()}, weights=np.array(gradient), ends=ends,
            costs=costs, exchanges=exchanges,
        )  # fmt: skip

    def _exchanges(self, branch: Branch, grid: Grid) -> tuple[list[Exchanges], Floats]:
        """For each kind the exchanges of every row, and [M, R, O, K, 2, P] seconds of the experts."""
        model, workload, prices = self.scenario.model, self.scenario.workload, self.prices
        kinds, act = prices.kinds[0], prices.element_bytes("activations")
        tensor, context = cheapest(prices, grid, "tp"), cheapest(prices, grid, "cp")
        sizes = tuple(len(values) for values in branch.lists[:4])
        fields = Exchanges.__dataclass_fields__.keys() - {"is_certain", "is_even", "shares"}
        columns = {name: np.zeros((len(kinds), *sizes)) for name in sorted(fields)}
        experts = np.zeros((sizes[0], sizes[1], sizes[3], len(kinds), 2, 4))
        certain = np.zeros(sizes, bool)
        for m, micro_batch in enumerate(branch.micro_batch):
            plan, load = prices.load(grid.ep, grid.etp, grid.tp, grid.cp, micro_batch)
            batch = micro_batch * workload.query_length
            group = batch if workload.phase == "decode" else batch // grid.cp
            if grid.tp > 1:
                size = group * model.hidden_size * act
                columns["tensor"][:, m] = tensor.latency_s + tensor.per_byte_s * size
                columns["tensor_flow"][:, m] = tensor.flow_s_per_byte * size
            for (r, recompute), (o, parts) in product(enumerate(branch.recompute), enumerate(branch.overlap_degree)):
                experts[m, r, o] = prices.experts(plan, load, recompute=recompute, parts=parts)
                certain[m, r, :, o] = prices.is_certain(load, parts)
            for k, kind in enumerate(kinds):
                per_token = sum(block.cache_elements_per_token(grid.tp) for block in kind.layer.blocks)
                if grid.cp > 1 and per_token and workload.phase != "decode":
                    columns["context"][k, m] = context.latency_s + context.per_byte_s * per_token * batch * act
                    columns["context_flow"][k, m] = context.flow_s_per_byte * per_token * batch * act
                if kind.layer.is_moe and load is not None:
                    out = {name: column[k, m] for name, column in columns.items()}
                    self._routed(out, kind, branch, grid, load, micro_batch=micro_batch)
        columns["early"][:] = columns["early"].max(axis=0)
        return [
            Exchanges(
                **{name: column[k].ravel() for name, column in columns.items()}, is_certain=certain.ravel(),
                is_even=prices.is_even, shares=self._shares,
            )
            for k in range(len(kinds))
        ], experts  # fmt: skip

    def _routed(
        self, out: dict[str, Floats], kind: Kind, branch: Branch, grid: Grid, load: Load, *, micro_batch: int
    ) -> None:
        """Fills in dispatch, combine and expert-tensor exchanges [R, A, O] of one kind and micro-batch."""
        experts, prices = kind.layer.experts, self.prices
        assert experts is not None
        parts_O = np.array(branch.overlap_degree, np.float64)
        tokens, _ = load.traffic(kind.moe)
        elements_O = tokens * prices.spread(load) * experts.expert_input / parts_O / grid.etp
        sure = prices.sure(load, kind)
        there_O, back_O = (elements_O * prices.element_bytes(way) for way in ("dispatch", "combine"))
        for a, algorithm in enumerate(branch.all_to_all if grid.ep > 1 else ()):
            if prices.is_even:
                both, own, home, first = (even_wire(prices, grid, algorithm, micro_batch, kind.moe),) * 4
            else:
                both, own, home, first = uneven_wires(prices, grid, algorithm, load, kind.moe)
            out["dispatch"][:, a] = sure * both.latency_s + both.per_byte_s * there_O
            out["dispatch_hottest"][:, a] = sure * own.latency_s + own.per_byte_s * there_O
            out["combine"][:, a] = sure * home.latency_s + home.per_byte_s * back_O
            out["dispatch_bytes"][:, a], out["combine_bytes"][:, a] = there_O, back_O
            out["dispatch_flow"][:, a], out["combine_flow"][:, a] = (
                both.flow_s_per_byte * there_O,
                home.flow_s_per_byte * back_O,
            )
            first_s = sure * home.latency_s if self.coarse else first.latency_s + first.per_byte_s * back_O
            out["early"][:, a] = out["combine"][:, a] - first_s
        if grid.etp > 1:
            wire, width = cheapest(prices, grid, "etp"), experts.expert_input * prices.element_bytes("activations")
            for o, parts in enumerate(branch.overlap_degree):
                rows = sum(load.rows(kind.moe, hottest(load, kind.moe), part=0, parts=parts))
                out["expert_tensor"][..., o] = wire.latency_s + wire.per_byte_s * rows * width
                out["expert_tensor_flow"][..., o] = wire.flow_s_per_byte * rows * width


def _spread(table: Floats, sizes: tuple[int, ...]) -> Floats:
    """A table by micro-batch, recomputation, algorithm and overlap, broadcast and laid out as rows."""
    return np.broadcast_to(table, sizes).ravel()


def _by_parts(
    chain_of: Callable[..., Chain], cost: dict[str, Floats], x: Exchanges, branch: Branch, layer: Layer
) -> Chain:
    """The chain of every row, rows of one overlap degree together (they run fastest among the rows)."""
    flags = {
        "has_mixer": bool(layer.blocks), "has_experts": layer.is_moe,
        "has_dense": layer.feed_forward is not None and not layer.is_moe,
    }  # fmt: skip
    out = {name: np.empty_like(x.tensor) for name in Chain.__dataclass_fields__}
    for o, parts in enumerate(branch.overlap_degree):
        at = slice(o, None, len(branch.overlap_degree))
        columns: dict[str, Any] = {name: getattr(x, name) for name in Exchanges.__dataclass_fields__}
        columns = {name: each[at] if isinstance(each, np.ndarray) else each for name, each in columns.items()}
        some = Exchanges(**columns)
        chain = chain_of({name: value[at] for name, value in cost.items()}, some, parts=parts, **flags)
        for name, value in out.items():
            value[at] = getattr(chain, name)
    return Chain(**out)


def _stacked(chains: list[Chain]) -> Chain:
    return Chain(**{name: np.array([getattr(chain, name) for chain in chains]) for name in Chain.__dataclass_fields__})


def _where(condition: Floats, yes: Chain, no: Chain) -> Chain:
    return Chain(**{n: np.where(condition, getattr(yes, n), getattr(no, n)) for n in Chain.__dataclass_fields__})
