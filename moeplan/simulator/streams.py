"""Tasks start when what they wait for has ended: the task before on their stream, dependencies, and partners.

Written on SimPy's events: a task is a timeout, an exchange a transfer of the network. The readable reference;
`compiled.py` does the same, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from simpy.events import EventPriority

from moeplan.cost.cost_model import Shares
from moeplan.domain.program import Floats, Program, Stream
from moeplan.simulator.network import Network
from moeplan.simulator.packed import EXPERT, YIELDING, followers, place_in_lane, with_stream_order

_LAST = EventPriority(2)
"""Behind SimPy's URGENT (0) and NORMAL (1)."""


@dataclass
class _Kernels:
    """The task that a lane computes: what is left of it, at which speed, since when."""

    task: int
    left_s: float
    speed: float
    since_s: float
    version: int


class Streams:
    """One run of a program. `start_s`, `end_s` and `lost_s` are filled in as tasks start and end."""

    def __init__(self, env: simpy.Environment, program: Program, seconds_T: Floats, shares: Shares) -> None:
        self.env, self.program, self.shares = env, program, shares
        self.network = Network(env, program, exchange_share=shares.exchange, on_moving=self._on_moving)
        size = len(program.tasks)
        self.start_s, self.end_s, self.lost_s = [-1.0] * size, [-1.0] * size, [0.0] * size
        self.seconds = seconds_T.tolist()
        self.is_compute = (program.tasks.stream_T == Stream.COMPUTE).tolist()
        self.lane, self.unit = program.tasks.lane_T.tolist(), program.tasks.unit_T.tolist()
        self.stream, self.place = program.tasks.stream_T.tolist(), place_in_lane(program).tolist()
        before, after = with_stream_order(program)
        self.waits = np.bincount(after, minlength=size).tolist()
        first, after = followers(before, after, size)
        self.first, self.followers = first.tolist(), after.tolist()
        self.arrived: list[dict[int, int]] = [{} for _ in program.meetings]
        self.running: list[dict[int, int]] = [{} for _ in program.meetings]
        self.computing: dict[int, _Kernels] = {}
        self.num_ranks = [lane.multiplicity for lane in program.lanes]
        self.takes_turns = shares.processors < program.num_gpus
        self.changes_speeds = shares.compute < 1 or self.takes_turns
        self.speed = [1.0] * len(program.lanes)
        self.num_runs, self.is_due = 0, False
        self.gate = {"fair": _Fair, "fifo": _OneAtATime, "a2a_first": _ExpertFirst}[program.arbitration](self)

    def run(self) -> None:
        """Runs to the end; tasks that wait for one another never start."""
        for task in [task for task, waits in enumerate(self.waits) if waits == 0]:
            self._start(task)
        self.env.run()

    def _start(self, task: int) -> None:
        self.start_s[task] = self.env.now
        if self.is_compute[task]:
            self._compute(task)
        else:
            self._arrive(task)

    def _end(self, task: int) -> None:
        self.end_s[task] = self.env.now
        waits = self.waits
        for follower in self.followers[self.first[task] : self.first[task + 1]]:
            waits[follower] -= 1
            if waits[follower] == 0:
                self._start(follower)

    # ---- the end of an instant

    def settle_later(self) -> None:
        """Has what is decided once for each instant decided when all of the present one has happened.

        What comes at the same time comes in no order.
        """
        if not self.is_due:
            self.is_due = True
            _EndOfInstant(self.env).callbacks.append(self._settle)

    def _settle(self, event: simpy.Event) -> None:
        self.is_due = False
        self.gate.decide()
        if self.changes_speeds:
            self._set_speeds()
        if self.shares.exchange < 1:
            is_computing = self.network.is_computing
            changed = [lane for lane, known in enumerate(is_computing) if known != (lane in self.computing)]
            self.network.compute_changed(changed)

    def _set_speeds(self) -> None:
        """Beside an exchange kernels are slower, and where more ranks compute than there are processors, all alike."""
        num_computing = sum(self.num_ranks[lane] for lane in self.computing)
        turn = min(1.0, self.shares.processors / max(1, num_computing))
        for lane, moving in enumerate(self.network.num_moving):
            speed = turn * (self.shares.compute if moving else 1.0)
            if self.speed[lane] != speed:
                self.speed[lane] = speed
                if lane in self.computing:
                    self._advance(self.computing[lane])
                    self._go_on(lane)

    # ---- compute

    def _compute(self, task: int) -> None:
        lane = self.lane[task]
        self.computing[lane] = _Kernels(task, self.seconds[task], 1.0, self.env.now, 0)
        self._go_on(lane)
        if self.shares.exchange < 1 or self.takes_turns:
            self.settle_later()

    def _go_on(self, lane: int) -> None:
        """A lane's kernels run on at the lane's speed, until they end or the speed changes."""
        kernels = self.computing[lane]
        self.num_runs += 1
        kernels.speed, kernels.version = self.speed[lane], self.num_runs
        event = self.env.timeout(kernels.left_s / kernels.speed, (lane, kernels, kernels.version))
        event.callbacks.append(self._computed)

    def _advance(self, kernels: _Kernels) -> None:
        step_s = self.env.now - kernels.since_s
        kernels.since_s = self.env.now
        kernels.left_s = max(0.0, kernels.left_s - kernels.speed * step_s)
        self.lost_s[kernels.task] += (1.0 - kernels.speed) * step_s

    def _computed(self, event: Any) -> None:
        lane, kernels, version = event.value
        if kernels.version == version:
            self._advance(kernels)
            del self.computing[lane]
            if self.shares.exchange < 1 or self.takes_turns:
                self.settle_later()
            self._end(kernels.task)

    # ---- exchanges

    def _arrive(self, task: int) -> None:
        """An exchange begins when all its lanes have come to it."""
        meeting = self.unit[task]
        assert self.lane[task] not in self.arrived[meeting], "a meeting is on two streams of a lane"
        self.arrived[meeting][self.lane[task]] = task
        self.gate.arrived(meeting, self.lane[task])
        self._try(meeting)

    def _try(self, meeting: int) -> None:
        arrived = self.arrived[meeting]
        if not self.running[meeting] and len(arrived) == len(self.program.meetings[meeting].lanes):
            self.running[meeting], self.arrived[meeting] = arrived, {}
            self.gate.begin(meeting)

    def lane_done(self, meeting: int, lane: int) -> None:
        """A lane's part of an exchange has ended."""
        task = self.running[meeting].pop(lane)
        self.gate.left(meeting, lane)
        self._end(task)
        if not self.running[meeting]:
            self._try(meeting)

    def _on_moving(self) -> None:
        if self.shares.compute < 1:
            self.settle_later()


class _EndOfInstant(simpy.Event):
    """Happens now, behind all else that happens now: what is decided then does not hang on the order of events."""

    def __init__(self, env: simpy.Environment) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, priority=_LAST)


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

    def decide(self) -> None:
        """Starts what may start, at the end of an instant."""


class _OneAtATime(_Fair):
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
        streams.settle_later()

    def left(self, meeting: int, lane: int) -> None:
        """Frees the lane."""
        self.busy.discard(lane)
        self.streams.settle_later()

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


class _ExpertFirst(_Fair):
    """Gradients and parameters go in micro-ops; none starts while a dispatch or combine of its lanes is on or due.

    Nobody waits for ever: a lane that comes to a dispatch has all that comes before it, so whoever it waits for there
    is behind it, and waits for something that comes earlier still.
    Reference: Li et al., "Lina" (USENIX ATC 2023), section 4.1.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        program = streams.program
        kinds = [program.exchanges[meeting.exchange].kind for meeting in program.meetings]
        self.yields = [kind in YIELDING for kind in kinds]
        self.expert = [kind in EXPERT for kind in kinds]
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
            self.streams.settle_later()

    def _hold(self, meeting: int, part: int) -> None:
        self.held.append((meeting, part))
        self.streams.settle_later()

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
