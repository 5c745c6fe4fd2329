"""What of a schedule does not depend on the number of micro-batches: how ranks begin and end, how often they pair."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from moeplan import menu
from moeplan.planners._space import Layout
from moeplan.schedules import Order, Slot


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What does not depend on the number of micro-batches: the first and last pass of each rank, and how pairs grow."""

    first: tuple[tuple[str, int], ...]
    last: tuple[tuple[str, int], ...]
    pairs: tuple[tuple[float, float], ...]
    """Slots of two actions: a + b * micro-batches."""
    splits: bool
    """Whether some backward passes are split into I and W."""


def outline_of(layout: Layout, training: bool) -> Outline:
    """Read off two short runs of the schedule."""
    if not training:
        return Outline(
            first=(("F", 0),) * layout.pp, last=(("F", 0),) * layout.pp, pairs=((0.0, 0.0),) * layout.pp, splits=False
        )
    return _outline(layout.schedule, layout.pp, layout.vpp)


@lru_cache(maxsize=1024)
def _outline(schedule: str, pp: int, vpp: int) -> Outline:
    actions = menu.load("schedules", schedule, "actions")
    few, more = 2 * pp, 4 * pp
    short: tuple[Order, ...] = actions(pp, few, num_chunks=vpp)
    pairs = [
        [sum(len(slot) == 2 for slot in order) for order in actions(pp, count, num_chunks=vpp)] for count in (few, more)
    ]
    slope = [(b - a) / (more - few) for a, b in zip(*pairs, strict=True)]
    return Outline(
        first=tuple((order[0][0].kind, order[0][0].chunk) for order in short),
        last=tuple(_latest(order[-1]) for order in short),
        pairs=tuple((a - s * few, s) for a, s in zip(pairs[0], slope, strict=True)),
        splits=any(action.kind == "I" for order in short for slot in order for action in slot),
    )


def _latest(slot: Slot) -> tuple[str, int]:
    """What others may wait for at the end of a slot: its backward pass if it has one."""
    chosen = next((action for action in slot if action.kind in "BI"), slot[0])
    return chosen.kind, chosen.chunk
