"""Seats of experts on GPUs, one by one: what a simple placer needs so that whatever it does is legal.

Axes of arrays: E expert, G GPU, R replica. `here_EG` says whether an expert stands on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacedLayer, PlacementProblem
from moeplan.errors import PlanError
from moeplan.jit import clock_s
from moeplan.placers._check import certified, check
from moeplan.placers._split import best_shares

Bools = npt.NDArray[np.bool_]


def placed(problem: PlacementProblem, expert_R: npt.ArrayLike, gpu_R: npt.ArrayLike, *, start_s: float) -> PlacedLayer:
    """The replicas with the problem's split, and their certificate."""
    return certified(problem, split(problem, expert_R, gpu_R), seconds=clock_s() - start_s)


def split(problem: PlacementProblem, expert_R: npt.ArrayLike, gpu_R: npt.ArrayLike) -> LayerPlacement:
    """The replicas, tokens split evenly or, where the problem says so, so that the fullest GPU has least."""
    if problem.split == "even":
        return LayerPlacement.even(expert_R, gpu_R)
    expert, gpu = np.array(expert_R, np.int64), np.array(gpu_R, np.int64)
    share_R = best_shares(problem.tokens_E, expert, gpu, problem.num_gpus)
    return LayerPlacement(expert_R=expert, gpu_R=gpu, share_SR=share_R[None, :])


def present(problem: PlacementProblem) -> LayerPlacement:
    """Where experts stand now. Raises PlanError if that is no legal placement of the same experts, slots and GPUs."""
    assert problem.now is not None
    try:
        check(replace(problem, now=None, max_moves=None, split="optimal"), problem.now)
    except PlanError as error:
        raise PlanError(f"now: {error}; or leave now and max_moves out, to place anew") from None
    return problem.now


def filled(here_EG: Bools, tokens_E: Floats, *, slots: int, per_gpu: int) -> Bools:
    """`here_EG` and more replicas until all `slots` are used: largest tokens / replicas first, on the freest GPU.

    There always is one: a GPU with a free slot holds fewer than `per_gpu` experts, so it lacks some.
    """
    here_EG = here_EG.copy()
    while here_EG.sum() < slots:
        free_G = per_gpu - here_EG.sum(axis=0)
        may_EG = ~here_EG & (free_G > 0)
        e = int(np.where(may_EG.any(axis=1), tokens_E / here_EG.sum(axis=1), -1.0).argmax())
        here_EG[e, np.where(may_EG[e], free_G, 0).argmax()] = True
    return here_EG


def room_G(here_EG: Bools, expert: int, *, per_gpu: int) -> Bools:
    """GPUs that have a free slot and not the expert, and where there is none, room is made on one.

    Then all GPUs with a free slot have the expert. A full one without it holds more experts than these, so one that
    they lack can go there.
    """
    free_G = here_EG.sum(axis=0) < per_gpu
    may_G: Bools = free_G & ~here_EG[expert]
    if not may_G.any():
        there, full = int(free_G.argmax()), int((~here_EG[expert]).argmax())
        goes = int((here_EG[:, full] & ~here_EG[:, there]).argmax())
        here_EG[goes, full], here_EG[goes, there] = False, True
        may_G[full] = True
    return may_G


def proportional(tokens_E: Floats, *, gpus: int, slots: int) -> Ints:
    """Replicas in proportion to tokens, 1 to `gpus` of each expert, by the largest shortfall."""
    count_E = np.ones(tokens_E.size, np.int64)
    wanted_E = slots * tokens_E / tokens_E.sum()
    for _ in range(slots - tokens_E.size):
        count_E[np.where(count_E < gpus, wanted_E - count_E, -np.inf).argmax()] += 1
    return count_E
