"""Experts are placed anew once the steps to come would lose more than the moves cost."""

from __future__ import annotations

from math import isfinite

import numpy as np

from moeplan.adaptations import KEEP, Decision, Seen
from moeplan.errors import PlanError

_MOVE_COST = 0.01
"""Of a replica, where nothing says what a move takes: a hundredth of a balanced step."""
_ROUNDING = 1e-9


def decide(
    seen: Seen, *, horizon: int = 10, move_cost: float | None = None, max_moves: int | None = None, window: int = 1
) -> Decision:
    """Re-placement where horizon * (cost of the last steps - what was promised) > moves * cost of a move.

    The last steps are the last `window` under the present placement, and a fresh one is taken to promise what that did.
    Moves are the most that may be made: where they are timed, into one GPU, since GPUs take theirs in together; else
    all, at `move_cost` each, in balanced steps. Raises PlanError for options without meaning or effect.
    """
    if horizon < 1:
        raise PlanError(f"horizon: {horizon} steps pay nothing back; use 1 or more")
    recent_T = seen.cost_T[seen.placed_step + 1 :][-window:]
    lost = horizon * (float(recent_T.mean()) - seen.promised_cost * (1 + _ROUNDING))
    pays = lost > _moving_cost(seen, move_cost, max_moves)
    return Decision(replaces=True, max_moves=max_moves, window=window) if pays else KEEP


def _moving_cost(seen: Seen, move_cost: float | None, max_moves: int | None) -> float:
    """Of the most moves that may be made, in the units of `cost_T`."""
    if move_cost is not None and not (isfinite(move_cost) and move_cost >= 0):
        raise PlanError(f"move_cost: {move_cost} is no part of a step; use 0 or more, such as {_MOVE_COST}")
    if seen.move_s is None:
        each, most = _MOVE_COST if move_cost is None else move_cost, seen.placement.gpu_R.size
    elif move_cost is not None:
        raise PlanError("move_cost: has no effect where a scenario says what a move takes; remove one of them")
    else:
        mean_tokens = float(seen.tokens_TSE[-1].sum()) / seen.num_gpus
        each, most = seen.move_s / mean_tokens, int(np.bincount(seen.placement.gpu_R).max())
    return each * (most if max_moves is None else min(max_moves, most))
