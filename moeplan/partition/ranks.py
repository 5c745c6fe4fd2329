"""Which GPU of the machine plays which part: the two grids of a plan, dense and expert, over the same ranks.

A stage has `stage_size` positions q. Dense coordinates of q, the fastest first: tp, cp, dp. Expert coordinates: etp,
ep, edp (or etp, edp, ep). Pipeline rank p of position q is GPU  q mod B + B (p + pp (q div B))  for blocks of B
positions. Reference: Liu et al., "MoE Parallel Folding" (2025), for two grids over one set of ranks.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.program import Ints
from moeplan.errors import PlanError

# for each axis of a group: the coordinates, fastest first, of the grid it belongs to
_DENSE = ("tp", "cp", "dp")
_EXPERT = {"tp-cp-dp-ep-pp": ("etp", "edp", "ep")}
_EXPERT_NEAR = ("etp", "ep", "edp")


def block_size(plan: Plan) -> int:
    """Consecutive GPUs of one stage: the whole stage, or the smallest block that holds both grids' near axes."""
    if plan.rank_order != "tp-cp-ep-pp-dp":
        return plan.stage_size
    block = lcm(plan.tp * plan.cp, plan.etp * plan.ep)
    if plan.stage_size % block:
        raise PlanError(
            f"rank_order {plan.rank_order}: blocks of {block} GPUs do not divide a stage of {plan.stage_size}"
        )
    return block


def ranks_of_stage(plan: Plan, stage: int) -> Ints:
    """The GPU of each position of a pipeline rank, shape (stage_size,)."""
    block = block_size(plan)
    position = np.arange(plan.stage_size, dtype=np.int64)
    return position % block + block * (stage + plan.pp * (position // block))


def groups(plan: Plan, axes: tuple[str, ...]) -> Ints:
    """Positions that differ in `axes` alone, one row for each group, members in the order of those axes.

    Axes are of one grid: dense ("tp", "cp", "dp") or expert ("etp", "ep", "edp").
    """
    names = _DENSE if set(axes) <= set(_DENSE) else _EXPERT.get(plan.rank_order, _EXPERT_NEAR)
    return _groups(names, tuple(getattr(plan, name) for name in names), axes)


@lru_cache(maxsize=4096)
def _groups(names: tuple[str, ...], sizes: tuple[int, ...], axes: tuple[str, ...]) -> Ints:
    grid = np.arange(int(np.prod(sizes)), dtype=np.int64).reshape(sizes[::-1])
    last = [len(names) - 1 - names.index(axis) for axis in reversed(axes)]
    first = [dim for dim in range(len(names)) if dim not in last]
    table = grid.transpose(first + last).reshape(-1, int(np.prod([grid.shape[dim] for dim in last])))
    table.setflags(write=False)
    return table


def coordinate(plan: Plan, axis: str) -> Ints:
    """The coordinate of each position along one axis, shape (stage_size,)."""
    names = _DENSE if axis in _DENSE else _EXPERT.get(plan.rank_order, _EXPERT_NEAR)
    sizes: list[int] = [getattr(plan, name) for name in names]
    stride = int(np.prod(sizes[: names.index(axis)]))
    return np.arange(plan.stage_size, dtype=np.int64) // stride % sizes[names.index(axis)]
