"""Replicas on GPUs so that the fullest GPU of an even split is light: a start and walks, from Python.

Axes of arrays: E expert, G GPU, C slot of a GPU, R replica.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Floats, Ints, LayerPlacement
from moeplan.jit import clock_s
from moeplan.placers._anneal import annealed, apportioned, descended, packed, state_of

_WALKS = (50_000, 200_000, 400_000, 800_000, 1_600_000, 3_200_000)
"""Steps of the walks, each from the best placement so far."""
_STEPS_A_SLOT = 10_000
"""The most steps of a walk: small instances are walked through sooner."""
_HOT, _COLDER = 10.0, 1e-3
"""A walk starts at this times the squared gap and ends at this part of it. Ten was best of 0.1 to 1000 on
DeepSeek-V2-Lite's loads and lognormal ones of deviation 1.8: cooler walks never leave the counts they start from."""
_AIM = 0.7
"""Of the gap that is allowed: squares of a small excess weigh nothing, so walks end a little above what they aim at."""
_COOLEST = 1e-5
"""The least heat, in squared means, that a walk starts with."""
_ANEW, _STEPS_ANEW, _AIM_ANEW = 24, 500_000, 0.5
_SHAKES, _COLD = (3e-3, 1e-2), 1e-6
"""Walks that all start from the greedy placement: their squared means at the beginning, in turn, and at the end. Of
nine recorded layers of 64 experts that the walks above leave too full, twelve of these settle six.
"""


def balanced(
    tokens_E: Floats,
    *,
    gpus: int,
    slots: int,
    per_gpu: int,
    bound: float,
    gap: float,
    rng: np.random.Generator,
    stop_s: float = np.inf,
    walks: int | None = None,
) -> Ints:
    """`at_GC`, E for no expert. The fullest GPU is within `gap` of `bound`, or the lightest found in `walks` walks."""
    target, aim = bound * (1 + gap), bound * (1 + _AIM * gap)
    at_GC = packed(tokens_E, apportioned(tokens_E, gpus, slots), gpus, per_gpu)
    at_GC = descended(at_GC, tokens_E, target)
    best, mean = state_of(at_GC, tokens_E).load_G.max(), tokens_E.sum() / gpus
    for steps in _WALKS[:walks]:
        if best <= target or gpus == 1 or clock_s() > stop_s:
            break
        hot = max(_COOLEST, _HOT * ((best - target) / mean) ** 2) if steps > _WALKS[0] else _COOLEST
        found_GC = annealed(
            at_GC,
            tokens_E,
            aim,
            target,
            min(steps, _STEPS_A_SLOT * slots),
            int(rng.integers(2**31)),
            hot,
            _COLDER * hot,
        )
        most = state_of(found_GC, tokens_E).load_G.max()
        if most < best:
            at_GC, best = found_GC, most
    return at_GC


def walked_anew(
    tokens_E: Floats,
    *,
    gpus: int,
    slots: int,
    per_gpu: int,
    bound: float,
    gap: float,
    rng: np.random.Generator,
    stop_s: float,
) -> Ints:
    """`at_GC` of the best of walks that know nothing of one another, until one is within `gap` of `bound`.

    Walks that go on from the best one stay with its replica counts, which may have no such packing.
    """
    start_GC = packed(tokens_E, apportioned(tokens_E, gpus, slots), gpus, per_gpu)
    best_GC, best = start_GC, np.inf
    target, aim = bound * (1 + gap), bound * (1 + _AIM_ANEW * gap)
    for number in range(_ANEW):
        hot, seed = _SHAKES[number % len(_SHAKES)], int(rng.integers(2**31))
        found_GC = annealed(start_GC, tokens_E, aim, target, _STEPS_ANEW, seed, hot, _COLD)
        most = state_of(found_GC, tokens_E).load_G.max()
        if most < best:
            best_GC, best = found_GC, most
        if best <= target or clock_s() > stop_s:
            break
    return best_GC


def replicas_in(at_GC: Ints, num_experts: int) -> tuple[Ints, Ints]:
    """`expert_R` and `gpu_R` of what is in the slots."""
    gpu_R, slot_R = np.nonzero(at_GC < num_experts)
    return at_GC[gpu_R, slot_R], gpu_R


def placement_of(at_GC: Ints, num_experts: int) -> LayerPlacement:
    """The placement that evenly splits tokens between the replicas in the slots."""
    return LayerPlacement.even(*replicas_in(at_GC, num_experts))


def slots_of(placement: LayerPlacement, *, gpus: int, per_gpu: int, num_experts: int) -> Ints:
    """`at_GC` of a legal placement."""
    at_GC = np.full((gpus, per_gpu), num_experts)
    order = np.argsort(placement.gpu_R, kind="stable")
    gpu_R = placement.gpu_R[order]
    at_GC[gpu_R, np.arange(gpu_R.size) - np.searchsorted(gpu_R, gpu_R)] = placement.expert_R[order]
    return at_GC
