"""Tasks start when what they wait for has ended: the task before on their stream, dependencies, and partners.

Written on SimPy's events: a task is a timeout, an exchange a transfer of the network.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import simpy
from simpy.events import EventPriority

from moeplan.domain.program import Floats, Ints, Program, Stream
from moeplan.errors import SimulationError
from moeplan.simulator.network import Network

_LAST = EventPriority(2)
"""Behind SimPy's URGENT (0) and NORMAL (1)."""
_YIELDING = ("gradients", "parameters")
"""Kinds of exchange that are cut into micro-ops and give way under `a2a_first`."""


class Streams:
    """One run of a program. `start_s` and `end_s` are filled in as tasks start and end."""

    def __init__(self, env: simpy.Environment, program: Program, seconds_T: Floats) -> None:
        self.env, self.program = env, program
        self.network = Network(env, program)
        size = len(program.tasks)
        self.start_s, self.end_s = [-1.0] * size, [-1.0] * size
        self.seconds = seconds_T.tolist()
        self.is_compute = (program.tasks.stream_T == Stream.COMPUTE).tolist()
        self.lane, self.unit = program.tasks.lane_T.tolist(), program.tasks.unit_T.tolist()
        self.stream, self.place = program.tasks.stream_T.tolist(), _place_in_lane(program).tolist()
        before, after = _with_stream_order(program)
        self.waits = np.bincount(after, minlength=size).tolist()
        self.next_from, self.next = _successors(before, after, size)
        self.arrived: list[dict[int, deque[int]]] = [{} for _ in program.meetings]
        self.running: list[dict[int, int]] = [{} for _ in program.meetings]
        self.gate = {"fair": _Fair, "fifo": _OneAtATime, "a2a_first": _ExpertFirst}[program.arbitration](self)

    def run(self) -> None:
        """Runs to the end. Raises SimulationError with the first stuck task if tasks wait for one another."""
        for task in [task for task, waits in enumerate(self.waits) if waits == 0]:
            self._start(task)
        self.env.run()
        if -1.0 in self.end_s:
            stuck = self._show(self.end_s.index(-1.0))
            raise SimulationError(f"deadlock: {stuck} never runs; this is a defect of moeplan")

    def _show(self, task: int) -> str:
        tasks = self.program.tasks
        where = f"lane {tasks.lane_T[task]}, layer {tasks.layer_T[task]}, micro-batch {tasks.microbatch_T[task]}"
        return f"task {task} ({self.program.kind(task)}, {where})"

    def _start(self, task: int) -> None:
        self.start_s[task] = self.env.now
        if self.is_compute[task]:
            self.env.timeout(self.seconds[task], task).callbacks.append(self._computed)
        else:
            self._arrive(task)

    def _computed(self, event: Any) -> None:
        self._end(event.value)

    def _end(self, task: int) -> None:
        self.end_s[task] = self.env.now
        waits = self.waits
        for follower in self.next[self.next_from[task] : self.next_from[task + 1]]:
            waits[follower] -= 1
            if waits[follower] == 0:
                self._start(follower)

    # ---- exchanges

    def _arrive(self, task: int) -> None:
        """An exchange begins when all its lanes have come to it."""
        meeting = self.unit[task]
        self.arrived[meeting].setdefault(self.lane[task], deque()).append(task)
        self.gate.arrived(meeting, self.lane[task])
        self._try(meeting)

    def _try(self, meeting: int) -> None:
        arrived = self.arrived[meeting]
        if self.running[meeting] or len(arrived) < len(self.program.meetings[meeting].lanes):
            return
        self.running[meeting] = {lane: tasks.popleft() for lane, tasks in arrived.items()}
        self.arrived[meeting] = {lane: tasks for lane, tasks in arrived.items() if tasks}
        self.gate.begin(meeting)

    def lane_done(self, meeting: int, lane: int) -> None:
        """A lane's part of an exchange has ended."""
        task = self.running[meeting].pop(lane)
        self.gate.left(meeting, lane)
        self._end(task)
        if not self.running[meeting]:
            self._try(meeting)


class _Fair:
    """Exchanges share the links as they come."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.network = streams, streams.network

    def arrived(self, meeting: int, lane: int) -> None:
        """A lane has come to an exchange."""

    def begin(self, meeting: int) -> None:
        """All lanes have come."""
        self.network.start(meeting, self.streams.lane_done)

    def left(self, meeting: int, lane: int) -> None:
        """A lane is done with an exchange."""


class _EndOfInstant(simpy.Event):
    """Happens now, behind all else that happens now: what is decided then does not hang on the order of events."""

    def __init__(self, env: simpy.Environment) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, priority=_LAST)


class _Deciding(_Fair):
    """Decides at the end of an instant what may start, since what came at the same time came in no order."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        self.is_due = False

    def decide_later(self) -> None:
        """Has `decide` called once when all of the present instant has happened."""
        if not self.is_due:
            self.is_due = True
            _EndOfInstant(self.streams.env).callbacks.append(self._decide)

    def _decide(self, event: simpy.Event) -> None:
        self.is_due = False
        self.decide()

    def decide(self) -> None:
        """Starts what may start."""
        raise NotImplementedError


class _OneAtATime(_Deciding):
    """A lane has one exchange on the wire at a time, in the order in which they were ready; at once: by stream."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        self.queue: list[tuple[float, int, int, int]] = []
        self.busy: set[int] = set()

    def begin(self, meeting: int) -> None:
        """Queues."""
        streams = self.streams
        tasks = streams.running[meeting].values()
        stream = min(streams.stream[task] for task in tasks)
        place = min(streams.place[task] for task in tasks)
        self.queue.append((streams.env.now, stream, place, meeting))
        self.decide_later()

    def left(self, meeting: int, lane: int) -> None:
        """Frees the lane."""
        self.busy.discard(lane)
        self.decide_later()

    def decide(self) -> None:
        """Starts each exchange whose lanes are free and wanted by none before it."""
        blocked, waiting = set(self.busy), []
        for entry in sorted(self.queue):
            lanes = set(self.streams.program.meetings[entry[-1]].lanes)
            if lanes.isdisjoint(blocked):
                self.busy |= lanes
                self.network.start(entry[-1], self.streams.lane_done)
            else:
                waiting.append(entry)
            blocked |= lanes
        self.queue = waiting


class _ExpertFirst(_Deciding):
    """Gradients and parameters go in micro-ops; none starts while a dispatch or combine of its lanes is on or due.

    Reference: Li et al., "Lina" (USENIX ATC 2023), section 4.1.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        program = streams.program
        kinds = [program.exchanges[meeting.exchange].kind for meeting in program.meetings]
        self.yields = [kind in _YIELDING for kind in kinds]
        self.expert = [kind in ("dispatch", "combine") for kind in kinds]
        self.expert_on = [0] * len(program.lanes)
        self.held: list[tuple[int, int]] = []
        self.part: dict[int, int] = {}
        self.on: dict[int, int] = {}

    def arrived(self, meeting: int, lane: int) -> None:
        """Counts the dispatches and combines that are on or due at a lane."""
        self.expert_on[lane] += self.expert[meeting]

    def begin(self, meeting: int) -> None:
        """Gradients wait for their turn; all else starts."""
        if self.yields[meeting]:
            self._hold(meeting, 0)
        else:
            super().begin(meeting)

    def left(self, meeting: int, lane: int) -> None:
        """Lets held micro-ops go when the last dispatch or combine of their lanes has left."""
        if self.expert[meeting]:
            self.expert_on[lane] -= 1
            self.decide_later()

    def _hold(self, meeting: int, part: int) -> None:
        self.held.append((meeting, part))
        self.decide_later()

    def decide(self) -> None:
        """Starts the held micro-ops whose lanes have no dispatch or combine on or due."""
        waiting, self.held = self.held, []
        for meeting, part in waiting:
            lanes = self.streams.program.meetings[meeting].lanes
            if any(self.expert_on[lane] for lane in lanes):
                self.held.append((meeting, part))
            else:
                self.part[meeting], self.on[meeting] = part, len(lanes)
                self.network.start(meeting, self._moved, parts=self.network.parts_of(meeting))

    def _moved(self, meeting: int, lane: int) -> None:
        """Ends the exchange for a lane with the last micro-op; the next one starts when this one left all lanes."""
        self.on[meeting] -= 1
        if self.part[meeting] == self.network.parts_of(meeting) - 1:
            self.streams.lane_done(meeting, lane)
        elif self.on[meeting] == 0:
            self._hold(meeting, self.part[meeting] + 1)


def _with_stream_order(program: Program) -> tuple[Ints, Ints]:
    """The dependencies, and each task behind the one before it on its stream."""
    tasks = program.tasks
    order = np.lexsort((np.arange(len(tasks)), tasks.stream_T, tasks.lane_T))
    lane, stream = tasks.lane_T[order], tasks.stream_T[order]
    same = (lane[1:] == lane[:-1]) & (stream[1:] == stream[:-1])
    before = np.concatenate([program.before_D, order[:-1][same]])
    after = np.concatenate([program.after_D, order[1:][same]])
    return before, after


def _place_in_lane(program: Program) -> Ints:
    """How many tasks of its lane stand before each task."""
    order = np.argsort(program.tasks.lane_T, kind="stable")
    counts = np.bincount(program.tasks.lane_T)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def _successors(before: Ints, after: Ints, size: int) -> tuple[list[int], list[int]]:
    order = np.argsort(before, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(before, minlength=size))])
    return starts.tolist(), after[order].tolist()
