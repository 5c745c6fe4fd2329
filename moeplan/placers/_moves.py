"""A better placement a few moves from where experts stand now.

Axes of arrays: E expert, with one more row for "no expert"; G GPU, C slot of a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacementProblem
from moeplan.jit import compiled, compiled_in_place
from moeplan.placers._anneal import (
    Bools,
    State,
    after_reassign,
    may_reassign,
    may_swap,
    reassign,
    state_of,
    swap,
)
from moeplan.placers._balance import replicas_in, slots_of
from moeplan.placers._seats import present, split

_WORTH = 0.01
"""A move has to lower the fullest GPU by this part of its tokens, on the mean of all moves, or it is not made."""


class _Step(NamedTuple):
    """Tokens of the fullest GPU touched; slots i of GPU a and j of GPU b swap if y < 0, else expert y gets slot j."""

    most: float
    i: int
    b: int
    j: int
    y: int


def moved(problem: PlacementProblem, *, target: float) -> LayerPlacement:
    """The placement after steepest descent from `problem.now`, an even split of it, in `max_moves` moves at most."""
    assert problem.max_moves is not None
    experts, now = problem.num_experts, present(problem)
    start_GC = slots_of(now, gpus=problem.num_gpus, per_gpu=problem.slots_per_gpu, num_experts=experts)
    at_GC = _few_moves(start_GC, problem.tokens_E, problem.max_moves, target)
    return split(problem, *replicas_in(at_GC, experts))


@compiled
def _few_moves(start_GC: Ints, tokens_E: Floats, max_moves: int, target: float) -> Ints:
    """`at_GC` where tokens of the fullest GPU times 1 + worth * moves are least, on the way of steepest descent."""
    s = state_of(start_GC, tokens_E)
    was_EG = s.here_EG.copy()
    was_EG[tokens_E.size] = True
    best_GC, best, moves = start_GC.copy(), s.load_G.max(), 0
    while s.load_G.max() > target:
        a = int(np.argmax(s.load_G))
        step = _best_reassign(s, was_EG, a, max_moves - moves, _best_swap(s, was_EG, a, max_moves - moves))
        if step.b < 0:
            break
        if step.y < 0:
            moves += _swap_moves(s, was_EG, a, step.i, step.b, step.j)
            swap(s, a, step.i, step.b, step.j)
        else:
            moves += int(was_EG[s.at_GC[step.b, step.j], step.b]) - int(was_EG[step.y, step.b])
            reassign(s, step.b, step.j, step.y)
        price = s.load_G.max() * (1 + _WORTH * moves)
        if price < best:
            best, best_GC[:] = price, s.at_GC
    return best_GC


@compiled_in_place
def _swap_moves(s: State, was_EG: Bools, a: int, i: int, b: int, j: int) -> int:
    """Moves that a swap adds: fewer than 0 where it brings experts back."""
    x, y = s.at_GC[a, i], s.at_GC[b, j]
    return int(was_EG[x, a]) - int(was_EG[x, b]) + int(was_EG[y, b]) - int(was_EG[y, a])


@compiled_in_place
def _best_swap(s: State, was_EG: Bools, a: int, budget: int) -> _Step:
    """The swap of GPU a with another that leaves the fuller of the two lightest."""
    step = _Step(s.load_G[a] * (1 - 1e-9), 0, -1, 0, -1)
    for b in range(s.load_G.size):
        if s.load_G[b] >= step.most:
            continue
        for i in range(s.at_GC.shape[1]):
            for j in range(s.at_GC.shape[1]):
                less = s.size_E[s.at_GC[a, i]] - s.size_E[s.at_GC[b, j]]
                most = max(s.load_G[a] - less, s.load_G[b] + less)
                if most < step.most and may_swap(s, a, i, b, j) and _swap_moves(s, was_EG, a, i, b, j) <= budget:
                    step = _Step(most, i, b, j, -1)
    return step


@compiled_in_place
def _best_reassign(s: State, was_EG: Bools, a: int, budget: int, step: _Step) -> _Step:
    """The change of one slot that lowers GPU a below what `step` does, or `step`.

    It is a slot elsewhere for an expert of a, which a then shares, or a slot of a for any expert.
    """
    for b in range(s.load_G.size):
        for j in range(s.at_GC.shape[1]):
            x = s.at_GC[b, j]
            if x == s.tokens_E.size or s.count_E[x] < 2:
                continue
            for k in range(s.tokens_E.size if b == a else s.at_GC.shape[1]):
                y = k if b == a else s.at_GC[a, k]
                if not may_reassign(s, b, x, y) or int(was_EG[x, b]) - int(was_EG[y, b]) > budget:
                    continue
                most = after_reassign(s, a, b, x, y)
                if most < step.most:
                    for g in range(s.load_G.size):
                        if g == b or s.here_EG[x, g]:
                            most = max(most, after_reassign(s, g, b, x, y))
                    if most < step.most:
                        step = _Step(most, 0, b, j, y)
    return step
