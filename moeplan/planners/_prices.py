"""What the parts of a plan cost, each looked up once: works by the cost model, exchanges by their busiest wire.

Axes: K kinds of layer (equal layers are one; under uneven routing each layer with experts is its own), W works, P
passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import log

import numpy as np

from moeplan import menu
from moeplan.compiler.parts import Parts
from moeplan.cost.cost_model import CostModel
from moeplan.domain.model import Layer
from moeplan.domain.placement import Placement
from moeplan.domain.plan import DTYPE_BYTES, Capacity, Plan
from moeplan.domain.program import Exchange, Floats, Pass
from moeplan.domain.scenario import Scenario
from moeplan.network.expand import Pattern, expand
from moeplan.partition.route import Load, Tokens, load_of, node_blocks
from moeplan.planners._anywhere import LeastExperts, least_reach, least_spread
from moeplan.planners._wires import Wire as Wire
from moeplan.planners._wires import busiest, first_done, least_of, until

WORKS = ("mixer", "router", "dense", "shared", "merge")
ENDS = ("embedding", "head", "prediction")
PASSES = (Pass.FORWARD, Pass.BACKWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT)
_SKEW_STEP = 0.1
"""Layers whose hottest expert has up to a tenth more tokens than another's are of one class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of layer; `moe` counts the layers with experts before the one that stands for it."""

    layer: Layer
    moe: int


@dataclass
class Prices:
    """Costs by what they depend on."""

    scenario: Scenario
    coarse: bool = False
    """Price what holds wherever experts stand, and no more."""
    replicas: bool = True
    """Coarse: whether an expert may stand several times, else each stands once."""
    placement: Placement | None = None
    """Not coarse: where experts stand."""
    cache: dict[tuple[object, ...], object] = field(default_factory=dict)

    @cached_property
    def cost_model(self) -> CostModel:
        """Of the cluster's GPU."""
        return CostModel(gpu=self.scenario.cluster.gpu)

    @cached_property
    def is_even(self) -> bool:
        """Whether routing is even, judged where it could be least: with the largest expert-parallel group.

        And before tokens are dropped: what evens out many tokens leaves few uneven.
        """
        if self.scenario.routing is None or self.coarse:
            return True
        if self.placement is not None:
            return False
        experts = min(layer.experts.num_experts for layer in self.scenario.model.all_layers if layer.experts)
        capacity = self.scenario.choices.capacity
        kept = Capacity() if capacity.rule == "drop" else capacity
        load = load_of(self.scenario, self._plan(ep=experts, capacity=kept), rank_tokens=4096)
        return load is None or load.is_even

    @cached_property
    def kinds(self) -> tuple[tuple[Kind, ...], tuple[int, ...], tuple[int, ...]]:
        """The kinds, and which kind each layer of the model, and each layer of multi-token prediction, is."""
        found: dict[tuple[int, int], int] = {}
        kinds: list[Kind] = []
        moe, model = 0, self.scenario.model

        def number(layer: Layer, moe: int) -> int:
            key = (id(layer), self._class(moe) if layer.is_moe else -1)
            if key not in found:
                found[key] = len(kinds)
                kinds.append(Kind(layer=layer, moe=moe))
            return found[key]

        layers = []
        for layer in model.all_layers:
            layers.append(number(layer, moe))
            moe += layer.is_moe
        predicting = model.mtp.layers * model.mtp.depth if model.mtp else ()
        extra = tuple(number(layer, max(0, moe - 1)) for layer in predicting)
        return tuple(kinds), tuple(layers), extra

    def _class(self, moe: int) -> int:
        """Layers of one class are priced as one: all under even routing, none else; coarsely those of like skew."""
        if self.scenario.routing is None or not self.coarse:
            return -1 if self.is_even else moe
        return round(self._skews[min(moe, len(self._skews) - 1)] / _SKEW_STEP)

    @cached_property
    def _skews(self) -> list[float]:
        """Of each layer with experts the logarithm of what the hottest one gets over the mean."""
        experts = min(layer.experts.num_experts for layer in self.scenario.model.all_layers if layer.experts)
        load = load_of(self.scenario, self._plan(ep=experts), rank_tokens=4096)
        assert load is not None
        loads = [table.sum(axis=0) for table in load.tokens_SE_by_layer]
        return [log(max(1.0, each.max() / each.mean())) if each.any() else 0.0 for each in loads]

    def _alike(self, kind: Kind) -> list[int]:
        """The layers with experts that `kind` stands for, by the number of such layers before them."""
        kinds, of_layer, _ = self.kinds
        moe = [number for number, layer in zip(of_layer, self.scenario.model.all_layers, strict=True) if layer.is_moe]
        return [at for at, number in enumerate(moe) if kinds[number] is kind] or [kind.moe]

    def _plan(self, **degrees: object) -> Plan:
        choices = self.scenario.choices
        given: dict[str, object] = {
            "dp": 1,
            "stages": (1,),
            "precision": choices.precision,
            "capacity": choices.capacity,
        }
        return Plan(**(given | degrees))  # type: ignore[arg-type]

    # ---- works

    def layers(self, tp: int, cp: int, micro_batch: int, recompute: str) -> tuple[Floats, Floats]:
        """Seconds [kind, work, pass] of what is no routed expert, and [end, pass] of the model's ends."""
        key = ("layers", tp, cp, micro_batch, recompute == "selective")
        if key not in self.cache:
            self.cache[key] = self._layers(self._plan(tp=tp, cp=cp, micro_batch=micro_batch, recompute=recompute))
        return self.cache[key]  # type: ignore[return-value]

    def _layers(self, plan: Plan) -> tuple[Floats, Floats]:
        parts = self._parts(plan, None)
        table_KWP = np.zeros((len(self.kinds[0]), len(WORKS), len(PASSES)))
        known: dict[int, int] = {}
        for k, kind in enumerate(self.kinds[0]):
            if id(kind.layer) in known:
                table_KWP[k] = table_KWP[known[id(kind.layer)]]
                continue
            known[id(kind.layer)] = k
            for p, which in enumerate(PASSES):
                for w, unit in enumerate(self._units(parts, kind.layer, which)):
                    table_KWP[k, w, p] = self._seconds(parts, unit)
        ends_EP = np.zeros((len(ENDS), len(PASSES)))
        for p, which in enumerate(PASSES):
            ends_EP[0, p] = self._seconds(parts, parts.embedding(which))
            ends_EP[1, p] = self._seconds(parts, parts.head(which))
            if self.scenario.model.mtp is not None:
                ends_EP[2, p] = self._seconds(parts, parts.prediction(which))
        return table_KWP, ends_EP

    @staticmethod
    def _units(parts: Parts, layer: Layer, which: Pass) -> tuple[int | None, ...]:
        """The works of WORKS that the layer has; a router that runs with its mixer is part of that."""
        experts = layer.experts
        routed = layer.is_moe and bool(layer.blocks) and parts.plan.tp == 1
        return (
            parts.mixer(layer, which, routed=routed) if layer.blocks else None,
            parts.router(layer, which) if experts and not routed else None,
            parts.dense(layer, which) if layer.feed_forward and not experts else None,
            parts.shared(experts, which) if experts else None,
            parts.merge(experts, which) if experts else None,
        )

    def _parts(self, plan: Plan, load: Load | None) -> Parts:
        return Parts(model=self.scenario.model, plan=plan, workload=self.scenario.workload, load=load)

    def _seconds(self, parts: Parts, unit: int | None) -> float:
        return 0.0 if unit is None else self.cost_model.cost(parts.works[unit]).seconds

    def load(self, ep: int, etp: int, tp: int, cp: int, micro_batch: int) -> tuple[Plan, Load | None]:
        """The routing of one micro-batch over `ep` places."""
        key = ("load", ep, etp, tp, cp, micro_batch)
        if key not in self.cache:
            degrees = {"ep": ep, "etp": etp, "tp": tp, "cp": cp, "micro_batch": micro_batch}
            plan = self._plan(**degrees, placement=self.placement)
            tokens = Tokens.of(plan, self.scenario.workload).rank
            load = load_of(self.scenario, plan, rank_tokens=tokens)
            self.cache[key] = (plan, self._evened(load) if load and self.coarse else load)
        return self.cache[key]  # type: ignore[return-value]

    def _evened(self, load: Load) -> Load:
        """The mean of all places, rounded down as whole tokens are: no more than the place that gets most."""
        evened = []
        for table in load.tokens_SE_by_layer:
            rows = max(0.0, np.floor(table.sum() / table.shape[1] - 0.5))
            evened.append(np.broadcast_to(np.float64(rows / len(table)), table.shape))
        found = Load(tokens_SE_by_layer=tuple(evened), num_places=load.num_places, is_even=True)
        self.cache["real", id(found)] = load
        return found

    def spread(self, load: Load) -> float:
        """What part of the traffic of even routing there is at least between places, and between blocks of places."""
        if not self.coarse:
            return 1.0
        key = ("spread", id(load))
        if key not in self.cache:
            self.cache[key] = least_spread(self._real(load))
        return self.cache[key]  # type: ignore[return-value]

    def is_certain(self, load: Load | None, parts: int) -> bool:
        """Whether what is said of a layer's kernels is what they take, and no bound: where routing is even, all experts
        of all layers get the same in each of `parts` parts, and all layers that predict further tokens are of one kind.
        """
        if not self.is_even or self.coarse or len(set(self.kinds[2])) > 1:
            return False
        if load is None:
            return True
        rows = {rows for moe in range(len(load.chosen)) for rows in load.rows(moe, 0, part=0, parts=1)}
        return len(rows) == 1 and not any(each % parts for each in rows)

    def _real(self, load: Load) -> Load:
        """What an evened load was."""
        return self.cache["real", id(load)]  # type: ignore[return-value]

    def sure(self, load: Load, kind: Kind) -> float:
        """What part of an all-to-all's latency there is at least: none where a place may have nothing for others.

        Where each expert stands once, as many on each place, and gets tokens from each source, all have.
        """
        if not self.coarse:
            return 1.0
        key = ("sure", id(load), id(kind))
        if key not in self.cache:
            tables = self._real(load).tokens_SE_by_layer
            is_once = not self.replicas and len({table.shape for table in tables}) == 1
            self.cache[key] = float(is_once and all(bool((tables[moe] > 0).all()) for moe in self._alike(kind)))
        return self.cache[key]  # type: ignore[return-value]

    @staticmethod
    def counts_copies(algorithm: str) -> bool:
        """Whether an all-to-all sends one copy of a token to a node."""
        return bool(getattr(menu.module("collectives", algorithm), "COUNTS_COPIES", False))

    def reach(self, load: Load, moe: int, members: tuple[int, ...], algorithm: str) -> Floats | None:
        """What each place has for each node, each token once; None for an algorithm that does not count so.

        Coarsely it is the same everywhere, and no more than the node that gets most has in the layer that has least.
        """
        if not self.counts_copies(algorithm):
            return None
        block_G = node_blocks(np.array([members]), self.scenario.cluster.gpus_per_node)
        assert block_G is not None
        if not self.coarse:
            return load.reach(moe, block_G)
        real = self._real(load)
        routing = real.chosen[moe].routing
        alike = [other for other, each in enumerate(real.chosen) if each.routing is routing]
        key = ("reach", id(load), id(routing), block_G)
        if key not in self.cache:
            self.cache[key] = np.full((len(members), max(block_G) + 1), least_reach(real, alike, block_G))
        return self.cache[key]  # type: ignore[return-value]

    def experts(self, plan: Plan, load: Load | None, *, recompute: str, parts: int) -> Floats:
        """Seconds [kind, which, pass] of the experts on the smallest of `parts` parts, at two places.

        0: the place that gets most of the layer; everyone waits for it. 1: one place for all layers, the one that
        gets most in all; what it computes, one GPU computes.
        """
        tokens = Tokens.of(plan, self.scenario.workload).rank
        key = ("experts", plan.ep, plan.etp, tokens, parts, recompute == "selective")
        if key not in self.cache:
            changed = plan.model_copy(update={"overlap_degree": parts, "recompute": recompute})
            self.cache[key] = self._experts(changed, load)
        return self.cache[key]  # type: ignore[return-value]

    def _experts(self, plan: Plan, load: Load | None) -> Floats:
        if self.coarse and load is not None:
            return self._least_experts(plan, self._real(load))
        parts = self._parts(plan, load)
        table = np.zeros((len(self.kinds[0]), 2, len(PASSES)))
        steady = 0 if load is None else hottest_of_all(load)
        for k, kind in enumerate(self.kinds[0]):
            if kind.layer.experts is None or load is None:
                continue
            for at, place in enumerate((hottest(load, kind.moe), steady)):
                for p, which in enumerate(PASSES):
                    unit = parts.experts(kind.layer.experts, which, moe=kind.moe, place=place, part=0)
                    table[k, at, p] = self._seconds(parts, unit)
        return table

    def _least_experts(self, plan: Plan, load: Load) -> Floats:
        """Of each kind the least of its layers."""
        table = np.zeros((len(self.kinds[0]), 2, len(PASSES)))
        for k, kind in enumerate(self.kinds[0]):
            if kind.layer.experts is None:
                continue
            every = [np.sort(load.tokens_SE_by_layer[moe].sum(axis=0))[::-1] for moe in self._alike(kind)]
            loads = {tokens_E.tobytes(): tokens_E for tokens_E in every}
            for p, which in enumerate(PASSES):
                least = LeastExperts(
                    experts=kind.layer.experts, passes=which, plan=plan, cost_model=self.cost_model,
                    replicas=self.replicas,
                )  # fmt: skip
                found = [least.seconds(tokens_E) for tokens_E in loads.values()]
                table[k, :, p] = min(each.hottest for each in found), min(each.mean for each in found)
        return table

    def optimizer_s(self, parameters: Floats) -> Floats:
        """Seconds of the update, which is bound by memory: a part that grows with the weights, never less than a
        launch.
        """
        parts = self._parts(self._plan(), None)
        per_weight = self._seconds(parts, parts.optimizer(1e12)) / 1e12
        return np.maximum(parameters * per_weight, self.cost_model.gpu.kernel_launch_s)

    # ---- wires

    def ring(self, members: tuple[int, ...]) -> Wire:
        """An all-gather (or reduce-scatter) among `members`; an all-reduce is two."""
        return self._wire("all_gather", "ring", members)

    def send(self, source: int, target: int) -> Wire:
        """From one GPU to another."""
        return self._wire("send", "", (source, target))

    def all_to_all(self, members: tuple[int, ...], algorithm: str, reach_GB: Floats | None = None) -> Wire:
        """Equal shares between `members`. A combine that counts copies takes as long as its dispatch, or is cheaper."""
        if reach_GB is None:
            return self._wire("all_to_all", algorithm, members)
        key = ("wire", algorithm, members, reach_GB.tobytes())
        if key not in self.cache:
            self.cache[key] = self._either_way(members, algorithm, reach_GB)
        return self.cache[key]  # type: ignore[return-value]

    def _either_way(self, members: tuple[int, ...], algorithm: str, reach_GB: Floats) -> Wire:
        cluster = self.scenario.cluster
        ways = [
            busiest(self.pattern("all_to_all", algorithm, members, reach_GB=reach_GB, kind=kind), cluster)
            for kind in ("dispatch", "combine")
        ]
        return least_of(ways)

    def _wire(self, operation: str, algorithm: str, members: tuple[int, ...]) -> Wire:
        key = ("wire", operation, algorithm, members)
        if key not in self.cache:
            self.cache[key] = (
                Wire()
                if len(members) == 1
                else busiest(self.pattern(operation, algorithm, members), self.scenario.cluster)
            )
        return self.cache[key]  # type: ignore[return-value]

    def uneven(
        self, members: tuple[int, ...], algorithm: str, share_GG: Floats, reach_GB: Floats | None, *, place: int
    ) -> tuple[Wire, Wire, Wire, Wire]:
        """All-to-alls with these shares: out until all are done, out until `place` has its own, back until all are
        done, and back until the first is done.
        """
        back_GG = np.ascontiguousarray(share_GG.T)
        out = self.pattern("all_to_all", algorithm, members, share_GG, reach_GB=reach_GB, kind="dispatch")
        back = self.pattern("all_to_all", algorithm, members, back_GG, reach_GB=reach_GB, kind="combine")
        cluster = self.scenario.cluster
        return (
            busiest(out, cluster),
            until(out, cluster, members[place]),
            busiest(back, cluster),
            first_done(back, cluster, members),
        )

    def pattern(
        self, operation: str, algorithm: str, members: tuple[int, ...], share_GG: Floats | None = None,
        *, reach_GB: Floats | None = None, kind: str = "",
    ) -> Pattern:  # fmt: skip
        exchange = Exchange(
            kind=kind, operation=operation, algorithm=algorithm, groups_NG=np.array([members], np.int64),
            size_bytes=1.0, share_GG=share_GG, reach_GB=reach_GB,
        )  # fmt: skip
        return expand(exchange, self.scenario.cluster)

    def element_bytes(self, what: str) -> float:
        """Bytes of an element of a class of operands."""
        return DTYPE_BYTES[getattr(self.scenario.choices.precision, what)]


def hottest(load: Load, moe: int) -> int:
    """The place that gets the most tokens of a layer."""
    if load.is_even:
        return 0
    return int(_by_place(load, moe).argmax())


def hottest_of_all(load: Load) -> int:
    """The place that gets the most tokens of all layers together."""
    if load.is_even:
        return 0
    return int(np.sum([_by_place(load, moe) for moe in range(len(load.tokens_SE_by_layer))], axis=0).argmax())


def _by_place(load: Load, moe: int) -> Floats:
    by_expert = load.tokens_SE_by_layer[moe].sum(axis=0)
    return np.asarray(by_expert.reshape(load.num_places, -1).sum(axis=1))
