"""A picture of the step: a row for each lane, what its GPUs compute, and beneath it, thin, what they exchange."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeplan.domain.program import Floats, Ints, Lane, Pass, Stream
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError
from moeplan.exporters._figure import SUFFIXES, drawn
from moeplan.exporters._files import label, suffix_of
from moeplan.exporters._lanes import kinds_of_tasks, ranks_text
from moeplan.units import show

_MOST_LANES = 32
_MOST_BARS = 20_000
"""More bars than this are drawn as pixels also in SVG and PDF."""
_COMPUTE_SHARE = 0.52
"""Of a lane's height; the communication streams share most of the rest."""
# Okabe and Ito, "Color universal design" (2008), and for what is exchanged Tol, "Colour schemes" (2021)
_COMPUTE_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#8C8C8C", "#CC79A7", "#F0E442", "#5C3A92")
_EXCHANGE_COLOURS = ("#D55E00", "#AA4499", "#117733", "#BBCC33", "#EE8866", "#882255", "#332288", "#000000")
_PASS_TEXT = {
    Pass.FORWARD: "forward",
    Pass.BACKWARD: "backward",
    Pass.INPUT_GRADIENT: "input gradient",
    Pass.WEIGHT_GRADIENT: "weight gradient",
    Pass.STEP: "once a step",
}

__all__ = ["SUFFIXES", "export"]


def export(
    timeline: Timeline,
    path: str | Path,
    *,
    color_by: Literal["pass", "kind"] = "pass",
    window_s: tuple[float, float] | None = None,
) -> None:
    """A Gantt chart of the whole step, or of what runs in `window_s`, from and to.

    What is computed is coloured by pass, with the micro-batch's number where it fits, or by kind of work; what is
    exchanged by kind of exchange. Of more than 32 lanes 32 are drawn, evenly spaced, and the title says so. Raises
    MoeplanError for a window without time, another suffix or `color_by`, and a path that cannot be written.
    """
    suffix_of(path, SUFFIXES)
    if color_by not in ("pass", "kind"):
        raise MoeplanError(f"color_by: {color_by!r} is not there to choose; use 'pass' or 'kind'")
    begin, end = window_s or (0.0, timeline.step_s or 1.0)
    if not 0.0 <= begin < end < float("inf"):
        raise MoeplanError(f"window_s: from {begin:g} s to {end:g} s holds no time; use 0 <= from < to")
    lanes = _lanes(timeline)
    with drawn(path, width_in=15.0, height_in=1.7 + 0.62 * max(len(lanes), 1)) as figure:
        _draw(figure, timeline, lanes=lanes, color_by=color_by, begin=begin, end=end)


def _lanes(timeline: Timeline) -> Ints:
    """The lanes to draw, by stage."""
    stages = [lane.stage for lane in timeline.program.lanes]
    order = np.argsort(np.array(stages, dtype=np.int64), kind="stable")
    if len(order) <= _MOST_LANES:
        return order
    return order[np.rint(np.linspace(0, len(order) - 1, _MOST_LANES)).astype(np.int64)]


def _draw(figure: Any, timeline: Timeline, *, lanes: Ints, color_by: str, begin: float, end: float) -> None:
    scale, unit = _scale(end - begin)
    axes = figure.add_subplot()
    seen = (timeline.end_s_T > begin) & (timeline.start_s_T < end)
    seen &= np.isin(timeline.program.tasks.lane_T, lanes)
    names, colours, colour_T = _colours(timeline, color_by, seen)
    bars = list(_rows(timeline, lanes, seen))
    for chosen, bottom, height in bars:
        _bars(
            axes,
            timeline,
            chosen,
            bottom,
            height,
            colours=colours[colour_T[chosen]],
            scale=scale,
            pixels=seen.sum() > _MOST_BARS,
        )
    if color_by == "pass":
        _numbers(axes, timeline, bars, scale=scale, shortest_s=(end - begin) / 90, begin=begin, end=end)
    caption = "; the number in a bar is that of its micro-batch" if color_by == "pass" else ""
    axes.set(xlim=(begin * scale, end * scale), ylim=(max(len(lanes), 1), -0.05))
    axes.set_xlabel(f"time since the step began, {unit}{caption}")
    axes.set_yticks(np.arange(len(lanes)) + 0.44, [_lane_text(timeline.program.lanes[lane]) for lane in lanes.tolist()])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.3, color="#BBBBBB")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(_title(timeline, len(lanes), begin, end), loc="left", fontsize=11)
    _legend(figure, names, colours)


def _scale(seconds: float) -> tuple[float, str]:
    """Units of time that give numbers from 1 to 1000 or so."""
    for shortest, scale, unit in ((2.0, 1.0, "s"), (2e-3, 1e3, "ms"), (2e-6, 1e6, "us")):
        if seconds >= shortest:
            return scale, unit
    return 1e9, "ns"


def _title(timeline: Timeline, num_lanes: int, begin: float, end: float) -> str:
    program = timeline.program
    text = f"{timeline.source} step: {show(timeline.step_s, 's')} on {program.num_gpus} GPUs"
    if (begin, end) != (0.0, timeline.step_s or 1.0):
        text += f"; from {show(begin, 's')} to {show(end, 's')}"
    if num_lanes < len(program.lanes):
        text += f"; {num_lanes} of {len(program.lanes)} lanes, evenly spaced"
    return text


def _lane_text(lane: Lane) -> str:
    many = "s" * (lane.multiplicity != 1)
    return f"stage {lane.stage} ({lane.multiplicity} GPU{many})\nrank{many} {ranks_text(lane.ranks_R)}"


def _colours(timeline: Timeline, color_by: str, seen: Any) -> tuple[list[str], Any, Ints]:
    """Names and colours that occur among the tasks that are seen, and the number of each task's."""
    tasks = timeline.program.tasks
    kinds, kind_T = kinds_of_tasks(timeline.program)
    works = [kind for kind in kinds if not kind.is_exchange]
    talks = [_legend_text(kind.name) for kind in kinds if kind.is_exchange]
    computes_T = tasks.stream_T == Stream.COMPUTE
    heads = list(_PASS_TEXT.values()) if color_by == "pass" else [_legend_text(kind.name) for kind in works]
    number_T = np.where(computes_T, tasks.pass_T if color_by == "pass" else kind_T, kind_T - len(works) + len(heads))
    colours = [_COMPUTE_COLOURS[i % len(_COMPUTE_COLOURS)] for i in range(len(heads))]
    colours += [_EXCHANGE_COLOURS[i % len(_EXCHANGE_COLOURS)] for i in range(len(talks))]
    used = np.unique(number_T[seen])
    return [(heads + talks)[i] for i in used.tolist()], np.array(colours)[used], np.searchsorted(used, number_T)


def _rows(timeline: Timeline, lanes: Ints, seen: Any) -> Iterator[tuple[Ints, float, float]]:
    """The tasks of each stream of each lane, where its row begins and how high it is."""
    tasks = timeline.program.tasks
    talking = [s for s in Stream if s != Stream.COMPUTE and (seen & (tasks.stream_T == s)).any()]
    thin = (0.88 - _COMPUTE_SHARE) / max(len(talking), 2)
    for row, lane in enumerate(lanes.tolist()):
        here = np.flatnonzero(seen & (tasks.lane_T == lane))
        yield here[tasks.stream_T[here] == Stream.COMPUTE], row, _COMPUTE_SHARE
        for place, stream in enumerate(talking):
            yield here[tasks.stream_T[here] == stream], row + _COMPUTE_SHARE + 0.01 + thin * place, thin * 0.86


def _bars(
    axes: Any,
    timeline: Timeline,
    chosen: Ints,
    bottom: float,
    height: float,
    *,
    colours: Any,
    scale: float,
    pixels: bool,
) -> None:
    from matplotlib.collections import PolyCollection

    left, right = timeline.start_s_T[chosen] * scale, timeline.end_s_T[chosen] * scale
    low, high = np.full(len(chosen), bottom), np.full(len(chosen), bottom + height)
    corners = np.stack([np.stack([left, right, right, left], axis=1), np.stack([low, low, high, high], axis=1)], axis=2)
    axes.add_collection(
        PolyCollection(list(corners), facecolors=colours, linewidths=0, rasterized=pixels), autolim=False
    )


def _numbers(
    axes: Any,
    timeline: Timeline,
    bars: list[tuple[Ints, float, float]],
    *,
    scale: float,
    shortest_s: float,
    begin: float,
    end: float,
) -> None:
    """The micro-batch's number in each run of tasks of one pass of one micro-batch that is wide enough."""
    from matplotlib.patheffects import withStroke

    tasks = timeline.program.tasks
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for chosen, bottom, height in bars:
        if height != _COMPUTE_SHARE or not len(chosen):
            continue
        ordered = chosen[np.argsort(timeline.start_s_T[chosen], kind="stable")]
        what = np.stack([tasks.pass_T[ordered], tasks.microbatch_T[ordered], tasks.chunk_T[ordered]])
        firsts = np.r_[0, 1 + np.flatnonzero((np.diff(what) != 0).any(axis=0))]
        lasts = np.r_[firsts[1:], len(ordered)] - 1
        for first, last in zip(ordered[firsts].tolist(), ordered[lasts].tolist(), strict=True):
            left, right = max(timeline.start_s_T[first], begin), min(timeline.end_s_T[last], end)
            if right - left >= shortest_s and tasks.microbatch_T[first] >= 0:
                text = str(tasks.microbatch_T[first])
                where = ((left + right) / 2 * scale, bottom + height / 2)
                axes.text(*where, text, ha="center", va="center", fontsize=8, path_effects=halo)


def _legend_text(kind: str) -> str:
    return label(kind.replace("_", " "), longest=24)


def _legend(figure: Any, names: list[str], colours: Floats) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    if handles:
        width_in = 0.7 + 0.08 * max(map(len, names))
        columns = max(1, min(len(handles), int(figure.get_figwidth() / width_in)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
