"""Lower bounds of the step time, for all plans of a branch at once: no plan can be simulated faster.

U rows of a branch (micro-batch, recomputation, algorithm, overlap), K kinds of layer, V virtual stages, P pipeline ranks.

A pipeline rank works through its passes one after another: its first waits for one micro-batch to come through the stages before
it (fill), its last is followed by the passes that other ranks still have to do (drain), and each pass takes at least its
chain. Wires are priced as if nothing else used them, at position 0 of a stage; that position's groups are as late as anyone's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product

import numpy as np

from moeplan import menu
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Ints
from moeplan.domain.scenario import Scenario
from moeplan.planners._chains import Chain, Exchanges, backward, forward, weights
from moeplan.planners._groups import Grid, cheapest, grid_of, send_wire, uneven_wires
from moeplan.planners._prices import WORKS, Prices, hottest
from moeplan.planners._space import Branch, Layout
from moeplan.schedules import Order

_F, _B, _I, _W = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Least seconds of the passes through each virtual stage, [V, U]: chains of F, B, I; W; and what a pair can hide."""

    forward: Floats
    backward: Floats
    input_gradient: Floats
    weight_gradient: Floats
    busy_forward: Floats
    busy_backward: Floats
    sent_forward: Floats
    sent_backward: Floats
    hop: Floats
    """[U]: from one pipeline rank to the next."""

    @property
    def any_backward(self) -> Floats:
        """A whole backward pass, split or not."""
        return np.minimum(self.backward, self.input_gradient + self.weight_gradient)

    @property
    def pair(self) -> Floats:
        """[V, V, U]: F of one virtual stage and B of another in one slot."""
        alone = np.maximum(self.forward[:, None], self.backward[None])
        busy = self.busy_forward[:, None] + self.busy_backward[None]
        sent = self.sent_forward[:, None] + self.sent_backward[None]
        return np.maximum(np.maximum(alone, busy), sent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Where the layers are: how many of each kind in each virtual stage, its first and last kind, and who does what."""

    counts_VK: Floats
    first_V: Ints
    last_V: Ints
    extra: tuple[int, ...]
    """Kinds of the layers of multi-token prediction."""
    virtual: tuple[tuple[int, ...], ...]


@dataclass
class Bounds:
    """Bounds of the branches of one scenario."""

    scenario: Scenario
    prices: Prices = field(init=False)
    _chains: dict[tuple[object, ...], dict[str, Chain | Floats]] = field(default_factory=dict)
    _shapes: dict[tuple[object, ...], Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prices = Prices(self.scenario)

    @cached_property
    def training(self) -> bool:
        """Whether there is a backward pass."""
        return self.scenario.workload.is_training

    # ---- the whole

    def pipeline_s(self, branch: Branch) -> Floats:
        """[U]: of all passes, without what is done once a step."""
        passes = self.passes(branch)
        fill, work, drain = self.ranks_s(branch, passes)
        return (fill + work + drain).max(axis=0)

    def ranks_s(self, branch: Branch, passes: Passes) -> tuple[Floats, Floats, Floats]:
        """[P, U]: when each pipeline rank can start, how long it works, and what must follow its last pass."""
        layout, shape = branch.layout, self.shape(branch.layout)
        microbatches = self.microbatches(branch)
        outline = outline_of(layout, self.training)
        onward = np.concatenate([np.zeros((1, len(passes.hop))), np.cumsum(passes.forward + passes.hop, axis=0)])
        least = np.minimum(passes.backward, passes.input_gradient)
        backward = np.concatenate([np.zeros((1, len(passes.hop))), np.cumsum(least + passes.hop, axis=0)])
        fill, work, drain = [], [], []
        for rank, held in enumerate(shape.virtual):
            start, end = outline.first[rank], outline.last[rank]
            fill.append(onward[held[start[1]]])
            work.append(self._work_s(passes, held, layout, microbatches, outline.pairs[rank]))
            drain.append(self._drain_s(end, held, onward, backward))
        return np.array(fill), np.array(work), np.array(drain)

    @staticmethod
    def _drain_s(end: tuple[str, int], held: Sequence[int], onward: Floats, backward: Floats) -> Floats:
        if end[0] == "F":
            return np.asarray(onward[-1] - onward[held[end[1]] + 1])
        return backward[held[end[1]]] if end[0] in "BI" else np.zeros_like(backward[0])

    def _work_s(
        self, passes: Passes, held: Sequence[int], layout: Layout, microbatches: Floats, pairs: tuple[float, float]
    ) -> Floats:
        stages = list(held)
        if not self.training:
            return microbatches * passes.forward[stages].sum(axis=0)
        once = passes.forward[stages] + passes.any_backward[stages]
        if layout.copies == 1:
            return np.asarray(microbatches * once.sum(axis=0))
        paired = np.maximum(pairs[0] + pairs[1] * microbatches, 0.0)
        pair = passes.pair[np.ix_(stages, stages)]
        cheapest_pair = np.minimum(pair[0, 1], pair[1, 0])
        return np.asarray(paired * cheapest_pair + (microbatches - paired) * once.min(axis=0))

    def microbatches(self, branch: Branch) -> Floats:
        """[U]: micro-batches of each row."""
        per_replica = self.scenario.workload.global_batch // branch.layout.dp
        sizes = np.array(branch.micro_batch, np.float64)
        return _rows(per_replica / sizes[:, None, None, None], branch)

    # ---- passes through stages

    def passes(self, branch: Branch) -> Passes:
        """The chains of every virtual stage."""
        layout, shape = branch.layout, self.shape(branch.layout)
        chain, ends = self.chains(branch)
        last = len(shape.counts_VK) - 1
        built: dict[str, list[Floats]] = {name: [] for name in Passes.__dataclass_fields__ if name != "hop"}
        for stage in range(last + 1):
            for name, value in self._stage(stage, last, shape, chain, ends).items():
                built[name].append(value)
        hop = send_wire(self.prices, layout)
        size = self._send_bytes(branch)
        hop_U = (hop.latency_s + hop.per_byte_s * size) if len(shape.virtual) > 1 else np.zeros_like(size)
        return Passes(hop=hop_U, **{name: np.array(values) for name, values in built.items()})

    def _stage(
        self, stage: int, last: int, shape: Shape, chain: dict[str, tuple[Chain, ...]], ends: Floats
    ) -> dict[str, Floats]:
        """One virtual stage: its layers, the embedding before the first, head and predictions behind the last."""
        first, final, tail = stage == 0, stage == last, shape.extra if stage == last else ()
        embedding, head, prediction = ends
        out: dict[str, Floats] = {}
        for name, key, p in (("forward", "F", _F), ("backward", "B", _B), ("input_gradient", "I", _I)):
            at = chain[key]
            total = _summed([c.span for c in at], shape.counts_VK[stage])
            busy = _summed([c.busy for c in at], shape.counts_VK[stage])
            sent = _summed([c.sent for c in at], shape.counts_VK[stage])
            for kind in tail:
                total, busy = total + at[kind].span + head[p] + prediction[p], busy + at[kind].busy + head[p] + prediction[p]
                sent = sent + at[kind].sent
            own = (embedding[p] if first and p != _I else 0.0) + (head[p] if final else 0.0)
            opens, closes = (first, final) if p == _F else (final, first and p == _B)
            start, end = (shape.first_V, shape.last_V) if p == _F else (shape.last_V, shape.first_V)
            loose = (0.0 if opens else at[start[stage]].lead) + (0.0 if closes else at[end[stage]].trail)
            out[name] = np.maximum(total + own - loose, 0.0)
            if name != "input_gradient":
                out[f"busy_{name}"], out[f"sent_{name}"] = busy + own, sent
        gradient = _summed(list(chain["W"]), shape.counts_VK[stage])
        for kind in tail:
            gradient = gradient + chain["W"][kind] + head[_W] + prediction[_W]
        out["weight_gradient"] = gradient + (head[_W] if final else 0.0)
        return out

    def _send_bytes(self, branch: Branch) -> Floats:
        """[U]: of one send."""
        layout, model, workload = branch.layout, self.scenario.model, self.scenario.workload
        sizes = np.array(branch.micro_batch, np.float64)[:, None, None, None] * workload.query_length
        tokens = np.ceil(sizes / (layout.cp if workload.phase != "decode" else 1) / layout.tp)
        width = model.hidden_size * max(1, model.layers[0].hyper_streams)
        return _rows(tokens * width * self.prices.element_bytes("activations"), branch)

    def shape(self, layout: Layout) -> Shape:
        """How the kinds of layer are spread over the virtual stages."""
        key = (layout.stages, layout.schedule, layout.vpp, layout.pp)
        if key not in self._shapes:
            kinds, of_layer, extra = self.prices.kinds
            bounds = np.cumsum([0, *layout.stages])
            counts = np.zeros((len(layout.stages), len(kinds)))
            for stage, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
                counts[stage] = np.bincount(of_layer[start:end], minlength=len(kinds))
            machine = menu.module("schedules", layout.schedule)
            virtual = tuple(
                tuple(machine.virtual_stage(rank, c, num_stages=layout.pp, num_chunks=layout.vpp) for c in range(layout.vpp))
                for rank in range(layout.pp)
            )
            trained = self.training and self.scenario.workload.train_mtp
            self._shapes[key] = Shape(
                counts_VK=counts, first_V=np.array([of_layer[b] for b in bounds[:-1]]),
                last_V=np.array([of_layer[b - 1] for b in bounds[1:]]), extra=extra if trained else (), virtual=virtual,
            )  # fmt: skip
        return self._shapes[key]

    # ---- chains of layers

    def chains(self, branch: Branch) -> tuple[dict[str, tuple[Chain, ...]], Floats]:
        """By pass the chain of each kind (for W its seconds), and [end, pass, U] of the model's ends."""
        grid = grid_of(branch.layout)
        key = (grid, branch.micro_batch, branch.recompute, branch.all_to_all, branch.overlap_degree)
        if key not in self._chains:
            self._chains[key] = self._build(branch, grid)  # type: ignore[assignment]
        return self._chains[key]  # type: ignore[return-value]

    def _build(self, branch: Branch, grid: Grid) -> tuple[dict[str, tuple[Chain, ...]], Floats]:
        rows = list(product(branch.micro_batch, branch.recompute, branch.all_to_all, branch.overlap_degree))
        layers = [self.prices.layers(grid.tp, grid.cp, row[0], row[1]) for row in rows]
        table_UKWP = np.array([table for table, _ in layers])
        ends = np.array([ends for _, ends in layers]).transpose(1, 2, 0)
        exchanges, experts_UKP = self._exchanges(branch, grid, rows)
        full = np.array([row[1] == "full" for row in rows])
        out: dict[str, list[Chain]] = {"F": [], "B": [], "I": []}
        gradient: list[Floats] = []
        for k, kind in enumerate(self.prices.kinds[0]):
            layer = kind.layer
            flags = {
                "has_mixer": bool(layer.blocks), "has_experts": layer.is_moe,
                "has_dense": layer.feed_forward is not None and not layer.is_moe,
            }  # fmt: skip
            cost = [
                {**{w: table_UKWP[:, k, at, p] for at, w in enumerate(WORKS)}, "experts": experts_UKP[:, k, p]}
                for p in range(4)
            ]
            chosen = [_by_parts(forward, c, exchanges[k], branch, flags) for c in cost[:1]]
            again = [_by_parts(backward, c, exchanges[k], branch, flags) for c in cost[1:3]]
            out["F"].append(chosen[0])
            for name, chain in zip("BI", again, strict=True):
                out[name].append(_where(full, chosen[0].then(chain), chain))
            gradient.append(weights(cost[_W], parts=np.array([row[3] for row in rows])))  # type: ignore[arg-type]
        found: dict[str, tuple[Chain, ...]] = {name: tuple(values) for name, values in out.items()}
        found["W"] = tuple(gradient)  # type: ignore[arg-type]
        return found, ends

    def _exchanges(
        self, branch: Branch, grid: Grid, rows: list[tuple[int, str, str, int]]
    ) -> tuple[list[Exchanges], Floats]:
        """For each kind the exchanges of every row, and [U, K, P] seconds of the experts."""
        model, workload, prices = self.scenario.model, self.scenario.workload, self.prices
        kinds = prices.kinds[0]
        act = prices.element_bytes("activations")
        tensor, context = cheapest(prices, grid, "tp"), cheapest(prices, grid, "cp")
        columns = {name: np.zeros((len(kinds), len(rows))) for name in ("t", "c", "x", "d", "h", "b")}
        experts = np.zeros((len(rows), len(kinds), 4))
        for u, (micro_batch, recompute, algorithm, parts) in enumerate(rows):
            plan, load = prices.load(grid.ep, grid.etp, grid.tp, grid.cp, micro_batch)
            plan = plan.model_copy(update={"recompute": recompute})
            batch = micro_batch * workload.query_length
            group = batch if workload.phase == "decode" else batch // grid.cp
            if grid.tp > 1:
                columns["t"][:, u] = tensor.latency_s + tensor.per_byte_s * group * model.hidden_size * act
            experts[u] = prices.experts(grid.ep, grid.etp, -(-group // grid.tp), parts, plan=plan, load=load)
            for k, kind in enumerate(kinds):
                per_token = sum(block.cache_elements_per_token(grid.tp) for block in kind.layer.blocks)
                if grid.cp > 1 and per_token and workload.phase != "decode":
                    columns["c"][k, u] = context.latency_s + context.per_byte_s * per_token * batch * act
                if kind.layer.experts is not None and load is not None:
                    self._routed(columns, k, u, grid=grid, algorithm=algorithm, parts=parts, load=load)
        return [
            Exchanges(
                tensor=columns["t"][k], context=columns["c"][k], expert_tensor=columns["x"][k], dispatch=columns["d"][k],
                dispatch_hottest=columns["h"][k], combine=columns["b"][k], is_even=prices.is_even,
            )
            for k in range(len(kinds))
        ], experts  # fmt: skip

    def _routed(self, columns: dict[str, Floats], k: int, u: int, *, grid: Grid, algorithm: str, parts: int, load: object) -> None:
        """Dispatch, combine and expert-tensor exchanges of one kind in one row."""
        from moeplan.compiler.route import Load

        assert isinstance(load, Load)
        kind, prices = self.prices.kinds[0][k], self.prices
        experts = kind.layer.experts
        assert experts is not None
        if grid.ep > 1:
            tokens, share = load.traffic(kind.moe)
            elements = tokens * experts.expert_input / parts / grid.etp
            out, back = elements * prices.element_bytes("dispatch"), elements * prices.element_bytes("combine")
            if share is None:
                wire = cheapest(prices, grid, "ep", algorithm)
                columns["d"][k, u] = columns["h"][k, u] = wire.latency_s + wire.per_byte_s * out
                columns["b"][k, u] = wire.latency_s + wire.per_byte_s * back
            else:
                there, own, home = uneven_wires(prices, grid, algorithm, load, kind.moe)
                columns["d"][k, u] = there.latency_s + there.per_byte_s * out
                columns["h"][k, u] = own.latency_s + own.per_byte_s * out
                columns["b"][k, u] = home.latency_s + home.per_byte_s * back
        if grid.etp > 1:
            wire = cheapest(prices, grid, "etp")
            rows = sum(load.rows(kind.moe, hottest(load, kind.moe), part=0, parts=parts))
            columns["x"][k, u] = wire.latency_s + wire.per_byte_s * rows * experts.expert_input * prices.element_bytes("activations")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What does not depend on the number of micro-batches: the first and last pass of each rank, and how pairs grow."""

    first: tuple[tuple[str, int], ...]
    last: tuple[tuple[str, int], ...]
    pairs: tuple[tuple[float, float], ...]
    """Slots of two actions: a + b * micro-batches."""


def outline_of(layout: Layout, training: bool) -> Outline:
    """Read off two short runs of the schedule."""
    if not training:
        return Outline(first=(("F", 0),) * layout.pp, last=(("F", 0),) * layout.pp, pairs=((0.0, 0.0),) * layout.pp)
    return _outline(layout.schedule, layout.pp, layout.vpp)


@lru_cache(maxsize=1024)
def _outline(schedule: str, pp: int, vpp: int) -> Outline:
    actions = menu.load("schedules", schedule, "actions")
    few, more = 2 * pp, 4 * pp
    short: tuple[Order, ...] = actions(pp, few, num_chunks=vpp)
    pairs = [
        [sum(len(slot) == 2 for slot in order) for order in actions(pp, count, num_chunks=vpp)] for count in (few, more)
    ]
    slope = [(b - a) / (more - few) for a, b in zip(*pairs, strict=True)]
    return Outline(
        first=tuple((order[0][0].kind, order[0][0].chunk) for order in short),
        last=tuple(_latest(order[-1]) for order in short),
        pairs=tuple((a - s * few, s) for a, s in zip(pairs[0], slope, strict=True)),
    )


def _latest(slot: tuple[tuple[str, int, int], ...]) -> tuple[str, int]:
    kinds = Counter(action[0] for action in slot)
    chosen = next((action for action in slot if action[0] in "BI"), slot[0]) if kinds else slot[0]
    return chosen[0], chosen[1]


def _rows(table: Floats, branch: Branch) -> Floats:
    """A table by micro-batch, recomputation, algorithm, overlap, broadcast and laid out as rows."""
    sizes = [len(values) for values in branch.lists[:4]]
    return np.broadcast_to(table, sizes).ravel()


def _summed(values: Sequence[Floats], counts: Floats) -> Floats:
    total = np.zeros_like(values[0])
    for value, count in zip(values, counts, strict=True):
        if count:
            total = total + count * value
    return total


def _by_parts(chain_of, cost: dict[str, Floats], x: Exchanges, branch: Branch, flags: dict[str, bool]) -> Chain:  # type: ignore[no-untyped-def]
    """The chain of every row, rows of one overlap degree together."""
    degrees = np.tile(np.array(branch.overlap_degree), x.tensor.size // len(branch.overlap_degree))
    out = {name: np.empty_like(x.tensor) for name in Chain.__dataclass_fields__}
    for parts in branch.overlap_degree:
        at = degrees == parts
        some = Exchanges(**{n: getattr(x, n)[at] if n != "is_even" else x.is_even for n in Exchanges.__dataclass_fields__})
        chain = chain_of({name: value[at] for name, value in cost.items()}, some, parts=parts, **flags)
        for name in out:
            out[name][at] = getattr(chain, name)
    return Chain(**out)


def _where(condition: Floats, yes: Chain, no: Chain) -> Chain:
    return Chain(**{n: np.where(condition, getattr(yes, n), getattr(no, n)) for n in Chain.__dataclass_fields__})


def branch_of(plan: Plan, copies: int, replicas: tuple[int, int]) -> Branch:
    """A branch of one plan."""
    layout = Layout(
        dp=plan.dp, tp=plan.tp, cp=plan.cp, pp=plan.pp, ep=plan.ep, etp=plan.etp, rank_order=plan.rank_order,
        schedule=plan.schedule, vpp=plan.vpp, stages=plan.stages, replicas=replicas, copies=copies,
    )  # fmt: skip
    return Branch(
        layout=layout, micro_batch=(plan.micro_batch,), recompute=(plan.recompute,), all_to_all=(plan.all_to_all,),
        overlap_degree=(plan.overlap_degree,), zero_dense=(plan.zero_dense,), zero_expert=(plan.zero_expert,),
        arbitration=(plan.arbitration,),
    )  # fmt: skip
