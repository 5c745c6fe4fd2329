"""Placement where the cluster's shape counts: experts on nodes, then on each node's GPUs, then the best routing.

Traffic between nodes is most of such a layer's seconds, and depends on nodes only; so nodes are decided first, by
annealing and, where few experts and nodes leave it time, by an integer programme. Inside a node replicas are packed by
load, which is easy: a few slots on each GPU. The bound is that of nodes plus that of the fullest GPU. A layer that is
small enough is one programme as a whole.

Axes of arrays: G GPU, K slot of a node, N node, P place on a GPU, R replica.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacedLayer, PlacementProblem
from moeplan.errors import PlanError
from moeplan.jit import clock_s, compiled
from moeplan.placers._bounds import token_bounds
from moeplan.placers._check import certified
from moeplan.placers._direct import WHOLE, size, solved_by_highs, written_out
from moeplan.placers._exact import SMALL
from moeplan.placers._makespan import NodeProblem, routed, value_s
from moeplan.placers._node_bound import busiest_node_bound
from moeplan.placers._node_ilp import Limits, integer_slots
from moeplan.placers._node_search import NodeSlots, annealed, estimate_s, first_slots

_SEEDS = 4
_STEPS_PER_PAIR, _MOST_STEPS = 500, 6_000_000
_PROVEN = 1e-3
_SMALL = 640
"""Experts times nodes up to which the integer programme finds good solutions in seconds."""
_TRIALS = 4000
"""Replicas times routings that the last descent may try, by linear programmes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Found:
    """The best placement so far, and bounds of its two figures."""

    placement: LayerPlacement
    value_s: float
    busiest_node: float
    fullest_gpu: float

    def bound_s(self, nodes: NodeProblem) -> float:
        """Seconds that no placement is below, unless this one is the best."""
        return min(self.value_s, nodes.seconds(self.busiest_node, self.fullest_gpu))


class _Bound(NamedTuple):
    """Seconds that no placement is below, and how that was found."""

    seconds: float
    proof: str

    def raised(self, seconds: float, proof: str) -> _Bound:
        """The better one."""
        return max(self, _Bound(seconds, proof), key=lambda each: each.seconds)


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Experts on nodes and GPUs by the seconds that `problem.prices` state, with a bound.

    The bound: seconds grow with copies through the busiest node and with those in the fullest GPU, and no placement
    better than the one found has less of either than `_node_bound` and `_bounds` say. Raises PlanError for a problem
    without prices or with a limit on moves.
    """
    if problem.max_moves is not None:
        raise PlanError("max_moves: the placement by nodes starts anew; place without prices, or without max_moves")
    begin, nodes = clock_s(), NodeProblem.of(problem)
    # Nodes that send the same are best served differently, each by itself first.
    problem = replace(problem, tokens_SE=nodes.tokens_NE)
    last_s = begin + time_limit_s
    found, bound = _annealed(problem, nodes, rng=rng, last_s=begin + time_limit_s / 2)
    for method, fits in ((_by_nodes, _fits_nodes), (_by_whole, _is_small)):
        left_s = last_s - clock_s()
        if found.value_s > bound.seconds * (1 + _PROVEN) and fits(problem, nodes) and left_s > 0:
            found, bound = method(problem, nodes, found, bound, time_limit_s=left_s / 2)
    placement = _descended(problem, found.placement, bound_s=bound.seconds, last_s=last_s)
    return certified(problem, placement, seconds=clock_s() - begin, bound=bound.seconds, proof=bound.proof)


def _annealed(
    problem: PlacementProblem, nodes: NodeProblem, *, rng: np.random.Generator, last_s: float
) -> tuple[_Found, _Bound]:
    """The best of some annealings, and its bound; the first that is proven is enough, and one where more follows."""
    found, bound_s = None, 0.0
    fullest_gpu = max(tokens for tokens, _ in token_bounds(problem))
    seeds = rng.integers(2**62, size=1 if _is_small(problem, nodes) else _SEEDS).tolist()
    for number, seed in enumerate(seeds):
        found = _better(found, _by_annealing(problem, nodes, seed=seed, fullest_gpu=fullest_gpu))
        if number in (0, len(seeds) - 1):
            found = _bounded(problem, nodes, found)
            bound_s = max(bound_s, found.bound_s(nodes))
        if found.value_s <= bound_s * (1 + _PROVEN) or clock_s() > last_s:
            break
    assert found is not None
    proof = "prices of nodes: a Lagrangian bound of the busiest node's copies, and one of the fullest GPU's"
    return found, _Bound(bound_s, proof)


def _by_nodes(
    problem: PlacementProblem, nodes: NodeProblem, found: _Found, bound: _Bound, *, time_limit_s: float
) -> tuple[_Found, _Bound]:
    """What the integer programme of nodes finds and proves."""
    slots, ilp_s = integer_slots(nodes, _limits(nodes, found), gap=_PROVEN, time_limit_s=time_limit_s)
    bound = bound.raised(min(ilp_s, found.value_s), "integer programme of nodes: the solver's dual bound")
    if slots is not None:
        found = _better(found, _packed(problem, nodes, slots, fullest_gpu=found.fullest_gpu))
    return found, bound


def _by_whole(
    problem: PlacementProblem, nodes: NodeProblem, found: _Found, bound: _Bound, *, time_limit_s: float
) -> tuple[_Found, _Bound]:
    """What one programme for experts on GPUs finds and proves, among placements no worse than the found one."""
    high = min(_limits(nodes, found).fullest_gpu, float(problem.tokens_E.sum()))
    answer = solved_by_highs(problem, written_out(problem, high=high), gap=0.0, time_limit_s=time_limit_s)
    bound = bound.raised(min(answer.bound, found.value_s), WHOLE)
    if answer.placement is not None:
        found = _better(found, replace(found, placement=answer.placement, value_s=value_s(problem, answer.placement)))
    return found, bound


def _fits_nodes(problem: PlacementProblem, nodes: NodeProblem) -> bool:
    return problem.split == "optimal" and nodes.num_nodes > 1 and nodes.tokens_NE.size <= _SMALL


def _is_small(problem: PlacementProblem, nodes: NodeProblem) -> bool:
    return size(problem) <= SMALL


def _better(found: _Found | None, other: _Found) -> _Found:
    return other if found is None or other.value_s < found.value_s else found


def _by_annealing(problem: PlacementProblem, nodes: NodeProblem, *, seed: int, fullest_gpu: float) -> _Found:
    slots, is_even = first_slots(nodes), problem.split == "even"
    if nodes.num_nodes > 1:
        steps = min(_STEPS_PER_PAIR * slots.expert_K.size**2, _MOST_STEPS)
        after = annealed(nodes, slots, seed=seed, steps=steps, is_even=is_even)
        slots = min(slots, after, key=lambda each: estimate_s(nodes, each, is_even=is_even))
    return _packed(problem, nodes, slots, fullest_gpu=fullest_gpu)


def _packed(problem: PlacementProblem, nodes: NodeProblem, slots: NodeSlots, *, fullest_gpu: float) -> _Found:
    """The slots on GPUs, routed; packed once more with the loads that the best routing gave them."""
    held_K = slots.expert_K >= 0
    expert_R = slots.expert_K[held_K]
    placement = routed(problem, expert_R, on_gpus(nodes, slots)[held_K])
    value = value_s(problem, placement)
    if problem.split == "optimal":
        load_R = (nodes.tokens_NE[:, placement.expert_R] * placement.share_SR).sum(axis=0)
        again = _slots_of(nodes, placement, load_R)
        held_K = again.expert_K >= 0
        other = routed(problem, again.expert_K[held_K], on_gpus(nodes, again)[held_K])
        if value_s(problem, other) < value:
            placement, value = other, value_s(problem, other)
    return _Found(placement=placement, value_s=value, busiest_node=0.0, fullest_gpu=fullest_gpu)


def _slots_of(nodes: NodeProblem, placement: LayerPlacement, load_R: Floats) -> NodeSlots:
    """A placement's replicas as slots of nodes."""
    node_K = np.repeat(np.arange(nodes.num_nodes, dtype=np.int64), nodes.slots_per_node)
    expert_K, load_K = np.full(node_K.size, -1, dtype=np.int64), np.zeros(node_K.size)
    node_R = placement.gpu_R // nodes.gpus_per_node
    for node in range(nodes.num_nodes):
        here_R = np.flatnonzero(node_R == node)
        slot_R = node * nodes.slots_per_node + np.arange(here_R.size)
        expert_K[slot_R], load_K[slot_R] = placement.expert_R[here_R], load_R[here_R]
    return NodeSlots(expert_K=expert_K, node_K=node_K, load_K=load_K)


def _limits(nodes: NodeProblem, found: _Found) -> Limits:
    return Limits.below(nodes, found.value_s, busiest_node=found.busiest_node, fullest_gpu=found.fullest_gpu)


def _bounded(problem: PlacementProblem, nodes: NodeProblem, found: _Found) -> _Found:
    """The same with a bound of the busiest node's copies, for placements that are better than this one."""
    is_even = problem.split == "even"
    busy = busiest_node_bound(nodes, _limits(nodes, found), is_even=is_even, rounds=300 if is_even else 1000)
    return _Found(
        placement=found.placement, value_s=found.value_s, busiest_node=max(busy, 0.0), fullest_gpu=found.fullest_gpu
    )


def on_gpus(nodes: NodeProblem, slots: NodeSlots) -> Ints:
    """The GPU of each slot: each node's loads spread over its GPUs, no expert twice on one.

    Slots of one expert are dealt out in turn, so that they start on different GPUs; then slots of two GPUs are
    exchanged as long as that lowers the sum of squares of the GPUs' loads.
    """
    gpu_K = np.zeros(slots.expert_K.size, dtype=np.int64)
    for node in range(nodes.num_nodes):
        here_K = np.flatnonzero(slots.node_K == node)
        most_E = np.zeros(nodes.num_experts + 1)
        np.maximum.at(most_E, slots.expert_K[here_K], slots.load_K[here_K])
        order_K = here_K[
            np.lexsort((slots.expert_K[here_K], -most_E[slots.expert_K[here_K]], slots.expert_K[here_K] < 0))
        ]
        place_K = np.arange(order_K.size) % nodes.gpus_per_node
        _spread(slots.expert_K[order_K], slots.load_K[order_K], place_K, nodes.gpus_per_node)
        gpu_K[order_K] = node * nodes.gpus_per_node + place_K
    return gpu_K


@compiled
def _spread(expert_K: Ints, load_K: Floats, gpu_K: Ints, gpus: int) -> None:
    """Exchanges the GPUs of two slots while that lowers the sum of squares of loads."""
    load_G, better = np.zeros(gpus), True
    for slot in range(gpu_K.size):
        load_G[gpu_K[slot]] += load_K[slot]
    slack = 1e-9 * load_G.sum() ** 2 + 1e-300
    while better:
        better = False
        for one in range(gpu_K.size):
            for two in range(one):
                a, b = gpu_K[one], gpu_K[two]
                more = load_K[one] - load_K[two]
                # (a - more)^2 + (b + more)^2 - a^2 - b^2
                if a == b or 2 * more * (load_G[b] - load_G[a] + more) > -slack:
                    continue
                legal = True
                for other in range(gpu_K.size):
                    held = expert_K[other]
                    legal = legal and not (
                        held >= 0
                        and (
                            (gpu_K[other] == b and other != two and held == expert_K[one])
                            or (gpu_K[other] == a and other != one and held == expert_K[two])
                        )
                    )
                if legal:
                    gpu_K[one], gpu_K[two] = b, a
                    load_G[a] -= more
                    load_G[b] += more
                    better = True


def _descended(
    problem: PlacementProblem, placement: LayerPlacement, *, bound_s: float, last_s: float
) -> LayerPlacement:
    """The placement after exchanges and replacements of replicas that lower the true seconds, the first that does each.

    Each trial is a linear programme where routing is optimal, so only small problems get far.
    """
    value, trials = value_s(problem, placement), _TRIALS // placement.expert_R.size
    is_better = True
    while is_better and value > bound_s * (1 + _PROVEN / 10):
        is_better = False
        for expert_R, gpu_R in _neighbours(problem, placement):
            trials -= 1
            if trials < 0 or clock_s() > last_s:
                return placement
            other = routed(problem, expert_R, gpu_R)
            if value_s(problem, other) < value * (1 - 1e-9):
                placement, value, is_better = other, value_s(problem, other), True
                break
    return placement


def _neighbours(problem: PlacementProblem, placement: LayerPlacement) -> Iterator[tuple[Ints, Ints]]:
    """Legal placements that differ by one replica's GPU or expert, or by two replicas' exchange."""
    expert_R, gpu_R = placement.expert_R, placement.gpu_R
    count_E, used_G = np.bincount(expert_R), np.bincount(gpu_R, minlength=problem.num_gpus)
    held = set(zip(expert_R.tolist(), gpu_R.tolist(), strict=True))
    for one in range(expert_R.size):
        expert, gpu = int(expert_R[one]), int(gpu_R[one])
        for other in range(problem.num_gpus):
            if used_G[other] < problem.slots_per_gpu and (expert, other) not in held:
                yield expert_R, np.where(np.arange(gpu_R.size) == one, other, gpu_R)
        for new in range(problem.num_experts):
            if count_E[expert] > 1 and (new, gpu) not in held:
                yield np.where(np.arange(gpu_R.size) == one, new, expert_R), gpu_R
        for two in range(one):
            if (expert, int(gpu_R[two])) not in held and (int(expert_R[two]), gpu) not in held:
                swapped_R = gpu_R.copy()
                swapped_R[one], swapped_R[two] = gpu_R[two], gpu_R[one]
                yield expert_R, swapped_R
