"""A picture of predictions beside measurements: on the diagonal they are equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moeplan.exporters._figure import drawn

_COLOURS = ("#3b6ea5", "#d9822b", "#4f9d69", "#a44a3f", "#7d5ba6", "#8c8c8c", "#c2a33a")


class Point(NamedTuple):
    """A measured value and its prediction, in one unit."""

    kind: str
    measured: float
    predicted: float
    interval: tuple[float, float]


def draw_parity(points: Sequence[Point], path: str | Path) -> None:
    """A field for each kind, both axes in logarithms, with each prediction's interval.

    Raises MoeplanError for another suffix, and a path that cannot be written.
    """
    kinds = sorted({point.kind for point in points})
    columns = min(4, max(1, len(kinds)))
    rows = -(-len(kinds) // columns)
    with drawn(path, width_in=3.6 * columns, height_in=3.2 * max(1, rows)) as figure:
        for number, kind in enumerate(kinds):
            axes = figure.add_subplot(rows, columns, number + 1)
            chosen = [point for point in points if point.kind == kind]
            measured = [point.measured for point in chosen]
            predicted = [point.predicted for point in chosen]
            lows, highs = zip(*(point.interval for point in chosen), strict=True)
            axes.vlines(measured, lows, highs, color="#c8c8c8", linewidth=0.6)
            axes.plot(measured, predicted, ".", markersize=4, color=_COLOURS[number % len(_COLOURS)])
            ends = (min(measured + predicted) / 2, 2 * max(measured + predicted))
            axes.plot(ends, ends, color="black", linewidth=0.6)
            axes.set(xscale="log", yscale="log", title=kind, xlabel="measured", ylabel="predicted")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.get_major_locator().set_params(numticks=4)
            axes.tick_params(which="minor", labelleft=False, labelbottom=False)
