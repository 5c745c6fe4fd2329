"""A picture of what changes of a scenario do to its step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moeplan.exporters._figure import drawn
from moeplan.exporters._files import label

_KEPT, _ANEW = "#3b6ea5", "#d9822b"


class Change(NamedTuple):
    """A change, and by which share the step gets longer with the plan kept, and planned anew, where that is known."""

    name: str
    kept: float | None
    anew: float | None


def draw_changes(changes: Sequence[Change], path: str | Path, *, title: str) -> None:
    """A bar for each change, the first on top; a second one where it was planned anew.

    Raises MoeplanError for another suffix, and a path that cannot be written.
    """
    is_double = any(each.anew is not None for each in changes)
    with drawn(path, width_in=7.4, height_in=1.4 + (0.5 if is_double else 0.32) * len(changes)) as figure:
        axes = figure.add_subplot()
        height = 0.36 if is_double else 0.6
        _bars(axes, [each.kept for each in changes], -height / 2 if is_double else 0.0, height, "plan kept", _KEPT)
        if is_double:
            _bars(axes, [each.anew for each in changes], height / 2, height, "planned anew", _ANEW)
            axes.legend(loc="best", fontsize=8)
        axes.set_yticks(range(len(changes)), [label(each.name) for each in changes])
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel("change of the step, %")
        axes.set_title(label(title, longest=100), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, shares: Sequence[float | None], shift: float, height: float, name: str, colour: str) -> None:
    known = [(place + shift, 100 * share) for place, share in enumerate(shares) if share is not None]
    bars = axes.barh([place for place, _ in known], [each for _, each in known], height, label=name, color=colour)
    axes.bar_label(bars, [f"{each:+.2f}" if abs(each) >= 0.005 else "0.00" for _, each in known], padding=3, fontsize=8)
