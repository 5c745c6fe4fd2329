"""Experts are placed anew once a step costs so much more than their placement promised."""

from __future__ import annotations

from math import isfinite

from moeplan.adaptations import KEEP, Decision, Seen
from moeplan.errors import PlanError

_ROUNDING = 1e-9


def decide(seen: Seen, *, threshold: float = 0.1, max_moves: int | None = None, window: int = 1) -> Decision:
    """Re-placement where the last step cost more than 1 + `threshold` times what the placement promised.

    What is promised, not what is ideal, is compared: a load that no placement balances moves nothing.
    """
    if not (isfinite(threshold) and threshold >= 0):
        raise PlanError(f"threshold: {threshold} is no share of what was promised; use 0 or more, such as 0.1")
    is_worse = seen.cost_T[-1] > (1 + threshold + _ROUNDING) * seen.promised_cost
    return Decision(replaces=True, max_moves=max_moves, window=window) if is_worse else KEEP
