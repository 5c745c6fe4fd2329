"""Two slots on a GPU: replica counts that can be paired within a limit, or a proof that there are none, by a small ILP.

Of replicas and empty places that fill two slots on every GPU, each above half the limit needs a partner that leaves it
room. The larger of two needs the smaller partner, so all find one if and only if, from each size downwards, no more
replicas are that large than there are partners small enough: the ILP walks down the sizes and keeps the partners left
over in stock. The rest, at most half the limit, pair as they like. That an expert stands once on a GPU is left out,
which a bound may; the placement is made and checked elsewhere.
Axes of arrays: E expert, O option (an expert with a number of replicas), T step down the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.domain.placement import Floats, Ints, PlacementProblem
from moeplan.placers._counts import ROUNDING, Options, any_counts, options
from moeplan.placers._highs import solver_of
from moeplan.placers._linear import Model

_PROVEN = 1e-3
"""A shortage is a whole number, so a dual bound above this proves 1; HiGHS' tolerance is 1e-6."""
_NEVER_ZERO = 0.995
"""Relative gap at which HiGHS stops: any positive bound proves a shortage, and without one it goes on to 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pairable:
    """Counts that can be paired within the limit, and whether it is proven that there are none."""

    count_E: Ints | None
    refuted: bool


def pairable(problem: PlacementProblem, *, limit: float, time_limit_s: float) -> Pairable:
    """Replica counts whose replicas pair up within `limit` tokens, with all counts allowed."""
    found = options(problem, limit=limit, within=any_counts(problem))
    if found is None:
        return Pairable(count_E=None, refuted=True)
    model = Model()
    chosen_O = model.add(found.size_O.size, high=1.0, whole=True)
    short = model.add(1, cost=1.0)
    _one_count_each(model, chosen_O, found, problem)
    _every_slot_used(model, chosen_O, found, problem)
    _partners_last(model, chosen_O, short, found, problem, limit=limit)
    values, bound = _solved(model, time_limit_s=time_limit_s)
    if values is None or values[short[0]] > 0.5:
        return Pairable(count_E=None, refuted=bound > _PROVEN)
    taken = values[chosen_O] > 0.5
    count_E = np.bincount(found.expert_O[taken], weights=found.count_O[taken], minlength=problem.num_experts)
    return Pairable(count_E=count_E.astype(np.int64), refuted=False)


def _solved(model: Model, *, time_limit_s: float) -> tuple[Floats | None, float]:
    """Values, if HiGHS found any, and its dual bound. Without presolve: that takes nine tenths of the time here.

    Presolve takes 2.5 s of 2.9 at 288 slots on 144 GPUs, and removes one row.
    """
    limits = {"mip_rel_gap": _NEVER_ZERO, "time_limit": max(0.1, time_limit_s)}
    solver = model.given_to(solver_of(random_seed=0, presolve="off", **limits))
    solver.run()
    found = solver.getSolution()
    return np.array(found.col_value) if found.value_valid else None, float(solver.getInfo().mip_dual_bound)


def _one_count_each(model: Model, chosen_O: Ints, found: Options, problem: PlacementProblem) -> None:
    """`sum over k of chosen[e, k] = 1`, all experts e."""
    rows_E = model.rows(problem.num_experts, low=1.0, high=1.0)
    model.put(rows_E[found.expert_O], chosen_O, 1.0)


def _every_slot_used(model: Model, chosen_O: Ints, found: Options, problem: PlacementProblem) -> None:
    """`sum over e, k of k * chosen[e, k] = slots`."""
    model.put(model.rows(1, low=problem.slots, high=problem.slots), chosen_O, found.count_O)


def _partners_last(
    model: Model, chosen_O: Ints, short: Ints, found: Options, problem: PlacementProblem, *, limit: float
) -> None:
    """`stock[t] = stock[t - 1] + sum of k * chosen over partners new in t - sum of k * chosen over sizes in t >= 0`.

    Steps t go down the sizes above half the limit; a partner is new where it first leaves enough room. The first stock
    is the empty places, and the shortage where partners are missing.
    """
    within, size_O = limit * (1 + ROUNDING), found.size_O
    large_T = np.unique(size_O[size_O > within / 2])[::-1]
    if not large_T.size:
        return
    room_T = np.searchsorted(size_O, within - large_T, side="right")
    last_T = np.append(np.flatnonzero(np.diff(room_T)), large_T.size - 1)
    large_T, room_T = large_T[last_T], room_T[last_T]
    stock_T, empty = model.add(large_T.size), 2 * problem.num_gpus - problem.slots
    start_T = np.where(np.arange(large_T.size) == 0, float(empty), 0.0)
    rows_T = model.rows(large_T.size, low=start_T, high=start_T)
    model.put(rows_T, stock_T, 1.0)
    model.put(rows_T[1:], stock_T[:-1], -1.0)
    model.put(rows_T[:1], short, -1.0)
    is_large_O = size_O > within / 2
    step_O = np.searchsorted(-large_T, -size_O, side="left")
    model.put(rows_T[step_O[is_large_O]], chosen_O[is_large_O], found.count_O[is_large_O])
    small_O = np.arange(size_O.size)[: room_T[-1]]
    model.put(rows_T[np.searchsorted(room_T, small_O, side="right")], chosen_O[small_O], -found.count_O[small_O])
