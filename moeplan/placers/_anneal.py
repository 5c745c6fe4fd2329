"""Compiled local search for even splits: replica counts, a greedy start, descent and annealing.

Axes of arrays: E expert, with one more row for "no expert", which weighs nothing; G GPU; C slot of a GPU.
`at_GC` is the expert in each slot, `count_E` replicas, `size_E` tokens of one replica, `here_EG` whether an expert
stands on a GPU, `load_G` tokens of a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, Ints
from moeplan.jit import compiled, compiled_in_place

Bools = npt.NDArray[np.bool_]
Randoms = npt.NDArray[np.uint64]
_LOOK = 256
"""Steps of annealing between two looks at the fullest GPU."""


class State(NamedTuple):
    """Experts in slots, and all that follows from it."""

    at_GC: Ints
    here_EG: Bools
    load_G: Floats
    size_E: Floats
    count_E: Ints
    tokens_E: Floats


class _Walk(NamedTuple):
    """What a step aims at, how readily it gets worse, and its random numbers."""

    aim: float
    heat: float
    random: Randoms


@compiled
def apportioned(tokens_E: Floats, gpus: int, slots: int) -> Ints:
    """Replicas of each expert, `slots` in all and `gpus` at most, with the largest tokens / replicas least."""
    count_E = np.ones(tokens_E.size, np.int64)
    size_E = tokens_E.copy()
    for _ in range(slots - tokens_E.size):
        e = np.argmax(size_E)
        count_E[e] += 1
        size_E[e] = tokens_E[e] / count_E[e] if count_E[e] < gpus else -1.0
    return count_E


@compiled
def packed(tokens_E: Floats, count_E: Ints, gpus: int, per_gpu: int) -> Ints:
    """`at_GC`: each replica, largest first, on the lightest GPU that has a free slot and not the expert.

    Where no such GPU is left, one with a free slot takes a replica from one that has not the expert. There is one that
    it lacks, since it holds fewer.
    """
    experts = tokens_E.size
    at_GC = np.full((gpus, per_gpu), experts)
    here_EG = np.zeros((experts + 1, gpus), np.bool_)
    held_G, load_G = np.zeros(gpus, np.int64), np.zeros(gpus)
    size_E = tokens_E / count_E
    for e in np.argsort(-size_E, kind="mergesort"):
        for _ in range(count_E[e]):
            best, other = -1, -1
            for g in range(gpus):
                if held_G[g] < per_gpu and not here_EG[e, g] and (best < 0 or load_G[g] < load_G[best]):
                    best = g
                if held_G[g] < per_gpu:
                    other = g
            if best < 0:
                best = _make_room(e, other, at_GC, here_EG, held_G, load_G, size_E)
            at_GC[best, held_G[best]] = e
            here_EG[e, best] = True
            held_G[best] += 1
            load_G[best] += size_E[e]
    return at_GC


@compiled
def _make_room(e: int, other: int, at_GC: Ints, here_EG: Bools, held_G: Ints, load_G: Floats, size_E: Floats) -> int:
    """A full GPU without expert e, after its last replica that GPU `other` lacks went there."""
    for g in range(load_G.size):
        if here_EG[e, g]:
            continue
        for i in range(held_G[g]):
            x = at_GC[g, i]
            if here_EG[x, other]:
                continue
            held_G[g] -= 1
            at_GC[g, i], at_GC[g, held_G[g]] = at_GC[g, held_G[g]], size_E.size
            at_GC[other, held_G[other]] = x
            held_G[other] += 1
            here_EG[x, g], here_EG[x, other] = False, True
            load_G[g] -= size_E[x]
            load_G[other] += size_E[x]
            return g
    return -1


@compiled
def state_of(at_GC: Ints, tokens_E: Floats) -> State:
    """The state of a copy of the slots."""
    experts, gpus = tokens_E.size, at_GC.shape[0]
    count_E = np.bincount(at_GC.ravel(), minlength=experts + 1)
    size_E = np.zeros(experts + 1)
    size_E[:experts] = tokens_E / count_E[:experts]
    here_EG = np.zeros((experts + 1, gpus), np.bool_)
    load_G = np.zeros(gpus)
    for g in range(gpus):
        for e in at_GC[g]:
            here_EG[e, g] = e < experts
            load_G[g] += size_E[e]
    return State(at_GC.copy(), here_EG, load_G, size_E, count_E, tokens_E)


@compiled
def descended(start_GC: Ints, tokens_E: Floats, target: float) -> Ints:
    """`at_GC` after best swaps of the fullest GPU with any other, until it has `target` or no swap lowers it."""
    s = state_of(start_GC, tokens_E)
    while True:
        a = int(np.argmax(s.load_G))
        best, b, i, j = s.load_G[a] * (1 - 1e-9), -1, 0, 0
        if s.load_G[a] <= target:
            return s.at_GC
        for other in range(s.load_G.size):
            if other == a or s.load_G[other] >= best:
                continue
            for slot in range(s.at_GC.shape[1]):
                for there in range(s.at_GC.shape[1]):
                    less = s.size_E[s.at_GC[a, slot]] - s.size_E[s.at_GC[other, there]]
                    after = max(s.load_G[a] - less, s.load_G[other] + less)
                    if after < best and may_swap(s, a, slot, other, there):
                        best, b, i, j = after, other, slot, there
        if b < 0:
            return s.at_GC
        swap(s, a, i, b, j)


@compiled
def annealed(
    start_GC: Ints, tokens_E: Floats, aim: float, target: float, steps: int, seed: int, hot: float, cold: float
) -> Ints:
    """The best `at_GC` of a walk that lowers the sum of squared excess over `aim`; ends where nothing exceeds `target`.

    A step swaps two slots, or gives the slot of an expert with several replicas to another expert. One that makes
    things worse is taken with the usual chance at a temperature that falls from `hot` to `cold`, in squared means.
    """
    s = state_of(start_GC, tokens_E)
    random = seeded(seed)
    best_GC, best, heat = s.at_GC.copy(), s.load_G.max(), 0.0
    gpus, slots = s.at_GC.shape
    mean = s.load_G.sum() / gpus
    spare = s.count_E[: tokens_E.size].sum() > tokens_E.size
    for step in range(steps):
        if step % _LOOK == 0:
            most = s.load_G.max()
            if most < best:
                best, best_GC[:] = most, s.at_GC
            if most <= target:
                break
            heat = mean * mean * hot * (cold / hot) ** (step / steps)
        walk = _Walk(aim, heat, random)
        a, b = draw(random, gpus), draw(random, gpus)
        if s.load_G[b] > s.load_G[a]:
            a, b = b, a
        i, j = draw(random, slots), draw(random, slots)
        kind = draw(random, 16) if spare else 2
        if kind == 0:
            _try_reassign(s, walk, a, i, draw(random, tokens_E.size))
        elif kind == 1:
            _try_reassign(s, walk, b, j, s.at_GC[a, i])
        else:
            _try_swap(s, walk, a, i, b, j)
    return best_GC


@compiled_in_place
def may_swap(s: State, a: int, i: int, b: int, j: int) -> bool:
    """Whether neither expert stands on the other GPU yet."""
    return not s.here_EG[s.at_GC[a, i], b] and not s.here_EG[s.at_GC[b, j], a]


@compiled_in_place
def swap(s: State, a: int, i: int, b: int, j: int) -> None:
    """Slot i of GPU a and slot j of GPU b change places; "no expert" stands nowhere."""
    x, y = s.at_GC[a, i], s.at_GC[b, j]
    less = s.size_E[x] - s.size_E[y]
    s.load_G[a] -= less
    s.load_G[b] += less
    s.here_EG[x, a] = s.here_EG[y, b] = False
    s.at_GC[a, i], s.at_GC[b, j] = y, x
    s.here_EG[x, b], s.here_EG[y, a] = x < s.tokens_E.size, y < s.tokens_E.size


@compiled_in_place
def after_reassign(s: State, g: int, b: int, x: int, y: int) -> float:
    """Tokens of GPU g once a slot of x on GPU b is one of y."""
    up = s.tokens_E[x] / (s.count_E[x] - 1) - s.size_E[x]
    new_y = s.tokens_E[y] / (s.count_E[y] + 1)
    if g == b:
        return float(s.load_G[g] - s.size_E[x] + new_y)
    return float(s.load_G[g] + up * s.here_EG[x, g] - (s.size_E[y] - new_y) * s.here_EG[y, g])


@compiled_in_place
def may_reassign(s: State, b: int, x: int, y: int) -> bool:
    """Whether x has a replica to spare and y can stand on GPU b."""
    experts = s.tokens_E.size
    return x < experts and y < experts and s.count_E[x] > 1 and not s.here_EG[y, b]


@compiled_in_place
def reassign(s: State, b: int, j: int, y: int) -> None:
    """Slot j of GPU b is given to expert y."""
    x = s.at_GC[b, j]
    for g in range(s.load_G.size):
        s.load_G[g] = after_reassign(s, g, b, x, y)
    s.count_E[x] -= 1
    s.count_E[y] += 1
    s.size_E[x], s.size_E[y] = s.tokens_E[x] / s.count_E[x], s.tokens_E[y] / s.count_E[y]
    s.here_EG[x, b], s.here_EG[y, b] = False, True
    s.at_GC[b, j] = y


@compiled_in_place
def _try_swap(s: State, walk: _Walk, a: int, i: int, b: int, j: int) -> None:
    """Perhaps a swap."""
    less = s.size_E[s.at_GC[a, i]] - s.size_E[s.at_GC[b, j]]
    before = _excess(s.load_G[a], walk) + _excess(s.load_G[b], walk)
    worse = _excess(s.load_G[a] - less, walk) + _excess(s.load_G[b] + less, walk) - before
    if a != b and _taken(walk, worse) and may_swap(s, a, i, b, j):
        swap(s, a, i, b, j)


@compiled_in_place
def _try_reassign(s: State, walk: _Walk, b: int, j: int, y: int) -> None:
    """Perhaps slot j of GPU b goes to expert y."""
    x = s.at_GC[b, j]
    if not may_reassign(s, b, x, y):
        return
    worse = 0.0
    for g in range(s.load_G.size):
        if s.here_EG[x, g] or s.here_EG[y, g]:
            worse += _excess(after_reassign(s, g, b, x, y), walk) - _excess(s.load_G[g], walk)
    if _taken(walk, worse):
        reassign(s, b, j, y)


@compiled_in_place
def _excess(load: float, walk: _Walk) -> float:
    """The square of what is above the aim."""
    above = max(0.0, load - walk.aim)
    return above * above


@compiled_in_place
def _taken(walk: _Walk, worse: float) -> bool:
    """Whether a step that makes things `worse` by so much is taken."""
    return worse <= 0 or (
        worse < 30 * walk.heat and draw(walk.random, 1 << 30) < math.exp(-worse / walk.heat) * (1 << 30)
    )


@compiled
def seeded(seed: int) -> Randoms:
    """Where a row of random numbers starts."""
    return np.array([np.uint64(seed) * np.uint64(2654435761) + np.uint64(88172645463325252)])


@compiled_in_place
def draw(random: Randoms, below: int) -> int:
    """A number from 0 to below - 1, by Marsaglia's xorshift ("Xorshift RNGs", J. of Statistical Software 8, 2003)."""
    x = random[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    random[0] = x
    return int((x >> np.uint64(33)) * np.uint64(below) >> np.uint64(31))
