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

_WORTH = 0.03
"""A move has to lower the fullest GPU by this part of a replica's mean tokens, on the mean of all moves.

Of a replica's, so that experts of half the size, whose moves take half as long, are placed alike.
"""
_PATIENCE = 16
"""Steps without a better placement, after which the walk ends."""


class _Walk(NamedTuple):
    """Where experts stood at first, what left a GPU on the way and does not come back, and moves that are left."""

    was_EG: Bools
    left_EG: Bools
    budget: int


class _Step(NamedTuple):
    """Tokens of the fullest GPU touched; slots i of GPU a and j of GPU b swap if y < 0, else expert y gets slot j."""

    most: float
    i: int
    b: int
    j: int
    y: int


def moved(problem: PlacementProblem, *, target: float) -> LayerPlacement:
    """The best placement on a walk from `problem.now`, an even split of it, in `max_moves` moves at most."""
    assert problem.max_moves is not None
    experts, now = problem.num_experts, present(problem)
    start_GC = slots_of(now, gpus=problem.num_gpus, per_gpu=problem.slots_per_gpu, num_experts=experts)
    at_GC = _few_moves(start_GC, problem.tokens_E, problem.max_moves, target)
    return split(problem, *replicas_in(at_GC, experts))


@compiled
def _few_moves(start_GC: Ints, tokens_E: Floats, max_moves: int, target: float) -> Ints:
    """`at_GC` where tokens of the fullest GPU plus worth * moves are least, on a walk of steepest descent.

    Where no step lowers the fullest GPU, the one that raises it least is made, and nothing comes back to a GPU that it
    left: so moves are found that help together only (Glover, "Tabu search", ORSA Journal on Computing 1, 1989).
    """
    s = state_of(start_GC, tokens_E)
    was_EG, left_EG = s.here_EG.copy(), np.zeros_like(s.here_EG)
    was_EG[tokens_E.size] = True
    best_GC, best, moves, since = start_GC.copy(), s.load_G.max(), 0, 0
    worth = _WORTH * tokens_E.sum() / s.count_E[: tokens_E.size].sum()
    while s.load_G.max() > target and since < _PATIENCE:
        a, walk = int(np.argmax(s.load_G)), _Walk(was_EG, left_EG, max_moves - moves)
        step = _best_reassign(s, walk, a, _best_swap(s, walk, a))
        if step.b < 0:
            break
        moves += _made(s, walk, a, step)
        price = s.load_G.max() + worth * moves
        since += 1
        if price < best:
            best, best_GC[:], since = price, s.at_GC, 0
    return best_GC


@compiled_in_place
def _made(s: State, walk: _Walk, a: int, step: _Step) -> int:
    """Makes the step; the moves that it adds."""
    b, x = step.b, s.at_GC[step.b, step.j]
    walk.left_EG[x, b] = x < s.tokens_E.size
    if step.y >= 0:
        reassign(s, b, step.j, step.y)
        return int(walk.was_EG[x, b]) - int(walk.was_EG[step.y, b])
    y = s.at_GC[a, step.i]
    walk.left_EG[y, a] = y < s.tokens_E.size
    added = _swap_moves(s, walk, a, step.i, b, step.j)
    swap(s, a, step.i, b, step.j)
    return added


@compiled_in_place
def _swap_moves(s: State, walk: _Walk, a: int, i: int, b: int, j: int) -> int:
    """Moves that a swap adds: fewer than 0 where it brings experts back."""
    x, y, was_EG = s.at_GC[a, i], s.at_GC[b, j], walk.was_EG
    return int(was_EG[x, a]) - int(was_EG[x, b]) + int(was_EG[y, b]) - int(was_EG[y, a])


@compiled_in_place
def _may_swap(s: State, walk: _Walk, a: int, i: int, b: int, j: int) -> bool:
    """Whether a swap is legal, takes tokens off GPU a, brings nothing back and is within the budget."""
    x, y = s.at_GC[a, i], s.at_GC[b, j]
    if s.size_E[x] <= s.size_E[y] or walk.left_EG[x, b] or walk.left_EG[y, a]:
        return False
    return may_swap(s, a, i, b, j) and _swap_moves(s, walk, a, i, b, j) <= walk.budget


@compiled_in_place
def _best_swap(s: State, walk: _Walk, a: int) -> _Step:
    """The swap of GPU a with another that leaves the fuller of the two lightest."""
    step = _Step(np.inf, 0, -1, 0, -1)
    for b in range(s.load_G.size):
        if b == a or s.load_G[b] >= step.most:
            continue
        for i in range(s.at_GC.shape[1]):
            for j in range(s.at_GC.shape[1]):
                less = s.size_E[s.at_GC[a, i]] - s.size_E[s.at_GC[b, j]]
                most = max(s.load_G[a] - less, s.load_G[b] + less)
                if most < step.most and _may_swap(s, walk, a, i, b, j):
                    step = _Step(most, i, b, j, -1)
    return step


@compiled_in_place
def _may_reassign(s: State, walk: _Walk, b: int, x: int, y: int) -> bool:
    """Whether a slot of x on GPU b may become one of y: legal, nothing comes back, within the budget."""
    if not may_reassign(s, b, x, y) or walk.left_EG[y, b]:
        return False
    return int(walk.was_EG[x, b]) - int(walk.was_EG[y, b]) <= walk.budget


@compiled_in_place
def _best_reassign(s: State, walk: _Walk, a: int, step: _Step) -> _Step:
    """The change of one slot that lowers GPU a, and leaves none of those touched as full as `step` does, or `step`.

    It is a slot elsewhere for an expert of a, which a then shares, or a slot of a for any expert.
    """
    for b in range(s.load_G.size):
        for j in range(s.at_GC.shape[1]):
            x = s.at_GC[b, j]
            if x == s.tokens_E.size or s.count_E[x] < 2:
                continue
            for k in range(s.tokens_E.size if b == a else s.at_GC.shape[1]):
                y = k if b == a else s.at_GC[a, k]
                if not _may_reassign(s, walk, b, x, y):
                    continue
                most = after_reassign(s, a, b, x, y)
                if most >= min(step.most, s.load_G[a]):
                    continue
                for g in range(s.load_G.size):
                    if g == b or s.here_EG[x, g]:
                        most = max(most, after_reassign(s, g, b, x, y))
                if most < step.most:
                    step = _Step(most, 0, b, j, y)
    return step
