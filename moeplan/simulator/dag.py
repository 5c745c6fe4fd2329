"""Operations on serial resources, compiled: when each runs. With the queue of events that `compiled.py` uses too.

Axes: T operations, D dependencies, R resources; first_T1 says where the followers of each operation begin, and where
the last ones end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeplan.domain.program import Floats, Ints
from moeplan.errors import SimulationError
from moeplan.jit import compiled, inlined
from moeplan.simulator.packed import Heap, Ints32, Rows, heap_of


def run_dag(
    duration_s_T: Floats, resource_T: Ints, priority_T: Ints, before_D: Ints, after_D: Ints
) -> tuple[Floats, Floats]:
    """Start and end of each operation; -1 for those that wait for one another.

    An operation is ready when all before it have ended. A resource runs one at a time, to its end. When all that ends
    at one time has ended, each free resource takes the operation of the lowest (priority, index) that is ready.
    Raises SimulationError for arrays that do not fit together.
    """
    _check(duration_s_T, resource_T, priority_T, before_D, after_D)
    size, num_resources = len(duration_s_T), int(resource_T.max(initial=-1)) + 1
    first_T1, follower_D = followers(before_D.astype(np.int32), after_D.astype(np.int32), size)
    operations = np.empty(size + 1, _OPERATION)
    _fill(operations, duration_s_T, resource_T.astype(np.int32), priority_T.astype(np.int64), first_T1, follower_D)
    resources = np.zeros(num_resources + 1, _RESOURCE)
    resources["running"] = -1
    resources["room"][1:] = np.cumsum(np.bincount(resource_T, minlength=num_resources))
    ready_T, woken_R = np.empty(size, _READY), np.empty(num_resources, np.int32)
    _run(operations, follower_D, resources, ready_T, woken_R, heap_of(num_resources))
    start_s_T = operations["start_s"][:size].copy()
    return start_s_T, np.where(start_s_T < 0, -1.0, start_s_T + duration_s_T)


def _check(duration_s_T: Floats, resource_T: Ints, priority_T: Ints, before_D: Ints, after_D: Ints) -> None:
    size = len(duration_s_T)
    if not len(resource_T) == len(priority_T) == size or len(before_D) != len(after_D):
        sizes = ", ".join(str(len(each)) for each in (duration_s_T, resource_T, priority_T, before_D, after_D))
        raise SimulationError(f"run_dag: arrays of {sizes} values; give three of one length and two of one length")
    if not (np.isfinite(duration_s_T).all() and (duration_s_T >= 0).all()):
        raise SimulationError("run_dag: duration_s_T: holds a value below 0 or none at all; use seconds from 0 on")
    for name, values, below in (
        ("resource_T", resource_T, 2**31),
        ("before_D", before_D, size),
        ("after_D", after_D, size),
    ):
        if len(values) and not 0 <= values.min() <= values.max() < below:
            raise SimulationError(f"run_dag: {name}: {values.min()} to {values.max()}; use 0 to {below - 1}")


# ---- events


@inlined
def put(heap: Heap, source: int, time: float) -> None:
    """Sets the event of a source, which replaces the one it had."""
    place = heap.rows[source].place
    if place < 0:
        place = heap.counts[0]
        heap.counts[0] += 1
    heap.rows[source].time_s = time
    heap.rows[source].turn = heap.counts[1]
    heap.counts[1] += 1
    _sink(heap, _rise(heap, place, source), source)


@inlined
def drop(heap: Heap, source: int) -> None:
    """Takes the event of a source out, if it has one."""
    place = heap.rows[source].place
    if place < 0:
        return
    heap.rows[source].place = -1
    heap.counts[0] -= 1
    last = heap.rows[heap.counts[0]].source
    if last != source:
        _sink(heap, _rise(heap, place, last), last)


@inlined
def _is_before(heap: Heap, one: int, other: int) -> bool:
    if heap.rows[one].time_s == heap.rows[other].time_s:
        return bool(heap.rows[one].turn < heap.rows[other].turn)
    return bool(heap.rows[one].time_s < heap.rows[other].time_s)


@inlined
def _rise(heap: Heap, place: int, source: int) -> int:
    """Moves the gap at `place` up to where `source` belongs at the earliest."""
    while place > 0:
        above = (place - 1) >> 1
        other = heap.rows[above].source
        if not _is_before(heap, source, other):
            break
        heap.rows[place].source = other
        heap.rows[other].place = place
        place = above
    return place


@inlined
def _sink(heap: Heap, place: int, source: int) -> None:
    """Moves the gap at `place` down to where `source` belongs, and fills it."""
    size = heap.counts[0]
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and _is_before(heap, heap.rows[below + 1].source, heap.rows[below].source):
            below += 1
        other = heap.rows[below].source
        if not _is_before(heap, other, source):
            break
        heap.rows[place].source = other
        heap.rows[other].place = place
        place = below
    heap.rows[place].source = source
    heap.rows[source].place = place


# ---- operations

_OPERATION = np.dtype(
    [
        ("duration_s", "f8"), ("start_s", "f8"), ("priority", "i8"), ("first", "i8"), ("resource", "i4"),
        ("waits", "i4"),
    ],
)  # fmt: skip
_READY = np.dtype([("priority", "i8"), ("task", "i8")])
_RESOURCE = np.dtype([("room", "i8"), ("running", "i4"), ("num_ready", "i4"), ("is_woken", "?")])
"""Who is ready stands from `room` on, the next one first, as a heap."""


@compiled
def _follow(before_D: Ints32, after_D: Ints32, first: Ints, found: Ints32) -> None:
    """Where the followers of each operation begin, and all followers; in the order in which they were given."""
    for before in before_D:
        first[before + 2] += 1
    for task in range(2, len(first)):
        first[task] += first[task - 1]
    for number in range(len(after_D)):
        before = before_D[number]
        found[first[before + 1]] = after_D[number]
        first[before + 1] += 1


def followers(before_D: Ints32, after_D: Ints32, size: int) -> tuple[Ints, Ints32]:
    """Where the followers of each operation begin, and all followers; in the order in which they were given."""
    first, found = np.zeros(size + 2, np.int64), np.empty(len(after_D), np.int32)
    _follow(before_D, after_D, first, found)
    return first[: size + 1], found


@compiled
def _fill(
    operations: Rows, duration_s_T: Floats, resource_T: Ints32, priority_T: Ints, first_T1: Ints, after_D: Ints32
) -> None:
    size = len(duration_s_T)
    for task in range(size):
        operation = operations[task]
        operation.duration_s, operation.resource = duration_s_T[task], resource_T[task]
        operation.priority, operation.first = priority_T[task], first_T1[task]
        operation.start_s, operation.waits = -1.0, 0
    operations[size].first = first_T1[size]
    for after in after_D:
        operations[after].waits += 1


@compiled
def _run(operations: Rows, follower_D: Ints32, resources: Rows, ready_T: Rows, woken: Ints32, heap: Heap) -> None:
    _run_all(operations, follower_D, resources, ready_T, woken, heap)


@inlined
def _run_all(operations: Rows, follower_D: Ints32, resources: Rows, ready_T: Rows, woken: Ints32, heap: Heap) -> None:
    """From instant to instant: ends what ends, then has each resource that may take the next take it."""
    num_woken, now = 0, 0.0
    for task in range(len(operations) - 1):
        if operations[task].waits == 0:
            num_woken = _wait(operations, resources, ready_T, task, woken, num_woken)
    while True:
        for number in range(num_woken):
            _take_next(operations, resources, ready_T, heap, woken[number], now)
        if heap.counts[0] == 0:
            return
        num_woken, now, is_last = 0, heap.rows[heap.rows[0].source].time_s, False
        while not is_last:
            source = heap.rows[0].source
            # The event of the last one stays in the heap: it is replaced at once if something is ready, as is usual.
            is_last = not _is_at(heap, 1, now) and not _is_at(heap, 2, now)
            if not is_last:
                drop(heap, source)
            task, resources[source].running = resources[source].running, -1
            num_woken = _wake(resources, source, woken, num_woken)
            for number in range(operations[task].first, operations[task + 1].first):
                after = follower_D[number]
                operations[after].waits -= 1
                if operations[after].waits == 0:
                    num_woken = _wait(operations, resources, ready_T, after, woken, num_woken)


@inlined
def _is_at(heap: Heap, place: int, time: float) -> bool:
    """Whether the event in a place of the heap is at that time."""
    return bool(place < heap.counts[0] and heap.rows[heap.rows[place].source].time_s == time)


@inlined
def _wait(operations: Rows, resources: Rows, ready_T: Rows, task: int, woken: Ints32, num_woken: int) -> int:
    """Queues an operation that is ready at its resource."""
    resource, priority = resources[operations[task].resource], operations[task].priority
    place, room = resource.num_ready, resource.room
    resource.num_ready += 1
    while place > 0:
        above = (place - 1) >> 1
        if not _goes_first(priority, task, ready_T[room + above]):
            break
        ready_T[room + place] = ready_T[room + above]
        place = above
    ready_T[room + place].priority, ready_T[room + place].task = priority, task
    return num_woken if resource.running >= 0 else _wake(resources, operations[task].resource, woken, num_woken)


@inlined
def _wake(resources: Rows, number: int, woken: Ints32, num_woken: int) -> int:
    """Has a resource look for what is next at the end of the instant."""
    if resources[number].is_woken:
        return num_woken
    resources[number].is_woken = True
    woken[num_woken] = number
    return num_woken + 1


@inlined
def _take_next(operations: Rows, resources: Rows, ready_T: Rows, heap: Heap, number: int, now: float) -> None:
    resource = resources[number]
    resource.is_woken = False
    if resource.num_ready == 0:
        drop(heap, number)
        return
    task = ready_T[resource.room].task
    resource.num_ready -= 1
    _move_up(ready_T, resource.room, resource.num_ready)
    resource.running = task
    operations[task].start_s = now
    put(heap, number, now + operations[task].duration_s)


@inlined
def _move_up(ready_T: Rows, room: int, size: int) -> None:
    """Fills the first place of a heap with what stood last, behind the `size` others."""
    priority, task, place = ready_T[room + size].priority, ready_T[room + size].task, 0
    while 2 * place + 1 < size:
        below = room + 2 * place + 1
        if 2 * place + 2 < size and _goes_first(ready_T[below + 1].priority, ready_T[below + 1].task, ready_T[below]):
            below += 1
        if _goes_first(priority, task, ready_T[below]):
            break
        ready_T[room + place] = ready_T[below]
        place = below - room
    ready_T[room + place].priority, ready_T[room + place].task = priority, task


@inlined
def _goes_first(priority: int, task: int, other: Any) -> bool:
    if priority == other.priority:
        return bool(task < other.task)
    return bool(priority < other.priority)
