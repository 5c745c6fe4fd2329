"""`streams.py` and `network.py` once more, step by step the same, on arrays and compiled: for programs of some size.

A task, lane, meeting, slot or entry is a row number here; what the rows hold is said in `packed.py`. All that is
decided, and every sum and product, comes in the order of the reference, so that ties fall out alike. Tasks and who may
move are in `compiled_streams.py`, fair rates in `compiled_rates.py`, the events' queue in `dag.py`; the rest is here.
"""

from __future__ import annotations

import numpy as np

from moeplan.cost.cost_model import Shares
from moeplan.domain.program import Floats, Program
from moeplan.jit import compiled, compiled_in_place
from moeplan.simulator.compiled_rates import find_rates
from moeplan.simulator.compiled_streams import computed, end, insert, leave, order, settle, start, wait
from moeplan.simulator.dag import drop, followers, put, run_dag
from moeplan.simulator.packed import DONE, INSTANT, Machine, pack, place_in_lane, with_stream_order


def run(program: Program, seconds_T: Floats, shares: Shares) -> tuple[Floats, Floats, Floats]:
    """Start, end and what exchanges beside cost, of each task; -1 where it never comes to that."""
    size = len(program.tasks)
    if not program.meetings:
        before, after = with_stream_order(program)
        start_s_T, end_s_T = run_dag(seconds_T, program.tasks.lane_T, place_in_lane(program), before, after)
        return start_s_T, end_s_T, np.zeros(size)
    after_D = program.after_D.astype(np.int32)
    first_T1, follower_J = followers(program.before_D.astype(np.int32), after_D, size)
    machine = pack(program, seconds_T, shares, first_T1, follower_J)
    last = np.full((len(program.lanes), 1 + int(program.tasks.stream_T.max(initial=0))), -1, np.int32)
    order(machine.tasks, after_D, last, np.zeros(len(program.lanes), np.int32))
    _run(machine)
    tasks = machine.tasks[:size]
    return tasks["start_s"].copy(), tasks["end_s"].copy(), tasks["lost_s"].copy()


@compiled
def _run(m: Machine) -> None:
    _run_all(m)


@compiled_in_place
def _run_all(m: Machine) -> None:
    """From event to event, and at the end of each instant what is then decided.

    All comes back here instead of one calling another: numba compiles what is called once for each place of a call.
    """
    world, heap = m.world[0], m.heap
    for task in range(len(m.tasks) - 1):
        if m.tasks[task].waits == 0:
            start(m, task)
    while heap.counts[0] > 0 or world.is_due:
        if world.is_due and (heap.counts[0] == 0 or heap.rows[heap.rows[0].source].time_s > world.now_s):
            num_changed = settle(m)
            if world.exchange_share < 1:
                _set_paces(m, num_changed)
            continue
        source = heap.rows[0].source
        world.now_s = heap.rows[source].time_s
        drop(heap, source)
        if source < len(m.lanes):
            computed(m, source)
        elif _flow(m, source - len(m.lanes)):
            _share_again(m, source - len(m.lanes))
        for place in range(world.num_ended):
            end(m, m.slots.ended[place])
        world.num_ended = 0


# ---- flows beside kernels


@compiled_in_place
def _set_paces(m: Machine, num_changed: int) -> None:
    """The flows of lanes that began or ceased to compute go on at another pace."""
    size = m.world[0].num_flowing
    for place in range(size):
        meeting = m.meetings.flowing[place]
        for other in range(num_changed):
            if m.near_MX[meeting, len(m.meetings) - 1 + m.lanes.changed[other]]:
                _set_pace(m, meeting)
                break


@compiled_in_place
def _set_pace(m: Machine, number: int) -> None:
    is_other = False
    for place in range(_first(m, number), _last(m, number)):
        entry = m.entries[place]
        is_other |= entry.left_bytes > 0 and _pace(m, place) != entry.pace
    if is_other:
        _advance(m, number)
        for place in range(_first(m, number), _last(m, number)):
            m.entries[place].pace = _pace(m, place)
        if m.meetings[number].has_ended:
            put(m.heap, len(m.lanes) + number, m.world[0].now_s)
        else:
            _schedule(m, number)


@compiled_in_place
def _pace(m: Machine, number: int) -> float:
    """The fair rate of a flow, or what of it is left beside kernels."""
    entry = m.entries[number]
    for place in range(entry.lane, entry.last_lane):
        if m.lanes[m.listed_J[place]].is_computing:
            return float(entry.fair * m.world[0].exchange_share)
    return float(entry.fair)


# ---- phases


@compiled_in_place
def _first(m: Machine, number: int) -> int:
    """Where the entries of a meeting's present phase begin."""
    return int(m.phases[m.meetings[number].phase + m.meetings[number].phase_now].entry)


@compiled_in_place
def _last(m: Machine, number: int) -> int:
    return int(m.phases[m.meetings[number].phase + m.meetings[number].phase_now + 1].entry)


@compiled_in_place
def _flow(m: Machine, number: int) -> bool:
    """The event of a meeting: a phase's delay has passed, or a flow class has ended. Whether rates change."""
    if m.meetings[number].is_flowing:
        _advance(m, number)
        return True
    if m.meetings[number].phase == m.meetings[number + 1].phase:
        _finish(m, number)
        return False
    _begin_phase(m, number)
    if m.meetings[number].num_left == 0:
        _next_phase(m, number)
        return False
    return True


@compiled_in_place
def _begin_phase(m: Machine, number: int) -> None:
    meeting, world = m.meetings[number], m.world[0]
    for place in range(meeting.slot, m.meetings[number + 1].slot):
        m.slots[place].num_open = 0
    size = meeting.size_bytes / meeting.parts
    for place in range(_first(m, number), _last(m, number)):
        entry = m.entries[place]
        entry.left_bytes = entry.share * size + entry.extra_bytes
        for touched in range(entry.touched, m.entries[place + 1].touched):
            m.slots[m.listed_J[touched]].num_open += 1
    meeting.num_left, meeting.since_s = _last(m, number) - _first(m, number), world.now_s
    if meeting.num_left > 0:
        meeting.is_flowing = True
        insert(m.meetings.flowing, world.num_flowing, number)
        world.num_flowing += 1


@compiled_in_place
def _next_phase(m: Machine, number: int) -> None:
    meeting, world = m.meetings[number], m.world[0]
    if meeting.is_flowing:
        meeting.is_flowing = False
        place = 0
        while m.meetings.flowing[place] != number:
            place += 1
        world.num_flowing -= 1
        for later in range(place, world.num_flowing):
            m.meetings.flowing[later] = m.meetings.flowing[later + 1]
    meeting.phase_now += 1
    if meeting.phase + meeting.phase_now == m.meetings[number + 1].phase:
        _finish(m, number)
    else:
        wait(m, number)


@compiled_in_place
def _finish(m: Machine, number: int) -> None:
    drop(m.heap, len(m.lanes) + number)
    for place in range(m.meetings[number].slot, m.meetings[number + 1].slot):
        if m.slots[place].is_moving:
            leave(m, number, place)


# ---- flows


@compiled_in_place
def _advance(m: Machine, number: int) -> None:
    """Moves what flowed since the last change."""
    meeting, now = m.meetings[number], m.world[0].now_s
    step, size = now - meeting.since_s, meeting.size_bytes / meeting.parts
    meeting.since_s = now
    instant = INSTANT * np.spacing(now)
    for place in range(_first(m, number), _last(m, number)):
        entry = m.entries[place]
        if entry.left_bytes <= 0:
            continue
        left = entry.left_bytes - entry.pace * step if entry.pace < np.inf else 0.0
        if left <= max(DONE * (entry.share * size + entry.extra_bytes), entry.pace * instant):
            left, meeting.has_ended = 0.0, True
            meeting.num_left -= 1
            for touched in range(entry.touched, m.entries[place + 1].touched):
                slot = m.slots[m.listed_J[touched]]
                slot.num_open -= 1
                slot.is_touched = True
        entry.left_bytes = left


@compiled_in_place
def _tell_lanes(m: Machine, number: int) -> None:
    """A lane is done when none of its flows is left, in this phase or a later one; the last ones at the end."""
    meeting = m.meetings[number]
    meeting.has_ended = False
    is_end = meeting.num_left == 0 and meeting.phase_now == meeting.last_phase
    for place in range(meeting.slot, m.meetings[number + 1].slot):
        slot = m.slots[place]
        is_touched, slot.is_touched = slot.is_touched, False
        is_done = is_touched and slot.num_open == 0 and slot.last_phase == meeting.phase_now
        if is_done and slot.is_moving and not is_end:
            leave(m, number, place)


@compiled_in_place
def _share_again(m: Machine, changed: int) -> None:
    """New rates for all that shares links, directly or through others, with the meeting that changed."""
    world = m.world[0]
    _gather(m, changed)
    world.num_listed = 0
    for place in range(world.num_found):
        number = m.meetings.found[place]
        meeting = m.meetings[number]
        if number != changed:
            _advance(m, number)
        meeting.is_other = number == changed or meeting.has_ended
        if meeting.has_ended:
            _tell_lanes(m, number)
        for each in range(_first(m, number), _last(m, number)):
            if m.entries[each].left_bytes > 0:
                m.entries.listed[world.num_listed] = each
                world.num_listed += 1
    find_rates(m)
    listed = 0
    for place in range(world.num_found):
        listed = _take_rates(m, m.meetings.found[place], listed)
    for place in range(world.num_found):
        if m.meetings[m.meetings.found[place]].num_left == 0:
            _next_phase(m, m.meetings.found[place])


@compiled_in_place
def _take_rates(m: Machine, number: int, listed: int) -> int:
    """Gives the entries of a meeting their new rates; how many of the list have theirs now."""
    is_other = m.meetings[number].is_other
    for place in range(_first(m, number), _last(m, number)):
        entry = m.entries[place]
        if entry.left_bytes > 0:
            entry.fair = m.entries.rate[listed]
            listed += 1
            pace = _pace(m, place)
            is_other |= pace != entry.pace
            entry.pace = pace
    if is_other:
        _schedule(m, number)
    return listed


@compiled_in_place
def _gather(m: Machine, changed: int) -> None:
    """Those that flow and share links, directly or through others, with one; in rising order."""
    world = m.world[0]
    m.meetings.found[0], size, place = changed, 1, 0
    m.meetings[changed].is_found = True
    while place < size:
        for flowing in range(world.num_flowing):
            other = m.meetings.flowing[flowing]
            if m.near_MX[m.meetings.found[place], other] and not m.meetings[other].is_found:
                m.meetings[other].is_found = True
                m.meetings.found[size] = other
                size += 1
        place += 1
    world.num_found = 0
    for flowing in range(world.num_flowing):
        other = m.meetings.flowing[flowing]
        if m.meetings[other].is_found:
            m.meetings[other].is_found = False
            m.meetings.found[world.num_found] = other
            world.num_found += 1


@compiled_in_place
def _schedule(m: Machine, number: int) -> None:
    """The next change is when the first of a meeting's classes ends."""
    soonest = np.inf
    for place in range(_first(m, number), _last(m, number)):
        entry = m.entries[place]
        if entry.left_bytes > 0:
            soonest = min(soonest, entry.left_bytes / entry.pace)
    if soonest < np.inf:
        put(m.heap, len(m.lanes) + number, m.world[0].now_s + max(soonest, 0.0))
    else:
        drop(m.heap, len(m.lanes) + number)
