"""Experts are placed anew after every so many steps, as serving engines do."""

from __future__ import annotations

from moeplan.adaptations import KEEP, Decision, Seen
from moeplan.errors import PlanError


def decide(seen: Seen, *, every: int = 4, max_moves: int | None = None, window: int = 1) -> Decision:
    """Re-placement when `every` steps have ended since the one that the placement was found on."""
    if every < 1:
        raise PlanError(f"every: {every} steps are no period; use 1 or more")
    is_due = len(seen.cost_T) - 1 - seen.placed_step >= every
    return Decision(replaces=True, max_moves=max_moves, window=window) if is_due else KEEP
