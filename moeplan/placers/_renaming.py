"""GPUs that are alike change names, so that fewest replicas move from where they stand.

Axes of arrays: E expert, G GPU; GG new name by old.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacementProblem
from moeplan.jit import compiled


def renamed(problem: PlacementProblem, placement: LayerPlacement, now: LayerPlacement, *, block: int) -> LayerPlacement:
    """The same placement with the GPUs of each `block` (a node, or all where there are no prices) exchanged.

    GPUs of a node, and without prices all GPUs, are alike, so that this changes no value. No other names move fewer
    replicas.
    """
    common_GG = -_here_EG(problem, placement).T @ _here_EG(problem, now)
    name_G = np.concatenate([
        first + assigned(np.ascontiguousarray(common_GG[first : first + block, first : first + block]))
        for first in range(0, problem.num_gpus, block)
    ])  # fmt: skip
    return LayerPlacement(expert_R=placement.expert_R, gpu_R=name_G[placement.gpu_R], share_SR=placement.share_SR)


def _here_EG(problem: PlacementProblem, placement: LayerPlacement) -> Floats:
    here_EG = np.zeros((problem.num_experts, problem.num_gpus))
    here_EG[placement.expert_R, placement.gpu_R] = 1.0
    return here_EG


@compiled
def assigned(cost_GG: Floats) -> Ints:
    """The column of each row, no two alike, of least total cost: rows are added one by one along cheapest paths.

    Reference: Jonker, Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
    problems", Computing 38, 1987. In the extra column -1 stands the row that is being added.
    """
    size = len(cost_GG)
    price_row, price_column = np.zeros(size), np.zeros(size + 1)
    row_of = np.full(size + 1, -1)
    for row in range(size):
        row_of[size], column = row, size
        far, before, done = np.full(size, np.inf), np.full(size, size), np.zeros(size + 1, np.bool_)
        while row_of[column] >= 0:
            done[column] = True
            at, nearest = row_of[column], -1
            for j in range(size):
                if done[j]:
                    continue
                reduced = cost_GG[at, j] - price_row[at] - price_column[j]
                if reduced < far[j]:
                    far[j], before[j] = reduced, column
                if nearest < 0 or far[j] < far[nearest]:
                    nearest = j
            step = far[nearest]
            for j in range(size + 1):
                if done[j]:
                    price_row[row_of[j]] += step
                    price_column[j] -= step
                elif j < size:
                    far[j] -= step
            column = nearest
        while column != size:
            row_of[column], column = row_of[before[column]], before[column]
    column_of = np.empty(size, np.int64)
    for j in range(size):
        column_of[row_of[j]] = j
    return column_of
