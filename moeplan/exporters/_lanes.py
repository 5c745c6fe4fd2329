"""Names and busy times of lanes, as every exporter shows them. Axes: L lanes, K kinds, T tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.program import Floats, Ints, Lane, Pass, Program, Stream
from moeplan.domain.timeline import Timeline
from moeplan.exporters._files import label

PASS_LETTERS = {
    Pass.FORWARD: "F",
    Pass.BACKWARD: "B",
    Pass.INPUT_GRADIENT: "I",
    Pass.WEIGHT_GRADIENT: "W",
    Pass.STEP: "step",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of task: of work, or of exchange."""

    name: str
    is_exchange: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Busy:
    """Where each lane's step went. compute + exposed + idle is the step."""

    kinds: tuple[Kind, ...]
    num_tasks_K: Ints
    kind_s_LK: Floats
    compute_s_L: Floats
    exposed_s_L: Floats
    """An exchange runs, and no kernel beside it."""
    idle_s_L: Floats
    """Nothing runs."""


def lane_name(lane: Lane, *, digits: int = 1) -> str:
    """`stage 3, 8 GPUs: ranks 24-31`, the stage with at least `digits` digits, so that text sorts as numbers do."""
    many = "s" if lane.multiplicity != 1 else ""
    return f"stage {lane.stage:0{digits}d}, {lane.multiplicity} GPU{many}: rank{many} {ranks_text(lane.ranks_R)}"


def ranks_text(ranks_R: Ints) -> str:
    """`0-7, 16-23`, the first three runs of them."""
    ranks = np.sort(ranks_R)
    if not len(ranks):
        return "none"
    breaks = np.flatnonzero(np.diff(ranks) != 1)
    firsts, lasts = ranks[np.r_[0, breaks + 1]], ranks[np.r_[breaks, len(ranks) - 1]]
    runs = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)]
    return ", ".join(runs) if len(runs) <= 3 else f"{', '.join(runs[:2])}, ... {runs[-1]}"


def kinds_of_tasks(program: Program) -> tuple[tuple[Kind, ...], Ints]:
    """The kinds that occur, works' before exchanges', and the number of each task's."""
    tasks = program.tasks
    work = [Kind(name=work.kind, is_exchange=False) for work in program.works]
    talk = [Kind(name=program.exchanges[m.exchange].kind, is_exchange=True) for m in program.meetings]
    place_T = tasks.unit_T + np.where(tasks.stream_T == Stream.COMPUTE, 0, len(work))
    units = [(work + talk)[unit] for unit in np.unique(place_T).tolist()]
    kinds = sorted(set(units), key=lambda kind: (kind.is_exchange, kind.name))
    number_U = np.zeros(len(work) + len(talk), dtype=np.int64)
    number_U[np.unique(place_T)] = [kinds.index(kind) for kind in units]
    return tuple(kinds), number_U[place_T]


def busy(timeline: Timeline) -> Busy:
    """Each lane's seconds by kind, and those in which it computed, only exchanged, or did nothing."""
    tasks = timeline.program.tasks
    kinds, kind_T = kinds_of_tasks(timeline.program)
    kind_s = np.zeros((len(timeline.program.lanes), len(kinds)))
    np.add.at(kind_s, (tasks.lane_T, kind_T), timeline.end_s_T - timeline.start_s_T)
    computes_T = tasks.stream_T == Stream.COMPUTE
    compute_s, any_s = _covered_s(timeline, computes_T), _covered_s(timeline, np.ones(len(tasks), dtype=bool))
    return Busy(
        kinds=kinds,
        num_tasks_K=np.bincount(kind_T, minlength=len(kinds)),
        kind_s_LK=kind_s,
        compute_s_L=compute_s,
        exposed_s_L=any_s - compute_s,
        idle_s_L=np.maximum(timeline.step_s - any_s, 0.0),
    )


def _covered_s(timeline: Timeline, chosen_T: NDArray[np.bool_]) -> Floats:
    """Seconds of each lane in which at least one of the chosen tasks ran."""
    num_lanes, lane_T = len(timeline.program.lanes), timeline.program.tasks.lane_T
    found = np.zeros(num_lanes)
    order = np.flatnonzero(chosen_T)
    order = order[np.lexsort((timeline.start_s_T[order], lane_T[order]))]
    bounds = np.searchsorted(lane_T[order], np.arange(num_lanes + 1))
    for lane in range(num_lanes):
        mine = order[bounds[lane] : bounds[lane + 1]]
        ends = np.maximum.accumulate(timeline.end_s_T[mine])
        starts = np.maximum(timeline.start_s_T[mine], np.r_[-np.inf, ends[:-1]][: len(mine)])
        found[lane] = np.maximum(timeline.end_s_T[mine] - starts, 0.0).sum()
    return found


def task_name(program: Program, task: int) -> str:
    """`attention L12 F m3`: kind, layer, pass and micro-batch, as far as there are any."""
    tasks = program.tasks
    layer, micro_batch = int(tasks.layer_T[task]), int(tasks.microbatch_T[task])
    parts = [label(program.kind(task)), f"L{layer}" if layer >= 0 else ""]
    parts += [PASS_LETTERS[Pass(int(tasks.pass_T[task]))], f"m{micro_batch}" if micro_batch >= 0 else ""]
    return " ".join(part for part in parts if part)
