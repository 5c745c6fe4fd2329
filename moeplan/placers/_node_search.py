"""Annealing of experts over the slots of nodes: a good placement for many nodes, where an ILP finds none in time.

A slot stands in a node, holds one replica and computes `load_K` copies. With optimal routing a node keeps min(load, own
copies) of an expert, so that loads say everything: a node with t own copies of an expert of which it computes l sends
max(t - l, 0) copies away and gets max(l - t, 0). Under an even split a node's own copies are a share t / W of all that
it computes. Either way a move touches few nodes, and its effect is known in a few operations.

Instead of the busiest node's copies a power mean of all nodes' is lowered, since a maximum alone does not tell which
moves help; the power rises at the end.

Axes of arrays: C changed slot, E expert, K slot, N node, P place of a slot in its expert's list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, Ints
from moeplan.jit import compiled, compiled_in_place
from moeplan.placers._makespan import NodeProblem

_PHASES = ((4, 0.7, 2e-3, 6e-6), (8, 0.3, 2e-5, 2e-7))
"""Squarings that make the power (16, 256), part of the steps, heat at the begin and at the end over the value."""
_ALONE = 25.0
"""Times as hot at the begin without replicas: where swaps alone are left, colder walks stay where they began."""
_TWO53 = 1.0 / 9007199254740992.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NodeSlots:
    """Which expert each slot holds (-1: none), the node it stands in, and how many copies it computes."""

    expert_K: Ints
    node_K: Ints
    load_K: Floats


class _State(NamedTuple):
    """All that moves read and change, for compiled functions.

    `at_EP[e]` is the number of e's slots, then the slots; `place_K` where a slot stands in that list. Rows of `busy_3N`
    are copies in, out and computed. `slot_C`, `expert_C` and `load_C` are the move that is tried.
    """

    tokens_NE: Floats
    total_E: Floats
    is_even: bool
    gpus: int
    load_NE: Floats
    busy_3N: Floats
    node_K: Ints
    expert_K: Ints
    load_K: Floats
    at_EP: Ints
    place_K: Ints
    held_NE: Ints
    slot_C: Ints
    expert_C: Ints
    load_C: Floats
    draw: npt.NDArray[np.uint64]


def annealed(nodes: NodeProblem, start: NodeSlots, *, seed: int, steps: int, is_even: bool) -> NodeSlots:
    """The slots after so many tried moves; the same for the same seed."""
    state, first = _state(nodes, start, seed=seed, is_even=is_even), _ALONE if nodes.slots == nodes.num_experts else 1.0
    for phase, (squarings, part, hot, cold) in enumerate(_PHASES):
        scale = np.maximum([state.busy_3N[:2].max(), fullest(nodes, state.busy_3N[2], state.load_K)], 1e-9)
        prices = np.array([nodes.nic_s, nodes.compute_s]) * scale
        _anneal(state, prices, scale, int(steps * part), squarings, hot * (first if phase == 0 else 1.0), cold)
    return NodeSlots(expert_K=state.expert_K, node_K=start.node_K, load_K=state.load_K)


def estimate_s(nodes: NodeProblem, slots: NodeSlots, *, is_even: bool) -> float:
    """Seconds of the layer if each node's slots can be packed evenly on its GPUs."""
    state = _state(nodes, slots, seed=0, is_even=is_even)
    return nodes.seconds(float(state.busy_3N[:2].max()), fullest(nodes, state.busy_3N[2], slots.load_K))


def fullest(nodes: NodeProblem, load_N: Floats, load_K: Floats) -> float:
    """Copies in the fullest GPU, at least: the mean of the fullest node, or the fullest slot."""
    return max(float(load_N.max()) / nodes.gpus_per_node, float(load_K.max()))


def first_slots(nodes: NodeProblem) -> NodeSlots:
    """A start: replicas where the fullest ones shrink most, dealt out to the nodes in turn, fullest first.

    As an expert's replicas come one after the other, no node gets more than it has GPUs.
    """
    total_E, count = nodes.tokens_NE.sum(axis=0), nodes.num_nodes
    copies_E = copies_of(total_E, nodes.slots, most=count * nodes.gpus_per_node)
    order_E = np.argsort(-total_E / copies_E, kind="stable")
    expert_R = np.repeat(order_E, copies_E[order_E])
    turn_R = np.arange(expert_R.size)
    slot_R = turn_R % count * nodes.slots_per_node + turn_R // count
    node_K = np.repeat(np.arange(count, dtype=np.int64), nodes.slots_per_node)
    expert_K, load_K = np.full(node_K.size, -1, dtype=np.int64), np.zeros(node_K.size)
    expert_K[slot_R], load_K[slot_R] = expert_R, (total_E / copies_E)[expert_R]
    return NodeSlots(expert_K=expert_K, node_K=node_K, load_K=load_K)


def copies_of(total_E: Floats, slots: int, *, most: int) -> Ints:
    """Replicas of each expert: one by one to the expert whose replicas are fullest."""
    copies_E = np.ones(total_E.size, dtype=np.int64)
    for _ in range(slots - total_E.size):
        copies_E[np.argmax(np.where(copies_E < most, total_E / copies_E, -1.0))] += 1
    return copies_E


def _state(nodes: NodeProblem, slots: NodeSlots, *, seed: int, is_even: bool) -> _State:
    expert_K, node_K, load_K = slots.expert_K.copy(), slots.node_K, slots.load_K.copy()
    places = min(expert_K.size, nodes.num_nodes * nodes.gpus_per_node) + 1
    at_EP, place_K = np.zeros((nodes.num_experts, places), np.int64), np.zeros(expert_K.size, np.int64)
    held_NE, load_NE = np.zeros(nodes.tokens_NE.shape, np.int64), np.zeros(nodes.tokens_NE.shape)
    for slot in np.flatnonzero(expert_K >= 0):
        expert = expert_K[slot]
        at_EP[expert, 0] += 1
        place_K[slot] = at_EP[expert, 0]
        at_EP[expert, place_K[slot]] = slot
        held_NE[node_K[slot], expert] += 1
        load_NE[node_K[slot], expert] += load_K[slot]
    total_E = nodes.tokens_NE.sum(axis=0)
    kept_NE = np.minimum(load_NE, nodes.tokens_NE)
    if is_even:
        kept_NE = load_NE * nodes.tokens_NE / np.where(total_E > 0, total_E, 1.0)
    busy_3N = np.stack([(load_NE - kept_NE).sum(axis=1), (nodes.tokens_NE - kept_NE).sum(axis=1), load_NE.sum(axis=1)])
    return _State(
        tokens_NE=np.array(nodes.tokens_NE), total_E=total_E, is_even=is_even, gpus=nodes.gpus_per_node,
        load_NE=load_NE, busy_3N=busy_3N, node_K=node_K, expert_K=expert_K, load_K=load_K, at_EP=at_EP,
        place_K=place_K, held_NE=held_NE, slot_C=np.zeros(2 * places + 2, np.int64),
        expert_C=np.zeros(2 * places + 2, np.int64), load_C=np.zeros(2 * places + 2),
        draw=np.array([seed], dtype=np.uint64),
    )  # fmt: skip


@compiled_in_place
def _uniform(state: _State) -> float:
    """A number of 0 to 1, by splitmix64."""
    state.draw[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state.draw[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return float((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * _TWO53


@compiled_in_place
def _below(state: _State, count: int) -> int:
    return int(_uniform(state) * count)


@compiled_in_place
def _power(x: float, squarings: int) -> float:
    for _ in range(squarings):
        x *= x
    return x


@compiled_in_place
def _root(x: float, squarings: int) -> float:
    for _ in range(squarings):
        x = np.sqrt(max(x, 0.0))
    return x


@compiled_in_place
def _change(state: _State, count: int, slot: int, expert: int, load: float) -> int:
    """Notes what a slot would hold."""
    state.slot_C[count], state.expert_C[count], state.load_C[count] = slot, expert, load
    return count + 1


@compiled_in_place
def _book(state: _State, node: int, expert: int, change: float) -> None:
    """Lets the node compute `change` more copies of the expert."""
    if expert < 0:
        return
    own, before = state.tokens_NE[node, expert], state.load_NE[node, expert]
    after = max(before + change, 0.0)
    kept = min(after, own) - min(before, own)
    if state.is_even:
        kept = (after - before) * own / state.total_E[expert] if own > 0.0 else 0.0
    state.busy_3N[0, node] += after - before - kept
    state.busy_3N[1, node] -= kept
    state.busy_3N[2, node] += after - before
    state.load_NE[node, expert] = after


@compiled_in_place
def _other(state: _State, slot: int) -> int:
    """Another slot of the same expert, -1 if there is none."""
    expert = state.expert_K[slot]
    if expert < 0 or state.at_EP[expert, 0] < 2:
        return -1
    found = state.at_EP[expert, 1 + _below(state, state.at_EP[expert, 0])]
    return -1 if found == slot else found


@compiled_in_place
def _pull(state: _State, count: int, taker: int, leaver: int) -> int:
    """The replica of change `taker` takes own copies that others of its expert compute for its node, and these give up.

    Others give only what starts in none of their nodes. `leaver` is a slot that holds the expert no more.
    """
    slot, expert = state.slot_C[taker], state.expert_C[taker]
    node = state.node_K[slot]
    lacks = state.tokens_NE[node, expert] - state.load_NE[node, expert] - state.load_C[taker]
    slots = state.at_EP[expert, 0]
    first = _below(state, slots)
    for step in range(slots):
        giver = state.at_EP[expert, 1 + (first + step) % slots]
        over = state.load_NE[state.node_K[giver], expert] - state.tokens_NE[state.node_K[giver], expert]
        give = min(over, state.load_K[giver], lacks)
        if giver != leaver and give > 0.0:
            count = _change(state, count, giver, expert, state.load_K[giver] - give)
            state.load_C[taker] += give
            lacks -= give
    return count


@compiled_in_place
def _swap(state: _State) -> int:
    """Two slots of different nodes exchange what they hold. Each move says how many slots change: 0 if not legal."""
    one, two = _below(state, state.expert_K.size), _below(state, state.expert_K.size)
    a, b = state.expert_K[one], state.expert_K[two]
    node_1, node_2 = state.node_K[one], state.node_K[two]
    if a == b or node_1 == node_2:
        return 0
    if (a >= 0 and state.held_NE[node_2, a] >= state.gpus) or (b >= 0 and state.held_NE[node_1, b] >= state.gpus):
        return 0
    count = _change(state, 0, one, b, state.load_K[two])
    count = _change(state, count, two, a, state.load_K[one])
    if not state.is_even:
        if b >= 0 and state.at_EP[b, 0] > 1:
            count = _pull(state, count, 0, two)
        if a >= 0 and state.at_EP[a, 0] > 1:
            count = _pull(state, count, 1, one)
    return count


@compiled_in_place
def _shift(state: _State) -> int:
    """A slot gives another of its expert what its node gets from others, what the other's node lacks, or any part."""
    one = _below(state, state.expert_K.size)
    two = _other(state, one)
    if two < 0 or state.is_even:
        return 0
    expert, node_1, node_2 = state.expert_K[one], state.node_K[one], state.node_K[two]
    kind = _uniform(state)
    give = state.load_K[one] * _uniform(state) * _uniform(state)
    if kind < 0.25:
        give = state.tokens_NE[node_2, expert] - state.load_NE[node_2, expert]
    elif kind < 0.5:
        give = state.load_NE[node_1, expert] - state.tokens_NE[node_1, expert]
    give = min(give, state.load_K[one])
    if give <= 0.0:
        return 0
    _change(state, 0, one, expert, state.load_K[one] - give)
    return _change(state, 1, two, expert, state.load_K[two] + give)


@compiled_in_place
def _replace(state: _State) -> int:
    """A replica leaves its copies to another of its expert, and one of a new expert comes in its place."""
    one, new = _below(state, state.expert_K.size), _below(state, state.tokens_NE.shape[1])
    heir, left = _other(state, one), state.expert_K[one]
    if heir < 0 or new == left or state.held_NE[state.node_K[one], new] >= state.gpus:
        return 0
    if state.is_even:
        return _respread(state, one, new)
    count = _change(state, 0, one, new, 0.0)
    count = _change(state, count, heir, left, state.load_K[heir] + state.load_K[one])
    if _uniform(state) < 0.8:
        return _pull(state, count, 0, one)
    giver = state.at_EP[new, 1 + _below(state, state.at_EP[new, 0])]
    state.load_C[0] = state.load_K[giver] * 0.5
    return _change(state, count, giver, new, state.load_K[giver] * 0.5)


@compiled_in_place
def _respread(state: _State, one: int, new: int) -> int:
    """The same under an even split: all replicas of both experts get another load."""
    left = state.expert_K[one]
    fewer, more = state.at_EP[left, 0] - 1, state.at_EP[new, 0] + 1
    count = _change(state, 0, one, new, state.total_E[new] / more)
    for place in range(1, fewer + 2):
        if state.at_EP[left, place] != one:
            count = _change(state, count, state.at_EP[left, place], left, state.total_E[left] / fewer)
    for place in range(1, more):
        count = _change(state, count, state.at_EP[new, place], new, state.total_E[new] / more)
    return count


@compiled_in_place
def _put(state: _State, count: int) -> None:
    """The slots hold what the move says, and the move says what they held before."""
    for c in range(count):
        slot = state.slot_C[c]
        _book(state, state.node_K[slot], state.expert_K[slot], -state.load_K[slot])
    for c in range(count):
        slot = state.slot_C[c]
        _book(state, state.node_K[slot], state.expert_C[c], state.load_C[c])
        state.expert_K[slot], state.expert_C[c] = state.expert_C[c], state.expert_K[slot]
        state.load_K[slot], state.load_C[c] = state.load_C[c], state.load_K[slot]


@compiled_in_place
def _record(state: _State, slot: int, before: int) -> None:
    """Keeps the lists of the expert that left a slot and of the one that came."""
    after = state.expert_K[slot]
    if before != after and before >= 0:
        last = state.at_EP[before, state.at_EP[before, 0]]
        state.at_EP[before, state.place_K[slot]] = last
        state.place_K[last] = state.place_K[slot]
        state.at_EP[before, 0] -= 1
        state.held_NE[state.node_K[slot], before] -= 1
    if before != after and after >= 0:
        state.at_EP[after, 0] += 1
        state.at_EP[after, state.at_EP[after, 0]] = slot
        state.place_K[slot] = state.at_EP[after, 0]
        state.held_NE[state.node_K[slot], after] += 1


@compiled_in_place
def _add(state: _State, sum_2: Floats, scale_2: Floats, count: int, squarings: int, sign: float) -> None:
    """Adds the powers of the move's nodes and slots to the sums, or takes them away."""
    for c in range(count):
        node, is_new = state.node_K[state.slot_C[c]], True
        for earlier in range(c):
            is_new = is_new and state.node_K[state.slot_C[earlier]] != node
        if is_new:
            sum_2[0] += sign * _power(state.busy_3N[0, node] / scale_2[0], squarings)
            sum_2[0] += sign * _power(state.busy_3N[1, node] / scale_2[0], squarings)
            sum_2[1] += sign * _power(state.busy_3N[2, node] / state.gpus / scale_2[1], squarings)
        sum_2[1] += sign * _power(state.load_K[state.slot_C[c]] / scale_2[1], squarings)


@compiled_in_place
def _cost(sum_2: Floats, price_2: Floats, squarings: int) -> float:
    return float(price_2[0] * _root(sum_2[0], squarings) + price_2[1] * _root(sum_2[1], squarings))


@compiled
def _anneal(
    state: _State, price_2: Floats, scale_2: Floats, steps: int, squarings: int, hot: float, cold: float
) -> None:
    """Tries so many moves, and changes the state in place."""
    sum_2, old_2 = np.zeros(2), np.zeros(2)
    for node in range(state.busy_3N.shape[1]):
        for row in range(2):
            sum_2[0] += _power(state.busy_3N[row, node] / scale_2[0], squarings)
        sum_2[1] += _power(state.busy_3N[2, node] / state.gpus / scale_2[1], squarings)
    for slot in range(state.load_K.size):
        sum_2[1] += _power(state.load_K[slot] / scale_2[1], squarings)
    cost = _cost(sum_2, price_2, squarings)
    heat, cooling = hot * cost, (cold / hot) ** (1.0 / max(steps, 1))
    for _ in range(steps):
        heat *= cooling
        kind = _uniform(state)
        count = _swap(state) if kind < 0.4 else _shift(state) if kind < 0.7 else _replace(state)
        if count == 0:
            continue
        old_2[:] = sum_2
        _add(state, sum_2, scale_2, count, squarings, -1.0)
        _put(state, count)
        _add(state, sum_2, scale_2, count, squarings, 1.0)
        after = _cost(sum_2, price_2, squarings)
        if after <= cost or _uniform(state) < np.exp((cost - after) / heat):
            cost = after
            for c in range(count):
                _record(state, state.slot_C[c], state.expert_C[c])
        else:
            _put(state, count)
            sum_2[:] = old_2
