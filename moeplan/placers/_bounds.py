"""Cheap bounds of the fullest GPU's tokens, each valid for every legal placement, whatever the replica counts.

Axes of arrays: E expert, R replica, sorted as said.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from moeplan.domain.placement import Floats, Ints, PlacementProblem
from moeplan.jit import compiled
from moeplan.placers._visits import visits_bound

_ROUNDING = 1e-12


def bounds(problem: PlacementProblem) -> list[tuple[float, str]]:
    """Lower bounds of the objective, each with its proof as a sentence.

    With prices a layer takes at least the time of the fullest GPU's experts, so each bound of tokens is one of seconds.
    """
    if problem.visits is not None:
        nodes = problem.num_gpus // problem.visits.gpus_per_node
        fewest = visits_bound(problem.visits.sets, num_experts=problem.num_experts, num_nodes=nodes)
        return [(fewest, "partners: each expert shares its node with those most often chosen beside it, at best")]
    if problem.prices is None:
        return token_bounds(problem)
    compute_s = problem.prices.compute_s
    return [(compute_s * tokens, f"{sentence}; exchanges left out") for tokens, sentence in token_bounds(problem)]


def token_bounds(problem: PlacementProblem) -> list[tuple[float, str]]:
    """Lower bounds of the fullest GPU's tokens, weakest argument first.

    A limit on moves only takes placements away, so it harms no bound. The first two may be above the best placement by
    rounding, 1e-15 of it or so.
    """
    tokens_E, gpus, slots = problem.tokens_E, problem.num_gpus, problem.slots
    apart = problem.split == "optimal" and slots > problem.num_experts
    return [
        (float(tokens_E.sum()) / gpus, "mean: some GPU has at least the tokens of all over the GPUs"),
        (_largest_replica(tokens_E, gpus, slots), "largest replica: the best counts leave a replica as large as this"),
        (
            _companions(tokens_E, gpus, slots, apart),
            "companions: the hottest replicas and the least that must stand beside them do not fit below this",
        ),
    ]


def _largest_replica(tokens_E: Floats, gpus: int, slots: int) -> float:
    """The least that the largest tokens / replicas can be over all counts.

    Giving the next replica to the largest is exact: it is needed to get below that size. The GPUs of an expert with r
    replicas carry all its tokens, so one of them has tokens / r or more, however they are split.
    """
    heap = [(-float(tokens), 1, float(tokens)) for tokens in tokens_E]
    heapq.heapify(heap)
    for _ in range(slots - tokens_E.size):
        _, count, tokens = heap[0]
        if count == gpus:
            break
        heapq.heapreplace(heap, (-tokens / (count + 1), count + 1, tokens))
    return -heap[0][0]


def _companions(tokens_E: Floats, gpus: int, slots: int, apart: bool) -> float:
    """The largest value found that no placement reaches, by bisection; 0 if the mean itself is not refuted.

    Each value returned was refuted by itself, so the bound needs no monotony.
    """
    sorted_E = np.sort(tokens_E)[::-1].copy()
    low = float(tokens_E.sum()) / gpus
    if not _refuted(sorted_E, gpus, slots, apart, low):
        return 0.0
    high = 2 * low
    while _refuted(sorted_E, gpus, slots, apart, high):
        low, high = high, 2 * high
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _refuted(sorted_E, gpus, slots, apart, middle) else (low, middle)
    return low * (1 - 1e-11)


@compiled
def _refuted(tokens_E: Floats, gpus: int, slots: int, apart: bool, most: float) -> bool:
    """True only if no legal placement has `most` tokens or less on every GPU. `tokens_E` falls.

    An expert needs tokens / most replicas; what then is left of the slots is the most that any expert has beyond that,
    so replicas have a least size. `free` places stay empty at most, so a GPU has per_gpu - free replicas or more.
    With an even split, a replica's least neighbours raise what it needs; this is repeated. If shares may be set
    `apart`, a replica may get nothing, so neighbours count only where whole experts have no other place.
    """
    per_gpu = -(-slots // gpus)
    free = per_gpu * gpus - slots
    low_E = np.ones(tokens_E.size, np.int64)
    beside = 0.0
    while True:
        for e in range(tokens_E.size):
            if most <= beside and tokens_E[e] > 0:
                return True
            need = math.ceil(tokens_E[e] / (most - beside) * (1 - _ROUNDING)) if tokens_E[e] > 0 else 1
            if need > gpus:
                return True
            low_E[e] = max(low_E[e], need)
        spare = slots - low_E.sum()
        if spare < 0:
            return True
        least_E = tokens_E / np.minimum(gpus, low_E + spare)
        if apart:
            return _crowded(tokens_E, low_E, spare, gpus, per_gpu, most, -1, np.ones_like(low_E), tokens_E)
        now_beside = np.sort(least_E)[: max(0, per_gpu - 1 - free)].sum()
        if now_beside <= beside * (1 + _ROUNDING):
            break
        beside = now_beside
    return (
        _crowded(tokens_E, low_E, spare, gpus, per_gpu, most, -1, np.ones_like(low_E), tokens_E)
        or _crowded(tokens_E, low_E, spare, gpus, per_gpu, most, free, np.minimum(gpus, low_E + spare), least_E)
        or _stacked(least_E, low_E, gpus, per_gpu, free, most)
    )


@compiled
def _crowded(
    tokens_E: Floats,
    low_E: Ints,
    spare: int,
    gpus: int,
    per_gpu: int,
    most: float,
    free: int,
    copies_E: Ints,
    least_E: Floats,
) -> bool:
    """True if some hottest experts and what must stand beside them do not fit on any number n < GPUs of GPUs.

    Hot experts have `hot` = sum of low + spare replicas at most, so they stand on n <= hot GPUs. If free >= 0: these
    hold n * per_gpu - free replicas or more, of which all but `hot` are others, `copies_E` of size `least_E` or more.
    If free < 0: the other GPUs hold (GPUs - n) * per_gpu experts at most, so the rest of the cold experts are served on
    these n alone, however tokens are split, and `least_E` are whole experts.
    """
    order = np.argsort(-tokens_E / low_E)
    least_sum = _least_sums(least_E, copies_E, gpus * per_gpu)
    tokens, hot = 0.0, spare
    for j in range(tokens_E.size):
        tokens += tokens_E[order[j]]
        hot += low_E[order[j]]
        if hot >= gpus:
            return False
        elsewhere = free + hot if free >= 0 else gpus * per_gpu - tokens_E.size + j + 1
        fits = False
        for n in range(hot, 0, -1):
            others = min(max(0, n * per_gpu - elsewhere), least_sum.size - 1)
            if n * most * (1 + _ROUNDING) >= tokens + least_sum[others]:
                fits = True
                break
        if not fits:
            return True
    return False


@compiled
def _least_sums(least_E: Floats, copies_E: Ints, most: int) -> Floats:
    """The sums of the 0, 1, ... least sizes, each taken as often as it has copies; `most` of them at most."""
    sums = np.zeros(min(most, copies_E.sum()) + 1)
    n = 0
    for e in np.argsort(least_E):
        for _ in range(copies_E[e]):
            if n + 1 == sums.size:
                return sums
            sums[n + 1] = sums[n] + least_E[e]
            n += 1
    return sums


@compiled
def _stacked(least_E: Floats, low_E: Ints, gpus: int, per_gpu: int, free: int, most: float) -> bool:
    """True if the k * GPUs + 1 largest replicas, of which k + 1 must share a GPU, do not fit, for some k.

    That GPU has per_gpu - free - k - 1 more replicas or more, of different experts.
    """
    falling_R = np.sort(np.repeat(least_E, low_E))[::-1]
    rising_E = np.sort(least_E)
    for k in range(1, per_gpu):
        last = k * gpus
        if last >= falling_R.size:
            return False
        beside = rising_E[: max(0, per_gpu - free - k - 1)].sum()
        if falling_R[last - k : last + 1].sum() + beside > most * (1 + _ROUNDING):
            return True
    return False
