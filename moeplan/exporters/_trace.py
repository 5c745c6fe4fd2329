"""What a trace shows of a timeline: whole nanoseconds, the tasks that fit, arrows, counters.

Axes: T tasks, A arrows, P points of an arrow (-1: none), L lanes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.program import Floats, Ints, Pass, Program, Stream
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError
from moeplan.exporters._lanes import task_name
from moeplan.exporters._traffic import meeting_bytes

Mask = NDArray[np.bool_]
_OVERLAP_NS = 1000
"""Clocks of devices resolve half a microsecond: tasks of one stream may seem to overlap by that much."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Counter:
    """A number that changes over time; `value_P[i]` holds from `time_ns_P[i]` on."""

    name: str
    unit: str
    time_ns_P: Ints
    value_P: Floats


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """The tasks that a trace keeps, and the sentence that says which; empty where it keeps all."""

    keeps_T: Mask
    rule: str


def rounded_ns(timeline: Timeline) -> tuple[Ints, Ints]:
    """Start and end of every task in whole nanoseconds; within a stream none starts before the one before has ended.

    Raises MoeplanError if tasks of one stream overlap by more than a microsecond: then it is no timeline.
    """
    tasks = timeline.program.tasks
    assert np.isfinite([timeline.start_s_T, timeline.end_s_T]).all()
    start, end = np.rint(timeline.start_s_T * 1e9).astype(np.int64), np.rint(timeline.end_s_T * 1e9).astype(np.int64)
    order, is_first = _by_stream(timeline.program, start, end)
    latest = _running_max(end[order], is_first)
    before = np.where(is_first, start[order], np.r_[start[:1], latest[:-1]][: len(order)])
    late = before - start[order]
    if (late > _OVERLAP_NS).any():
        task = int(order[np.argmax(late)])
        where = f"lane {tasks.lane_T[task]}, {Stream(int(tasks.stream_T[task])).name.lower()} stream"
        raise MoeplanError(
            f"timeline: {where}: {task_name(timeline.program, task)!r} (task {task}) starts {late.max() / 1e3:.4g} us "
            "before the task before it has ended; a stream runs one task at a time, so record the timeline again"
        )
    start[order] = np.maximum(start[order], before)
    return start, np.maximum(start, end)


def _by_stream(program: Program, start_T: Ints, end_T: Ints) -> tuple[Ints, Mask]:
    """Tasks by lane, stream and time, and which of them are the first of their stream."""
    tasks = program.tasks
    stream_T = tasks.lane_T * len(Stream) + tasks.stream_T
    order = np.lexsort((end_T, start_T, stream_T))
    return order, np.r_[True, np.diff(stream_T[order]) != 0][: len(order)]


def _running_max(values: Ints, is_first: Mask) -> Ints:
    """The largest value so far, from each first on anew."""
    span = int(values.max(initial=0)) - int(values.min(initial=0)) + 1
    lift = np.cumsum(is_first) * span
    largest: Ints = np.maximum.accumulate(values + lift) - lift
    return largest


def starts_alone(program: Program, start_T: Ints, end_T: Ints) -> Mask:
    """Whether no other task of the same stream starts in the same nanosecond."""
    order, is_first = _by_stream(program, start_T, end_T)
    together = ~is_first[1:] & (np.diff(start_T[order]) == 0)
    alone = np.ones(len(order), dtype=bool)
    alone[order[:-1][together]] = alone[order[1:][together]] = False
    return alone


def arrows(program: Program) -> Ints:
    """Tasks that an arrow passes through, shape (A, P): the sends between stages, and what else crosses lanes.

    A send: the task whose result it is, the send itself, the task of the other lane that waits for it.
    """
    tasks, before, after = program.tasks, program.before_D, program.after_D
    crosses = tasks.lane_T[before] != tasks.lane_T[after]
    maker_T = np.full(len(tasks), -1, dtype=np.int64)
    maker_T[after[~crosses]] = before[~crosses]
    source, target = before[crosses], after[crosses]
    maker = np.where(tasks.stream_T[source] == Stream.PIPELINE, maker_T[source], -1)
    return np.column_stack([maker, source, target])


def kept_arrows(arrows_AP: Ints, keeps_T: Mask) -> Ints:
    """Arrows of which at least two points are kept, with the others blotted out."""
    points = np.where((arrows_AP >= 0) & keeps_T[arrows_AP], arrows_AP, -1)
    kept: Ints = points[(points >= 0).sum(axis=1) > 1]
    return kept


def forward_arrows(arrows_AP: Ints, place_T: Ints) -> Ints:
    """Those that go forward in the order of the trace. Where clocks disagree one may not: a trace cannot show it."""
    place, latest = place_T[arrows_AP], np.full(len(arrows_AP), -1, dtype=np.int64)
    forward = np.ones(len(arrows_AP), dtype=bool)
    for point in range(arrows_AP.shape[1]):
        here = arrows_AP[:, point] >= 0
        forward &= ~here | (place[:, point] > latest)
        latest = np.where(here, place[:, point], latest)
    return arrows_AP[forward]


def in_order(start_T: Ints, *, arrows_AP: Ints) -> Ints:
    """All tasks by start; of those that start together, as the two ends of a send, what comes first along an arrow."""
    before, after = [arrows_AP[:0, 0]], [arrows_AP[:0, 0]]
    for i in range(arrows_AP.shape[1]):
        for j in range(i + 1, arrows_AP.shape[1]):
            both = (arrows_AP[:, i] >= 0) & (arrows_AP[:, j] >= 0)
            before.append(arrows_AP[both, i])
            after.append(arrows_AP[both, j])
    sooner, later = np.concatenate(before), np.concatenate(after)
    tied = start_T[sooner] == start_T[later]
    depth_T = _depths(sooner[tied], later[tied], len(start_T))
    return np.lexsort((depth_T, start_T))


def _depths(sooner: Ints, later: Ints, size: int) -> Ints:
    """The longest chain of pairs that ends in each; a ring of pairs is given up after a thousand rounds."""
    depth = np.zeros(size, dtype=np.int64)
    for _ in range(1000):
        deeper = depth.copy()
        np.maximum.at(deeper, later, depth[sooner] + 1)
        if (deeper == depth).all():
            break
        depth = deeper
    return depth


def sample(program: Program, arrows_AP: Ints, *, room: int) -> Sample:
    """As many tasks as there is `room` for with their arrows: all, or those of whole micro-batches, evenly spaced.

    Tasks of the step as a whole are always kept. Where one micro-batch is too much, lanes are left out too, evenly.
    Raises MoeplanError where not even one micro-batch of one lane has room.
    """
    tasks = program.tasks
    batches = np.unique(tasks.microbatch_T[tasks.microbatch_T >= 0])
    lanes = np.arange(len(program.lanes))
    once_T = (tasks.microbatch_T < 0) | (tasks.pass_T == Pass.STEP)

    def keeps(num_batches: int, num_lanes: int) -> Mask:
        in_batch = once_T | np.isin(tasks.microbatch_T, _spaced(batches, num_batches))
        mask: Mask = in_batch & np.isin(tasks.lane_T, _spaced(lanes, num_lanes))
        return mask

    def excess(num_batches: int, num_lanes: int) -> int:
        mask = keeps(num_batches, num_lanes)
        return int(mask.sum() + (kept_arrows(arrows_AP, mask) >= 0).sum()) - room

    if excess(len(batches), len(lanes)) <= 0:
        return Sample(keeps_T=np.ones(len(tasks), dtype=bool), rule="")
    num_batches = _most(lambda count: excess(count, len(lanes)), len(batches))
    num_lanes = len(lanes) if num_batches else _most(lambda count: excess(1, count), len(lanes))
    if not num_lanes:
        raise MoeplanError(
            f"max_events: there is room for {room} tasks and arrow ends, but one micro-batch of one lane has "
            f"{excess(1, 1) + room}; allow more events"
        )
    mask = keeps(max(num_batches, 1), num_lanes)
    return Sample(keeps_T=mask, rule=_rule(mask, max(num_batches, 1), len(batches), num_lanes, len(lanes)))


def _rule(mask: Mask, num_batches: int, all_batches: int, num_lanes: int, all_lanes: int) -> str:
    lanes = f" and {num_lanes} of {all_lanes} lanes" if num_lanes < all_lanes else ""
    return (
        f"sampled: {int(mask.sum())} of {len(mask)} tasks: whole micro-batches, evenly spaced ({num_batches} of "
        f"{all_batches}){lanes}, and the tasks of the step as a whole; gaps are not idle time, counters count all tasks"
    )


def _spaced(values: Ints, count: int) -> Ints:
    """`count` of the values, first and last among them, evenly spaced."""
    return (
        values[np.unique(np.rint(np.linspace(0, len(values) - 1, count)).astype(np.int64))] if len(values) else values
    )


def _most(excess: Callable[[int], int], largest: int) -> int:
    """The largest count without excess; 0 if there is none."""
    found = bisect_right(range(1, largest + 1), 0, key=excess)
    while found and excess(found) > 0:
        found -= 1
    return found


def counters(program: Program, start_T: Ints, end_T: Ints, *, most: int) -> tuple[Counter, ...]:
    """How many GPUs compute and how many bytes are on their way, of all tasks; at most `most` values each.

    The bytes of a meeting are shared out evenly among its lanes, from start to end of the task that each has.
    """
    tasks, meetings = program.tasks, program.meetings
    computes_T = tasks.stream_T == Stream.COMPUTE
    gpus_L = np.array([lane.multiplicity for lane in program.lanes], dtype=float)
    each_M = meeting_bytes(program) / np.array([len(meeting.lanes) for meeting in meetings], dtype=float)
    lane, unit = tasks.lane_T[computes_T], tasks.unit_T[~computes_T]
    busy = _changes(start_T[computes_T], end_T[computes_T], gpus_L[lane])
    flight = _changes(start_T[~computes_T], end_T[~computes_T], each_M[unit])
    return (_counter("busy", "GPUs", *busy, most=most), _counter("in flight", "bytes", *flight, most=most))


def _changes(start: Ints, end: Ints, height: Floats) -> tuple[Ints, Floats]:
    """When the sum of heights of all that runs changes, and to what."""
    time, place = np.unique(np.r_[start, end], return_inverse=True)
    value = np.rint(np.cumsum(np.bincount(place, np.r_[height, -height], minlength=len(time))))
    new = np.r_[True, np.diff(value) != 0][: len(value)]
    return time[new], value[new] + 0.0


def _counter(name: str, unit: str, time: Ints, value: Floats, *, most: int) -> Counter:
    """All changes, or, where they are too many, the values at `most` evenly spaced times."""
    if len(time) > most:
        grid = np.linspace(time[0], time[-1], most).astype(np.int64)
        time, value = grid, value[np.searchsorted(time, grid, side="right") - 1]
    return Counter(name=name, unit=unit, time_ns_P=time, value_P=value)
