"""The expert-parallel load balancer that DeepSeek published: counts by the largest replica, then greedy packing.

Our own implementation of the idea. Reference: github.com/deepseek-ai/EPLB, its readme and `eplb.py`.
Axes of arrays: E expert, G GPU, R replica.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Floats, Ints, PlacedLayer, PlacementProblem
from moeplan.errors import PlanError
from moeplan.jit import clock_s
from moeplan.placers._seats import Bools, placed

UNEQUAL_SLOTS = False
"""Each GPU has the same number of slots."""


def place(
    problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float, nodes: int = 1, groups: int = 1
) -> PlacedLayer:
    """What `raw` says, made legal.

    The balancer may put an expert twice on a GPU. One of the two is swapped with the replica of another GPU that is
    nearest in size, so that loads change least. Replicas beyond the number of GPUs go to other experts. Raises
    PlanError as `raw` does.
    """
    start_s = clock_s()
    tokens_E, gpus = problem.tokens_E, problem.num_gpus
    expert_R, gpu_R = raw(tokens_E, gpus=gpus, slots=problem.slots, nodes=nodes, groups=groups, most=gpus // nodes)
    return placed(problem, expert_R, _repaired(expert_R, gpu_R, tokens_E, gpus), start_s=start_s)


def raw(
    tokens_E: Floats, *, gpus: int, slots: int, nodes: int = 1, groups: int = 1, most: int | None = None
) -> tuple[Ints, Ints]:
    """`expert_R` and `gpu_R` as the balancer finds them, an expert perhaps twice on a GPU.

    With one node it is the global rule. With more, groups of experts are packed onto nodes first, and each node
    balances its own (the hierarchical rule). `most` limits an expert's replicas. Raises PlanError where slots are no
    multiple of the GPUs, GPUs or groups none of the nodes, or experts none of the groups.
    """
    for what, number, divides, by in (
        ("slots", slots, gpus, "GPUs"),
        ("GPUs", gpus, nodes, "nodes"),
        ("groups", groups, nodes, "nodes"),
        ("experts", tokens_E.size, groups, "groups"),
    ):
        if number % divides:
            raise PlanError(
                f"eplb: {number} {what} are no multiple of {divides} {by}, and it packs equal numbers; "
                f"use a multiple of {divides}, or the placer local_search"
            )
    group_tokens = tokens_E.reshape(groups, -1).sum(axis=1)
    node_E = np.repeat(_packed(group_tokens, nodes), tokens_E.size // groups)
    expert_R, gpu_R = [], []
    for node in range(nodes):
        mine = np.flatnonzero(node_E == node)
        count_E = _counts(tokens_E[mine], slots // nodes, most or slots)
        here_R = np.repeat(np.arange(mine.size), count_E)
        expert_R.append(mine[here_R])
        gpu_R.append(_packed((tokens_E[mine] / count_E)[here_R], gpus // nodes) + node * (gpus // nodes))
    return np.concatenate(expert_R), np.concatenate(gpu_R)


def _counts(tokens_E: Floats, slots: int, most: int) -> Ints:
    """Replicas: the next one always goes to the largest tokens / replicas."""
    count_E = np.ones(tokens_E.size, np.int64)
    for _ in range(slots - tokens_E.size):
        count_E[np.where(count_E < most, tokens_E / count_E, -1.0).argmax()] += 1
    return count_E


def _packed(size_R: Floats, bins: int) -> Ints:
    """The bin of each item: largest first, each into the lightest bin that holds fewer than its equal part."""
    bin_R, load, held = np.zeros(size_R.size, np.int64), np.zeros(bins), np.zeros(bins, np.int64)
    for r in np.argsort(-size_R, kind="stable"):
        chosen = int(np.where(held < size_R.size // bins, load, np.inf).argmin())
        bin_R[r] = chosen
        load[chosen] += size_R[r]
        held[chosen] += 1
    return bin_R


def _repaired(expert_R: Ints, gpu_R: Ints, tokens_E: Floats, gpus: int) -> Ints:
    """`gpu_R` without an expert twice on a GPU."""
    gpu_R = gpu_R.copy()
    size_R = (tokens_E / np.bincount(expert_R, minlength=tokens_E.size))[expert_R]
    while True:
        here_EG = np.zeros((tokens_E.size, gpus), np.int64)
        np.add.at(here_EG, (expert_R, gpu_R), 1)
        twice = np.flatnonzero(here_EG[expert_R, gpu_R] > 1)
        if twice.size == 0:
            return gpu_R
        r = twice[0]
        here: Bools = here_EG > 0
        may_R = ~here[expert_R[r], gpu_R] & ~here[expert_R, gpu_R[r]]
        other = int(np.where(may_R, np.abs(size_R - size_R[r]), np.inf).argmin())
        gpu_R[r], gpu_R[other] = gpu_R[other], gpu_R[r]
