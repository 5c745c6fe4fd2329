"""Experts stay where the first step's tokens put them."""

from __future__ import annotations

from moeplan.adaptations import KEEP, Decision, Seen


def decide(seen: Seen) -> Decision:
    """No re-placement, whatever was seen."""
    return KEEP
