"""Experts are placed anew after each step."""

from __future__ import annotations

from moeplan.adaptations import Decision, Seen


def decide(seen: Seen, *, max_moves: int | None = None, window: int = 1) -> Decision:
    """Re-placement always, in `max_moves` moves at most, on the last `window` steps."""
    return Decision(replaces=True, max_moves=max_moves, window=window)
