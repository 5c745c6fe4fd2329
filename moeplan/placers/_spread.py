"""Replicas for tokens that are split as is best: balanced experts, then replicas that pass on what is too much.

Axes of arrays: E expert, G GPU, C slot of a GPU, R replica.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacementProblem
from moeplan.jit import clock_s, compiled, compiled_in_place
from moeplan.placers._anneal import Bools, draw, seeded
from moeplan.placers._balance import balanced
from moeplan.placers._seats import filled, split
from moeplan.placers._split import best_shares

_PLACE, _MOVE, _SWAP = 0, 1, 2
_LENIENT = 0.05
"""The part of the fullest GPU's tokens by which the first change may make things worse."""
_CLIMB = 8000
"""Changes that are tried at last, each with its own best split."""


def spread(
    problem: PlacementProblem, *, bound: float, gap: float, rng: np.random.Generator, stop_s: float
) -> LayerPlacement:
    """The best of several numbers of replicas kept for passing tokens on, then of single changes to it.

    With GPUs - 1 of them, a chain of all GPUs evens out what the start leaves uneven, so the mean is nearly always met.
    """
    tokens_E, gpus, slots = problem.tokens_E, problem.num_gpus, problem.slots
    most_links = min(gpus - 1, slots - problem.num_experts)
    best, best_EG = np.inf, np.zeros((0, 0), np.bool_)
    for links in sorted({most_links * part // 4 for part in range(5)}, reverse=True):
        here_EG = _linked(problem, links, bound, gap, rng, stop_s)
        most = _most(tokens_E, here_EG)
        if most < best:
            best, best_EG = most, here_EG
        if best <= bound * (1 + gap) or clock_s() > stop_s:
            break
    if best > bound * (1 + gap) and clock_s() <= stop_s:
        best_EG = _climbed(
            best_EG, tokens_E, problem.slots_per_gpu, bound * (1 + gap), _CLIMB, int(rng.integers(2**31))
        )
    return split(problem, *np.nonzero(best_EG))


def _linked(
    problem: PlacementProblem, links: int, bound: float, gap: float, rng: np.random.Generator, stop_s: float
) -> Bools:
    """`here_EG` of experts that are balanced without `links` of the slots, and these slots as links of a chain.

    The chain goes to the emptiest GPU whenever what it brings along fills that, else to the fullest. A link is a second
    place, on the next GPU, for the largest expert that this lacks; those that bring most are made first, where a GPU
    has a free slot. Slots that then are left go to the experts with the largest replicas.
    """
    tokens_E, gpus, slots = problem.tokens_E, problem.num_gpus, problem.slots - links
    keep_free = links > 0 and slots <= gpus * (problem.slots_per_gpu - 1)
    per_gpu = problem.slots_per_gpu - keep_free
    at_GC = balanced(
        tokens_E,
        gpus=gpus,
        slots=slots,
        per_gpu=per_gpu,
        bound=bound,
        gap=gap,
        rng=rng,
        stop_s=stop_s,
        walks=1 if links else None,
    )
    here_EG = np.zeros((tokens_E.size + 1, gpus), np.bool_)
    here_EG[at_GC, np.arange(gpus)[:, None]] = True
    here_EG = here_EG[:-1]
    free_G = problem.slots_per_gpu - here_EG.sum(axis=0)
    size_E = tokens_E / here_EG.sum(axis=1)
    for _, giver, taker in sorted(_chain(size_E @ here_EG, free_G), reverse=True)[:links]:
        only = here_EG[:, giver] & ~here_EG[:, taker]
        if only.any() and free_G[taker] > 0:
            here_EG[np.argmax(np.where(only, size_E, -1.0)), taker] = True
            free_G[taker] -= 1
    return filled(here_EG, tokens_E, slots=problem.slots, per_gpu=problem.slots_per_gpu)


def _chain(load_G: Floats, free_G: Ints) -> list[tuple[float, int, int]]:
    """Tokens that each link brings, the GPU that gives and the GPU with a free slot that takes."""
    excess_G = load_G - load_G.mean()
    left = list(np.argsort(excess_G))
    brought, giver, chain = 0.0, -1, []
    while left:
        taker = int(left.pop(0 if brought + excess_G[left[0]] >= 0 else -1))
        if giver >= 0 and free_G[taker] > 0:
            chain.append((brought, giver, taker))
        brought, giver = max(0.0, brought + excess_G[taker]), taker
    return chain


@compiled
def _most(tokens_E: Floats, here_EG: Bools) -> float:
    """Tokens of the fullest GPU under the best split."""
    expert_R, gpu_R = np.nonzero(here_EG)
    share_R = best_shares(tokens_E, expert_R, gpu_R, here_EG.shape[1])
    load_G = np.zeros(here_EG.shape[1])
    for r, e in enumerate(expert_R):
        load_G[gpu_R[r]] += share_R[r] * tokens_E[e]
    return float(load_G.max())


@compiled
def _climbed(start_EG: Bools, tokens_E: Floats, per_gpu: int, target: float, steps: int, seed: int) -> Bools:
    """The best of a walk of single changes, of which ever less bad ones are taken."""
    here_EG, best_EG = start_EG.copy(), start_EG.copy()
    now = best = _most(tokens_E, here_EG)
    random = seeded(seed)
    experts, gpus = here_EG.shape
    for step in range(steps):
        if best <= target:
            break
        kind, y, a, b = draw(random, 3), draw(random, experts), draw(random, gpus), draw(random, gpus)
        x = draw(random, experts)
        while not here_EG[x, a]:
            x, a = draw(random, experts), draw(random, gpus)
        if not _may_change(here_EG, per_gpu, kind, x, a, y, b):
            continue
        _change(here_EG, kind, x, a, y, b)
        most = _most(tokens_E, here_EG)
        if most <= now * (1 + _LENIENT * (1 - step / steps) ** 2):
            now = most
            if most < best:
                best, best_EG[:] = most, here_EG
        else:
            _change(here_EG, kind, x, a, y, b)
    return best_EG


@compiled_in_place
def _may_change(here_EG: Bools, per_gpu: int, kind: int, x: int, a: int, y: int, b: int) -> bool:
    """Whether a change keeps the placement legal."""
    if kind == _PLACE:
        return here_EG[x].sum() > 1 and not here_EG[y, a]
    if here_EG[x, b]:
        return False
    return here_EG[y, b] and not here_EG[y, a] if kind == _SWAP else here_EG[:, b].sum() < per_gpu


@compiled_in_place
def _change(here_EG: Bools, kind: int, x: int, a: int, y: int, b: int) -> None:
    """Does, or takes back: y in the place of x on GPU a; x from GPU a to b; that and y from b to a."""
    here_EG[x, a] ^= True
    if kind == _PLACE:
        here_EG[y, a] ^= True
    else:
        here_EG[x, b] ^= True
    if kind == _SWAP:
        here_EG[y, b] ^= True
        here_EG[y, a] ^= True
