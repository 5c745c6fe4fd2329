"""Experts on nodes by which of them tokens choose together, so that a token has to be sent to fewer nodes.

A dispatch that sends a token once to each node where it has experts (de-duplicated dispatch) sends as many copies as
the token visits nodes. Experts that tokens often choose together should share a node: a hypergraph, whose edges are the
sets, is cut into balanced parts of little connectivity.

Left out: replicas (each expert stands once), and where tokens start: a visit of a token's own node counts as any other.

Axes of arrays: E expert, K choice of a token, N node, T tried exchange, U different sets of experts, V number
of nodes visited.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, Ints
from moeplan.domain.routing import TokenSets
from moeplan.errors import PlanError
from moeplan.jit import compiled, compiled_in_place

_STEPS_PER_EXPERT, _STARTS = 400, 3
_ROUNDING = 1e-12
_HOT, _COLD = 0.1, 0.001
"""Heat at the begin and at the end, over the visits that one expert's tokens make."""


def visits(sets: TokenSets, node_E: Ints) -> float:
    """Nodes that a token visits on average, if expert e stands in node `node_E[e]` only."""
    node_UK = np.sort(node_E[sets.experts_UK], axis=1)
    visited_U = 1 + (np.diff(node_UK, axis=1) > 0).sum(axis=1)
    return float((visited_U * sets.count_U).sum() / sets.count_U.sum())


def grouped(
    sets: TokenSets, *, num_experts: int, num_nodes: int, rng: np.random.Generator, most_load: float = 1.05
) -> Ints:
    """The node of each expert: as many experts on each, none over `most_load` times the mean load, few visits.

    The best of some annealings. Where none reaches the wanted balance, more go on from the most balanced one, with its
    fullest node as the limit. Raises PlanError where experts do not divide by nodes, or a set names an expert that is
    not there.
    """
    if num_experts % num_nodes:
        raise PlanError(f"nodes: {num_nodes} do not divide {num_experts} experts; use a divisor")
    if sets.experts_UK.size == 0 or sets.experts_UK.max() >= num_experts:
        raise PlanError(f"sets: they must name experts 0 to {num_experts - 1}, and at least one; record them anew")
    weight_I = np.repeat(sets.count_U, sets.experts_UK.shape[1]).astype(np.float64)
    load_E = np.bincount(sets.experts_UK.ravel(), weight_I, num_experts).astype(np.float64)
    most = most_load * load_E.sum() / num_nodes
    node_E = _annealed(sets, _dealt(load_E, num_nodes), load_E, num_nodes, most, rng)
    fullest = float(np.bincount(node_E, load_E, num_nodes).max())
    return _annealed(sets, node_E, load_E, num_nodes, fullest, rng) if fullest > most * (1 + _ROUNDING) else node_E


def _annealed(
    sets: TokenSets, start_E: Ints, load_E: Floats, num_nodes: int, most: float, rng: np.random.Generator
) -> Ints:
    """The best of the start and some annealings from it: nodes least above `most`, then fewest visits.

    An exchange of two experts knows the change of visits from the sets that hold one of them.
    """
    heat = visits(sets, start_E) * sets.count_U.sum() / load_E.size
    tried = [start_E]
    for seed in rng.integers(2**31, size=_STARTS).tolist():
        draw_T3 = np.random.default_rng(seed).random((_STEPS_PER_EXPERT * load_E.size, 3))
        node_E = start_E.copy()
        _exchange(node_E, load_E, most, _Tokens.of(sets, node_E, num_nodes), draw_T3, heat * _HOT, heat * _COLD)
        tried.append(node_E)
    return min(tried, key=lambda each: (_over(load_E, each, num_nodes, most), visits(sets, each)))


def visits_bound(sets: TokenSets, *, num_experts: int, num_nodes: int) -> float:
    """Nodes that a token visits on average are no fewer than this, with as many experts on each node.

    Of a token's K experts at least p(v) pairs share a node if it visits v nodes: p(v) is that of v groups as equal as
    can be, which falls with v and is convex. An expert shares its node with E / N - 1 others, so at most half the sum
    over experts of their E / N - 1 most frequent partners' counts are pairs that share a node. By convexity the mean of
    v is at least the v at which p, drawn as a line through whole v, is that many pairs for each token. Weak, since all
    experts cannot have their favourite partners at once.
    """
    width, size = sets.experts_UK.shape[1], num_experts // num_nodes
    together_EE = np.sort(co_activation(sets, num_experts), axis=1)
    inside = together_EE[:, num_experts - size + 1 :].sum() / 2
    visited_V = np.arange(1, min(width, num_nodes) + 1)
    each_V, more_V = width // visited_V, width % visited_V
    pairs_V = (visited_V - more_V) * each_V * (each_V - 1) / 2 + more_V * each_V * (each_V + 1) / 2
    by_pairs = np.interp(inside / sets.count_U.sum(), pairs_V[::-1], visited_V[::-1].astype(np.float64))
    return float(max(by_pairs, -(-width // size)))


def co_activation(sets: TokenSets, num_experts: int) -> Floats:
    """Tokens that choose both of two experts; 0 for an expert with itself."""
    chosen_UE = np.zeros((sets.count_U.size, num_experts))
    np.put_along_axis(chosen_UE, sets.experts_UK.astype(np.int64), 1.0, axis=1)
    together_EE = chosen_UE.T @ (chosen_UE * sets.count_U[:, None])
    np.fill_diagonal(together_EE, 0.0)
    return np.asarray(together_EE)


class _Tokens(NamedTuple):
    """Token sets as compiled functions need them: sets of expert e are `set_I[first_E1[e] : first_E1[e + 1]]`."""

    set_I: Ints
    first_E1: Ints
    has_UE: npt.NDArray[np.bool_]
    count_U: Ints
    held_UN: Ints

    @staticmethod
    def of(sets: TokenSets, node_E: Ints, num_nodes: int) -> _Tokens:
        """The sets, and how many experts of each stand on each node."""
        rows, width = sets.experts_UK.shape
        has_UE = np.zeros((rows, node_E.size), dtype=np.bool_)
        np.put_along_axis(has_UE, sets.experts_UK.astype(np.int64), True, axis=1)
        held_UN = np.zeros((rows, num_nodes), dtype=np.int64)
        np.add.at(held_UN, (np.repeat(np.arange(rows), width), node_E[sets.experts_UK].ravel()), 1)
        expert_I, set_I = np.nonzero(has_UE.T)
        first_E1 = np.searchsorted(expert_I, np.arange(node_E.size + 1)).astype(np.int64)
        return _Tokens(
            set_I=set_I.astype(np.int64), first_E1=first_E1, has_UE=has_UE,
            count_U=np.array(sets.count_U), held_UN=held_UN,
        )  # fmt: skip


def _dealt(load_E: Floats, num_nodes: int) -> Ints:
    """Experts heaviest first, each to the lightest node that has room."""
    node_E, load_N = np.zeros(load_E.size, dtype=np.int64), np.zeros(num_nodes)
    room_N = np.full(num_nodes, load_E.size // num_nodes)
    for expert in np.argsort(-load_E, kind="stable"):
        node = int(np.argmin(np.where(room_N > 0, load_N, np.inf)))
        node_E[expert] = node
        load_N[node] += load_E[expert]
        room_N[node] -= 1
    return node_E


def _over(load_E: Floats, node_E: Ints, num_nodes: int, most: float) -> float:
    """Load of the fullest node above what is wanted."""
    return max(0.0, float(np.bincount(node_E, load_E, num_nodes).max()) - most * (1 + _ROUNDING))


@compiled_in_place
def _moved(tokens: _Tokens, expert: int, other: int, here: int, there: int, sign: int) -> int:
    """Visits that tokens make more if the expert goes from `here` to `there` and `other` the other way; -1 books it.

    Only sets with the expert and without the other: those with both visit the same nodes as before.
    """
    more = 0
    for item in range(tokens.first_E1[expert], tokens.first_E1[expert + 1]):
        u = tokens.set_I[item]
        if tokens.has_UE[u, other]:
            continue
        if sign < 0:
            tokens.held_UN[u, here] -= 1
            tokens.held_UN[u, there] += 1
        else:
            if tokens.held_UN[u, here] == 1:
                more -= tokens.count_U[u]
            if tokens.held_UN[u, there] == 0:
                more += tokens.count_U[u]
    return more


@compiled
def _exchange(
    node_E: Ints, load_E: Floats, most: float, tokens: _Tokens, draw_T3: Floats, hot: float, cold: float
) -> None:
    """Exchanges two experts' nodes, by annealing, and never lets nodes above `most` grow."""
    load_N = np.zeros(tokens.held_UN.shape[1])
    for expert in range(node_E.size):
        load_N[node_E[expert]] += load_E[expert]
    steps = draw_T3.shape[0]
    for step in range(steps):
        one, two = int(draw_T3[step, 0] * node_E.size), int(draw_T3[step, 1] * node_E.size)
        here, there = node_E[one], node_E[two]
        shift = load_E[two] - load_E[one]
        before = max(load_N[here], load_N[there], most)
        if here == there or max(load_N[here] + shift, load_N[there] - shift) > before:
            continue
        more = _moved(tokens, one, two, here, there, 1) + _moved(tokens, two, one, there, here, 1)
        if more > 0 and draw_T3[step, 2] >= np.exp(-more / (hot * (cold / hot) ** (step / steps))):
            continue
        _moved(tokens, one, two, here, there, -1)
        _moved(tokens, two, one, there, here, -1)
        node_E[one], node_E[two] = there, here
        load_N[here] += shift
        load_N[there] -= shift
