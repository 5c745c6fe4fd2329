"""MENU: when are experts placed anew while routing drifts? Each file is one policy; `--policy NAME` chooses it.

A dish has

    decide(seen, **options) -> Decision

and is asked for each layer at the end of each step. It sees the past alone, and places nothing itself: it says whether,
and with which budget. Options are keyword-only and have defaults; another option is refused, by the signature.

Law, held by `tests/contracts/test_adaptations.py` for every dish: what it decides depends on nothing but what it is
given, which stays as it was; steps to come change no decision; its total is never below the oracle's; where every step
is like the first, nothing moves.

A complete dish:

    \"\"\"Places anew at each step whose cost is above all before it.\"\"\"

    from moeplan.adaptations import KEEP, Decision, Seen

    def decide(seen: Seen, *, max_moves: int | None = None) -> Decision:
        \"\"\"Re-placement where the last step is the worst so far, and worse than the placement promised.\"\"\"
        is_worst = seen.cost_T[-1] >= seen.cost_T.max() and seen.cost_T[-1] > seen.promised_cost
        return Decision(replaces=True, max_moves=max_moves) if is_worst else KEEP

Axes: T step, from the first to the one that has just ended; S source, E expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.domain.placement import Floats, LayerPlacement
from moeplan.errors import PlanError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """What is known of one layer when a step has ended. Arrays are read-only."""

    tokens_TSE: Floats
    cost_T: Floats
    """Of each step under the placement then in force: tokens of the fullest GPU over those of the mean one, or where
    there are prices the layer's seconds over the mean GPU's tokens."""
    num_gpus: int
    """Of the expert-parallel group, those that hold nothing included."""
    placement: LayerPlacement
    """In force now."""
    placed_step: int
    """The last step that it was found on; 0 is the first."""
    promised_cost: float
    """What it costs on the very tokens that it was found on."""
    move_s: float | None
    """Seconds to bring one replica in from another node, or another GPU where there is one node; None: no prices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether a layer's experts are placed anew before the next step, on what, and in how many moves."""

    replaces: bool
    max_moves: int | None = None
    """The most replicas that may move; None: any number."""
    window: int = 1
    """The last steps on whose tokens together they are placed: more of them are less noise and older news."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise PlanError(f"window: {self.window} steps say nothing of the load; use 1 or more")
        if self.max_moves is not None and self.max_moves < 0:
            raise PlanError(f"max_moves: {self.max_moves} replicas cannot move; use 0 or more")


KEEP = Decision(replaces=False)
"""The placement stays."""
