"""The routing of a scenario under a plan: how many tokens each place of an expert-parallel group gets, and from whom.

Axes: L layers with experts, S sources (places of a group), E experts, G places that receive, B blocks of places (those
in one node).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moeplan import menu
from moeplan.domain.model import Model
from moeplan.domain.placement import Placement
from moeplan.domain.plan import CapacityRule, Plan
from moeplan.domain.program import Floats, Ints
from moeplan.domain.routing import Routing, apply_capacity
from moeplan.domain.scenario import RoutingLaw, Scenario
from moeplan.domain.workload import Workload
from moeplan.partition.reach import ANYWHERE, Limit, reach_LSB, reach_of_parts
from moeplan.partition.slots import part_of_blocks, tokens_of_slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens of one micro-batch: in all, on one context-parallel rank, and on one rank under sequence parallelism."""

    sequence: int
    context: int
    batch: int
    group: int
    rank: int

    @staticmethod
    def of(plan: Plan, workload: Workload) -> Tokens:
        """Decoding shares the cache, not the one new token, over context-parallel ranks."""
        batch = plan.micro_batch * workload.query_length
        group = batch if workload.phase == "decode" else batch // plan.cp
        return Tokens(
            sequence=workload.query_length,
            context=workload.sequence,
            batch=batch,
            group=group,
            rank=-(-group // plan.tp),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What the tokens of one layer chose: where that stands, and what the model allows. Without experts that do
    nothing, `num_experts` are all.
    """

    routing: Routing
    layer: int
    """In the routing."""
    num_experts: int
    limit: Limit


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Load:
    """Tokens of one micro-batch by source and expert for every layer with experts, experts in equal blocks over the
    places. With a placement its slots stand where experts stand here.
    """

    tokens_SE_by_layer: tuple[Floats, ...]
    num_places: int
    is_even: bool
    """In each layer every source sends every expert the same, so all places are alike."""
    chosen: tuple[Chosen, ...] = ()
    """By layer; of an even load one source stands for all."""
    placement: Placement | None = None

    def rows(self, moe: int, place: int, *, part: int, parts: int) -> tuple[int, ...]:
        """Tokens for each expert of a place, whole numbers, in one of `parts` parts."""
        tokens_SE = self.tokens_SE_by_layer[moe]
        experts = tokens_SE.shape[1] // self.num_places
        first = 0 if self.is_even else place * experts
        whole = np.rint(tokens_SE[:, first : first + experts].sum(axis=0)).astype(np.int64)
        cut = (part + 1) * whole // parts - part * whole // parts
        return tuple(cut.tolist())

    def traffic(self, moe: int) -> tuple[float, Floats | None]:
        """Tokens that one source sends on average, its own place included, and share_GG: what part of that goes i to
        j.
        """
        tokens_SE = self.tokens_SE_by_layer[moe]
        mean = float(tokens_SE.sum()) / len(tokens_SE)
        if self.is_even or mean == 0:
            return mean, None
        tokens_GG = tokens_SE.reshape(len(tokens_SE), self.num_places, -1).sum(axis=2)
        return mean, tokens_GG / mean

    def reach(self, moe: int, block_G: tuple[int, ...]) -> Floats | None:
        """reach_GB: what part of what a source sends on average there is for block b of places, each token once.

        Block b is the places of number b in `block_G`. With one choice for each token this is the sum of the shares.
        A token draws the replica of each of its experts by their shares, and not by where its others are. None where
        nothing is sent.
        """
        chosen, mean = self.chosen[moe], self.traffic(moe)[0]
        if mean == 0:
            return None
        if self.placement is None:
            found_SB = _reach_LSB(chosen.routing, block_G, chosen.num_experts, chosen.limit)[chosen.layer]
        else:
            found_SB = _placed_reach_SB(chosen, self.placement, moe, block_G)
        return np.broadcast_to(found_SB / mean, (self.num_places, found_SB.shape[1]))


@lru_cache(maxsize=16)
def _reach_LSB(routing: Routing, block_G: tuple[int, ...], num_experts: int, limit: Limit) -> Floats:
    block_E = np.full(routing.num_experts, -1)
    block_E[:num_experts] = np.repeat(block_G, num_experts // len(block_G))
    return reach_LSB(routing, block_E, limit)


@lru_cache(maxsize=256)
def _placed_reach_SB(chosen: Chosen, placement: Placement, moe: int, block_G: tuple[int, ...]) -> Floats:
    routing, at = chosen.routing, slice(chosen.layer, chosen.layer + 1)
    one = replace(
        routing,
        tokens_LSE=routing.tokens_LSE[at],
        dropped_LSE=None if routing.dropped_LSE is None else routing.dropped_LSE[at],
        padded_LSE=None if routing.padded_LSE is None else routing.padded_LSE[at],
        sets_LS=None if routing.sets_LS is None else routing.sets_LS[at],
    )
    part_BE = part_of_blocks(placement, moe, block_G, num_experts=routing.num_experts)
    return np.asarray(reach_of_parts(one, part_BE, chosen.limit)[0])


def node_blocks(groups_NG: Ints, gpus_per_node: int) -> tuple[int, ...] | None:
    """The number of each place's node among those of its group, in rising order; None if that differs by group."""
    found = {
        tuple(np.unique(row, return_inverse=True)[1].tolist())
        for row in np.unique(groups_NG // gpus_per_node, axis=0)
    }  # fmt: skip
    return found.pop() if len(found) == 1 else None


def load_of(scenario: Scenario, plan: Plan, *, rank_tokens: int) -> Load | None:
    """The load of one micro-batch, after the plan's capacity rule; None for a model without experts.

    `rank_tokens` are the tokens of one rank. With expert tensor parallelism a source is the `etp` ranks of a place
    together. Capacity is that of an expert, all its replicas together.
    """
    if scenario.routing is None:
        return None
    capacity = (plan.capacity.rule, plan.capacity.factor)
    load = _load(_LayerKinds(scenario.model), scenario.routing, plan.ep, rank_tokens * plan.etp, capacity)
    if plan.placement is None or plan.placement.is_in_order:
        return load
    return _placed(load, plan.placement)


@lru_cache(maxsize=16)
def _placed(load: Load, placement: Placement) -> Load:
    tables = tuple(tokens_of_slots(table, placement, moe) for moe, table in enumerate(load.tokens_SE_by_layer))
    is_even, tables = _evened(tables)
    return replace(load, tokens_SE_by_layer=tables, is_even=is_even, placement=placement)


def _evened(tables: tuple[Floats, ...]) -> tuple[bool, tuple[Floats, ...]]:
    """Whether all sources send all columns the same; one number then stands for a whole table, which may be large."""
    is_even = all(bool((table == table[0, 0]).all()) for table in tables)
    return is_even, tuple(np.broadcast_to(table[0, 0], table.shape) for table in tables) if is_even else tables


class _LayerKinds:
    """The layers with experts of a model, hashed by what a router needs to know of them."""

    def __init__(self, model: Model) -> None:
        found = [layer.experts for layer in model.all_layers if layer.experts]
        self.shapes = tuple((e.num_experts, e.zero_experts, e.top_k, Limit(e.num_groups, e.top_groups)) for e in found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LayerKinds) and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(self.shapes)


@lru_cache(maxsize=64)
def _load(
    kinds: _LayerKinds, law: RoutingLaw, ep: int, tokens: int, capacity: tuple[CapacityRule, float | None]
) -> Load:
    """Layers of one shape are routed together; experts that do nothing (zero experts) are routed to, and left out."""
    by_layer: dict[int, Floats] = {}
    chosen: dict[int, Chosen] = {}
    for number, shape in enumerate(dict.fromkeys(kinds.shapes)):
        layers = [moe for moe, each in enumerate(kinds.shapes) if each == shape]
        num_experts, zero_experts, top_k, limit = shape
        route = menu.load("routers", law.router, "route")
        routing: Routing = route(
            num_layers=len(layers), num_experts=num_experts + zero_experts, top_k=top_k, num_sources=ep,
            tokens_per_source=tokens, rng=np.random.default_rng([law.seed, number]), **law.options,
        )  # fmt: skip
        routing = apply_capacity(routing, capacity[0], factor=capacity[1])
        by_layer |= zip(layers, routing.tokens_LSE[:, :, :num_experts].astype(np.float64), strict=True)
        for at, moe in enumerate(layers):  # where groups of experts stand beside experts that do nothing is not known
            within = ANYWHERE if zero_experts else limit
            chosen[moe] = Chosen(routing=routing, layer=at, num_experts=num_experts, limit=within)
    is_even, tables = _evened(tuple(by_layer[moe] for moe in range(len(kinds.shapes))))
    if is_even:
        averages = {each.routing: _averaged(each) for each in chosen.values()}
        chosen = {moe: averages[each.routing] for moe, each in chosen.items()}
    in_order = tuple(chosen[moe] for moe in range(len(tables)))
    return Load(tokens_SE_by_layer=tables, num_places=ep, is_even=is_even, chosen=in_order)


def _averaged(chosen: Chosen) -> Chosen:
    """One source and one layer for all, in which all experts that do something are alike."""
    routing, real = chosen.routing, chosen.num_experts

    def mean(counts_LSE: npt.NDArray[np.int64] | Floats) -> Floats:
        mean_E = counts_LSE.mean(axis=(0, 1))
        return np.concatenate([np.full(real, mean_E[:real].mean()), mean_E[real:]])[None, None]

    average = replace(
        routing,
        tokens_LSE=mean(routing.tokens_LSE),
        dropped_LSE=None if routing.dropped_LSE is None else mean(routing.dropped_LSE),
        padded_LSE=None if routing.padded_LSE is None else mean(routing.padded_LSE),
        sets_LS=None,
    )
    return replace(chosen, routing=average, layer=0)
