"""The best split of an expert's tokens between replicas that stand already.

Axes of arrays: E expert, G GPU, R replica; `first_*` says where a group of `order_R` starts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, Ints
from moeplan.jit import compiled, compiled_in_place

Bools = npt.NDArray[np.bool_]
_ROUNDING = 1e-12


class _Flow(NamedTuple):
    """Tokens of each replica and GPU, who stands where, and the paths of the last search.

    `path_GP[g]` are the replica that gives and the one on g that takes; -1 where g gives of its own, -2 for no path.
    """

    flow_R: Floats
    load_G: Floats
    expert_R: Ints
    gpu_R: Ints
    first_E: Ints
    of_expert_R: Ints
    first_G: Ints
    on_gpu_R: Ints
    path_GP: Ints
    reached: Ints


@compiled
def best_shares(tokens_E: Floats, expert_R: Ints, gpu_R: Ints, num_gpus: int) -> Floats:
    """`share_R` with the least tokens on the fullest GPU: exact, by a parametric maximum flow.

    It is the most, over sets of GPUs, of the tokens of experts that stand nowhere else, over the number of GPUs. We
    start at the mean and push tokens from fuller GPUs to emptier ones along shortest paths. Where no path is left, all
    that the fuller GPUs reach is such a set, so its mean is the next, higher level (Newton's method for parametric
    flows: Gallo, Grigoriadis, Tarjan, SIAM J. Computing 18, 1989). It ends, since each level is the mean of another
    set.
    """
    first_E, of_expert_R = _grouped(expert_R, tokens_E.size)
    first_G, on_gpu_R = _grouped(gpu_R, num_gpus)
    flow_R, load_G = np.empty(expert_R.size), np.zeros(num_gpus)
    for r, e in enumerate(expert_R):
        flow_R[r] = tokens_E[e] / (first_E[e + 1] - first_E[e])
        load_G[gpu_R[r]] += flow_R[r]
    path_GP, reached = np.empty((num_gpus, 2), np.int64), np.empty(num_gpus, np.int64)
    flow = _Flow(flow_R, load_G, expert_R, gpu_R, first_E, of_expert_R, first_G, on_gpu_R, path_GP, reached)
    level = load_G.sum() / num_gpus
    while True:
        found, count = _reach(flow, level, np.zeros(tokens_E.size, np.bool_))
        if found >= 0:
            _push(flow, level, found)
            continue
        tokens = load_G[reached[:count]].sum()
        if tokens <= count * level * (1 + _ROUNDING):
            break
        level = tokens / count
    for r, e in enumerate(expert_R):
        flow_R[r] = flow_R[r] / tokens_E[e] if tokens_E[e] > 0 else 1.0 / (first_E[e + 1] - first_E[e])
    return flow_R


@compiled
def _grouped(group_R: Ints, groups: int) -> tuple[Ints, Ints]:
    """Where each group starts in the replicas sorted by group, and these."""
    first = np.zeros(groups + 1, np.int64)
    for group in group_R:
        first[group + 1] += 1
    first = np.cumsum(first)
    place, order_R = first.copy(), np.empty(group_R.size, np.int64)
    for r, group in enumerate(group_R):
        order_R[place[group]] = r
        place[group] += 1
    return first, order_R


@compiled_in_place
def _reach(flow: _Flow, level: float, seen_E: Bools) -> tuple[int, int]:
    """The nearest GPU below the level that a GPU above it can give tokens to, or -1; and how many GPUs were reached."""
    path_GP, reached = flow.path_GP, flow.reached
    path_GP[:] = -2
    count, done = 0, 0
    for g in range(flow.load_G.size):
        if flow.load_G[g] > level * (1 + _ROUNDING):
            path_GP[g, 0], reached[count] = -1, g
            count += 1
    while done < count:
        g = reached[done]
        done += 1
        for giver in flow.on_gpu_R[flow.first_G[g] : flow.first_G[g + 1]]:
            e = flow.expert_R[giver]
            if seen_E[e] or flow.flow_R[giver] <= level * _ROUNDING:
                continue
            seen_E[e] = True
            for taker in flow.of_expert_R[flow.first_E[e] : flow.first_E[e + 1]]:
                there = flow.gpu_R[taker]
                if path_GP[there, 0] != -2:
                    continue
                path_GP[there, 0], path_GP[there, 1], reached[count] = giver, taker, there
                if flow.load_G[there] < level * (1 - _ROUNDING):
                    return there, count
                count += 1
    return -1, count


@compiled_in_place
def _push(flow: _Flow, level: float, found: int) -> None:
    """As many tokens as the path to GPU `found` bears."""
    g, amount = found, level - flow.load_G[found]
    while flow.path_GP[g, 0] >= 0:
        amount = min(amount, flow.flow_R[flow.path_GP[g, 0]])
        g = flow.gpu_R[flow.path_GP[g, 0]]
    amount = min(amount, flow.load_G[g] - level)
    flow.load_G[g] -= amount
    flow.load_G[found] += amount
    g = found
    while flow.path_GP[g, 0] >= 0:
        flow.flow_R[flow.path_GP[g, 0]] -= amount
        flow.flow_R[flow.path_GP[g, 1]] += amount
        g = flow.gpu_R[flow.path_GP[g, 0]]
