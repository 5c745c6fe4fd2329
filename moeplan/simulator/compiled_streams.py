"""`streams.py` once more, step by step the same, on arrays and compiled: tasks, and who may move.

A task, lane, meeting, slot or entry is a row number here; what the rows hold is said in `packed.py`.
"""

from __future__ import annotations

from moeplan.jit import compiled, compiled_in_place
from moeplan.simulator.dag import put
from moeplan.simulator.packed import ARBITRATIONS, Ints32, Machine, Rows

_FIFO, _A2A_FIRST = ARBITRATIONS.index("fifo"), ARBITRATIONS.index("a2a_first")
_COMPUTE = -1


@compiled
def order(tasks: Rows, after_D: Ints32, last_LS: Ints32, count_L: Ints32) -> None:
    """How many each task waits for, with the one before it on its stream; and its place in its lane."""
    for after in after_D:
        tasks[after].waits += 1
    for number in range(len(tasks) - 1):
        task = tasks[number]
        task.place = count_L[task.lane]
        count_L[task.lane] += 1
        before = last_LS[task.lane, task.stream]
        if before >= 0:
            tasks[before].next = number
            task.waits += 1
        last_LS[task.lane, task.stream] = number


@compiled_in_place
def start(m: Machine, number: int) -> None:
    task = m.tasks[number]
    task.start_s = m.world[0].now_s
    if task.unit == _COMPUTE:
        lane = m.lanes[task.lane]
        lane.task, lane.left_s, lane.since_s = number, task.seconds, m.world[0].now_s
        put(m.heap, task.lane, m.world[0].now_s + lane.left_s / lane.speed)
        if m.world[0].exchange_share < 1:
            _touch(m, task.lane)
    else:
        _arrive(m, number)


@compiled_in_place
def end(m: Machine, number: int) -> None:
    """A task has ended: those that waited for it may start."""
    task = m.tasks[number]
    task.end_s = m.world[0].now_s
    for place in range(task.first, m.tasks[number + 1].first):
        _release(m, m.listed_J[place])
    if task.next >= 0:
        _release(m, task.next)
    if task.unit != _COMPUTE and m.meetings[task.unit].num_running == 0:
        _try(m, task.unit)


@compiled_in_place
def _release(m: Machine, number: int) -> None:
    m.tasks[number].waits -= 1
    if m.tasks[number].waits == 0:
        start(m, number)


# ---- compute beside exchanges


@compiled_in_place
def computed(m: Machine, number: int) -> None:
    """A lane has computed its task."""
    lane = m.lanes[number]
    _work(m, number)
    _will_end(m, lane.task)
    lane.task = -1
    if m.world[0].exchange_share < 1:
        _touch(m, number)


@compiled_in_place
def _will_end(m: Machine, number: int) -> None:
    m.slots.ended[m.world[0].num_ended] = number
    m.world[0].num_ended += 1


@compiled_in_place
def _work(m: Machine, number: int) -> None:
    """Does what a lane computed since its speed changed."""
    lane, now = m.lanes[number], m.world[0].now_s
    step = now - lane.since_s
    lane.since_s = now
    lane.left_s = max(0.0, lane.left_s - lane.speed * step)
    m.tasks[lane.task].lost_s += (1.0 - lane.speed) * step


@compiled_in_place
def _touch(m: Machine, number: int) -> None:
    """Has a lane looked at when the instant ends."""
    world = m.world[0]
    world.is_due = True
    if not m.lanes[number].is_dirty:
        m.lanes[number].is_dirty = True
        insert(m.lanes.dirty, world.num_dirty, number)
        world.num_dirty += 1


@compiled_in_place
def insert(rising: Ints32, size: int, number: int) -> None:
    place = size
    while place > 0 and rising[place - 1] > number:
        rising[place] = rising[place - 1]
        place -= 1
    rising[place] = number


@compiled_in_place
def settle(m: Machine) -> int:
    """What is decided when all of an instant has happened: who may move, then who computes on at which speed.

    How many lanes, listed in `changed_L`, began or ceased to compute.
    """
    world = m.world[0]
    world.is_due = False
    if world.arbitration == _FIFO:
        _let_free_lanes_move(m)
    elif world.arbitration == _A2A_FIRST:
        _let_held_parts_move(m)
    size, num_changed = world.num_dirty, 0
    world.num_dirty = 0
    for place in range(size):
        number = m.lanes.dirty[place]
        lane = m.lanes[number]
        lane.is_dirty = False
        speed = world.compute_share if lane.num_moving > 0 else 1.0
        if speed != lane.speed:
            if lane.task >= 0:
                _work(m, number)
                put(m.heap, number, world.now_s + lane.left_s / speed)
            lane.speed = speed
        if lane.is_computing != (lane.task >= 0):
            lane.is_computing = not lane.is_computing
            m.lanes.changed[num_changed] = number
            num_changed += 1
    return num_changed


# ---- meetings and who may move


@compiled_in_place
def _arrive(m: Machine, number: int) -> None:
    task = m.tasks[number]
    meeting = m.meetings[task.unit]
    m.slots[task.slot].arrived = number
    meeting.num_arrived += 1
    m.lanes[task.lane].num_expert += meeting.is_expert
    _try(m, task.unit)


@compiled_in_place
def _try(m: Machine, number: int) -> None:
    """An exchange begins when all its lanes have come to it."""
    meeting = m.meetings[number]
    first, last = meeting.slot, m.meetings[number + 1].slot
    if meeting.num_running > 0 or meeting.num_arrived < last - first:
        return
    for place in range(first, last):
        m.slots[place].running, m.slots[place].arrived = m.slots[place].arrived, -1
    meeting.num_running, meeting.num_arrived = last - first, 0
    if m.world[0].arbitration == _FIFO:
        _queue(m, number)
    elif m.world[0].arbitration == _A2A_FIRST and meeting.yields:
        _hold(m, number, 0)
    else:
        _move(m, number, 1)


@compiled_in_place
def _queue(m: Machine, number: int) -> None:
    """Puts an exchange behind those that were ready before; at once: by stream, then by place in the lane."""
    meeting, world = m.meetings[number], m.world[0]
    meeting.ready_s, meeting.stream, meeting.place = world.now_s, 127, 2**31 - 1
    for slot in range(meeting.slot, m.meetings[number + 1].slot):
        task = m.tasks[m.slots[slot].running]
        meeting.stream, meeting.place = min(meeting.stream, task.stream), min(meeting.place, task.place)
    place = world.num_queued
    while place > 0 and _is_ready_before(m, number, m.meetings.queued[place - 1]):
        m.meetings.queued[place] = m.meetings.queued[place - 1]
        place -= 1
    m.meetings.queued[place] = number
    world.num_queued += 1
    world.is_due = True


@compiled_in_place
def _is_ready_before(m: Machine, one: int, other: int) -> bool:
    mine, its = m.meetings[one], m.meetings[other]
    if mine.ready_s != its.ready_s:
        return bool(mine.ready_s < its.ready_s)
    if mine.stream != its.stream:
        return bool(mine.stream < its.stream)
    return bool(mine.place < its.place) if mine.place != its.place else one < other


@compiled_in_place
def _let_free_lanes_move(m: Machine) -> None:
    """Starts each exchange whose lanes are free and wanted by none before it."""
    world = m.world[0]
    size, world.num_queued = world.num_queued, 0
    world.decision += 1
    for place in range(size):
        number, is_free = m.meetings.queued[place], True
        first, last = m.meetings[number].slot, m.meetings[number + 1].slot
        for slot in range(first, last):
            lane = m.lanes[m.slots[slot].lane]
            is_free &= not lane.is_busy and lane.blocked != world.decision
        for slot in range(first, last):
            lane = m.lanes[m.slots[slot].lane]
            lane.blocked = world.decision
            lane.is_busy |= is_free
        if is_free:
            _move(m, number, 1)
        else:
            m.meetings.queued[world.num_queued] = number
            world.num_queued += 1


@compiled_in_place
def _hold(m: Machine, number: int, part: int) -> None:
    """Has a micro-op wait for its turn."""
    world = m.world[0]
    m.meetings[number].part = part
    m.meetings.queued[world.num_queued] = number
    world.num_queued += 1
    world.is_due = True


@compiled_in_place
def _let_held_parts_move(m: Machine) -> None:
    """Starts the held micro-ops whose lanes have no dispatch or combine on or due."""
    world = m.world[0]
    size, world.num_queued = world.num_queued, 0
    for place in range(size):
        number, is_free = m.meetings.queued[place], True
        for slot in range(m.meetings[number].slot, m.meetings[number + 1].slot):
            is_free &= m.lanes[m.slots[slot].lane].num_expert == 0
        if is_free:
            _move(m, number, m.meetings[number].num_parts)
        else:
            m.meetings.queued[world.num_queued] = number
            world.num_queued += 1


@compiled_in_place
def leave(m: Machine, number: int, place: int) -> None:
    """A lane has moved all it had in an exchange, or in one of its micro-ops."""
    meeting, slot = m.meetings[number], m.slots[place]
    lane = m.lanes[slot.lane]
    slot.is_moving = False
    meeting.num_moving -= 1
    lane.num_moving -= 1
    if m.world[0].compute_share < 1:
        _touch(m, slot.lane)
    if m.world[0].arbitration == _A2A_FIRST and meeting.yields and meeting.part < meeting.num_parts - 1:
        if meeting.num_moving == 0:
            _hold(m, number, meeting.part + 1)
        return
    _will_end(m, slot.running)
    slot.running = -1
    meeting.num_running -= 1
    if m.world[0].arbitration == _FIFO:
        lane.is_busy, m.world[0].is_due = False, True
    elif m.world[0].arbitration == _A2A_FIRST and meeting.is_expert:
        lane.num_expert -= 1
        m.world[0].is_due = True


@compiled_in_place
def _move(m: Machine, number: int, parts: int) -> None:
    """Lets an exchange begin, or one of its micro-ops."""
    meeting = m.meetings[number]
    meeting.parts, meeting.phase_now = parts, 0
    meeting.num_moving = m.meetings[number + 1].slot - meeting.slot
    for place in range(meeting.slot, m.meetings[number + 1].slot):
        m.slots[place].is_moving = True
        m.lanes[m.slots[place].lane].num_moving += 1
        if m.world[0].compute_share < 1:
            _touch(m, m.slots[place].lane)
    wait(m, number)


@compiled_in_place
def wait(m: Machine, number: int) -> None:
    """What passes before the bytes of a phase flow."""
    meeting, delay = m.meetings[number], 0.0
    if meeting.phase < m.meetings[number + 1].phase:
        phase = m.phases[meeting.phase + meeting.phase_now]
        delay = phase.latency_s + phase.copy_s_per_byte * (meeting.size_bytes / meeting.parts)
    put(m.heap, len(m.lanes) + number, m.world[0].now_s + delay)
