"""A picture of the traffic: how many bytes of a step go from each GPU or node to each other, on a logarithmic scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.domain.program import Floats, Program
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError
from moeplan.exporters._figure import SUFFIXES, drawn
from moeplan.exporters._files import suffix_of
from moeplan.exporters._traffic import num_ranks, traffic
from moeplan.units import show

_MOST_ROWS = 2048
_DECADES = 6
"""Cells below this many powers of ten under the largest have the colour of the smallest."""

__all__ = ["SUFFIXES", "export"]


def export(timeline: Timeline, path: str | Path, *, gpus_per_node: int | None = None) -> None:
    """A square of senders (rows) and receivers (columns); white: nothing is sent. `traffic` says what counts.

    Up to 128 GPUs each has its row. Above, or with `gpus_per_node`, a row is a node of that many (8, or more where
    there would be over 2048 rows), and the diagonal what its GPUs send among themselves. Raises MoeplanError for nodes
    so small that there are more rows, another suffix, and a path that cannot be written.
    """
    suffix_of(path, SUFFIXES)
    program = timeline.program
    each = _gpus_per_row(program, gpus_per_node)
    bytes_RR = traffic(program, gpus_per_node=each)
    with drawn(path, width_in=7.4, height_in=6.4) as figure:
        _draw(figure, bytes_RR, unit="GPU" if each == 1 else f"node of {each} GPUs")


def _gpus_per_row(program: Program, asked: int | None) -> int:
    ranks = num_ranks(program)
    if asked is None:
        each = 1 if ranks <= 128 else 8
        while ranks > each * _MOST_ROWS:
            each *= 2
        return each
    if asked < 1 or ranks > asked * _MOST_ROWS:
        least = max(1, -(-ranks // _MOST_ROWS))
        raise MoeplanError(f"gpus_per_node: {asked} does not fit a picture of {ranks} GPUs; use {least} or more")
    return asked


def _draw(figure: Any, bytes_RR: Floats, *, unit: str) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axes = figure.add_subplot()
    largest = float(bytes_RR.max(initial=0.0))
    axes.set_title(f"{show(float(bytes_RR.sum()), 'B')} a step, {show(largest, 'B')} in the darkest cell", fontsize=10)
    axes.set_xlabel(f"to {unit}")
    axes.set_ylabel(f"from {unit}")
    if not largest:
        axes.text(0.5, 0.5, "nothing is sent", transform=axes.transAxes, ha="center", va="center")
        axes.set(xticks=[], yticks=[])
        return
    smallest = max(float(bytes_RR[bytes_RR > 0].min()), largest / 10**_DECADES)
    lowest = smallest if smallest < largest else largest / 10
    norm = LogNorm(vmin=lowest, vmax=largest, clip=True)
    shown = np.ma.masked_equal(bytes_RR, 0.0)
    picture = axes.imshow(shown, cmap="viridis_r", norm=norm, interpolation="nearest", aspect="equal")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(picture, ax=axes, label="bytes a step")
    bar.ax.yaxis.set_major_locator(FixedLocator(_ticks(lowest, largest)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value, "B")))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _ticks(lowest: float, largest: float) -> list[float]:
    """Both ends, and between them 1, 3, 10, ... or, over three decades, 1, 10, 100, ... as far as there is room."""
    decades = range(math.floor(math.log10(lowest)), math.ceil(math.log10(largest)) + 1)
    steps = (1.0, 3.0) if largest / lowest < 1000 else (1.0,)
    apart = (largest / lowest) ** 0.05
    inner = [step * 10.0**decade for decade in decades for step in steps]
    return [lowest, *(tick for tick in inner if lowest * apart < tick < largest / apart), largest]
