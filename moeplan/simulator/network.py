"""Exchanges as fluid on shared links: rates are fair, and change only when a flow class starts or ends.

An exchange that shares no link with another active one follows its remembered course in one event. When another
comes to share its links it is taken to where its course stands; from then on both are advanced from change to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, ulp
from typing import Any

import numpy as np
import simpy

from moeplan.domain.program import Program
from moeplan.simulator.fair_share import RateTable

_DONE = 1e-12
"""A flow is complete when less than this part of it is left, or less than the clock can tell apart."""


@dataclass
class Transfer:
    """One running exchange: which phase (of which micro-op) it is in and, class by class, what is left to move."""

    meeting: int
    on_lane_done: Callable[[int, int], None]
    parts: int = 1
    phase: int = -1
    left: dict[int, float] = field(default_factory=dict)
    rate: dict[int, float] = field(default_factory=dict)
    since_s: float = 0.0
    version: int = 0
    course_from_s: float | None = None
    """When it set out on its remembered course, if it still follows it."""
    lanes_left: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Course:
    """What an exchange does alone: stretches (start, phase, what is left, at which rates), and who is done when."""

    stretches: tuple[tuple[float, int, dict[int, float], dict[int, float]], ...]
    lane_done_s: dict[int, float]
    end_s: float


class Network:
    """Runs transfers; `start` begins one, and its lanes are told one by one when their own flows have ended."""

    def __init__(self, env: simpy.Environment, program: Program) -> None:
        self.env, self.program = env, program
        self.table = RateTable(program.flows)
        self.active: dict[int, Transfer] = {}
        self.delivered_bytes = 0.0
        self._courses: dict[tuple[int, int], Course] = {}
        self._sizes = [program.exchanges[meeting.exchange].size_bytes for meeting in program.meetings]
        self._share = program.flows.share_C.tolist()
        self._lanes_of_class = program.flows.lanes_C
        self._rivals = _rivals(program)

    def parts_of(self, meeting: int) -> int:
        """Micro-ops into which an exchange is cut so that more urgent ones need not wait for all of it."""
        return max(1, ceil(self._sizes[meeting] / self.program.micro_op_bytes))

    # ---- begin

    def start(self, meeting: int, on_lane_done: Callable[[int, int], None], *, parts: int = 1) -> None:
        """Begins an exchange, or one of its micro-ops, at the present time."""
        lanes = set(self.program.meetings[meeting].lanes)
        transfer = Transfer(meeting=meeting, on_lane_done=on_lane_done, parts=parts, lanes_left=lanes)
        self.active[meeting] = transfer
        rivals = [self.active[other] for other in self._rivals[meeting] if other in self.active]
        if rivals:
            for rival in rivals:
                self._leave_course(rival)
            self._next_phase(transfer)
        else:
            self._follow_course(transfer)

    # ---- alone

    def _follow_course(self, transfer: Transfer) -> None:
        course = self._course(transfer.meeting, transfer.parts)
        transfer.course_from_s = self.env.now
        by_time: dict[float, list[int]] = {}
        for lane, done_s in course.lane_done_s.items():
            by_time.setdefault(done_s, []).append(lane)
        by_time.setdefault(course.end_s, [])
        for done_s, lanes in by_time.items():
            event = self.env.timeout(done_s, (transfer, transfer.version, lanes, done_s == course.end_s))
            event.callbacks.append(self._on_course)

    def _on_course(self, event: Any) -> None:
        transfer, version, lanes, ends = event.value
        if transfer.version != version:
            return
        if ends:
            self._finish(transfer)
        else:
            self._lanes_done(transfer, lanes)

    def _course(self, meeting: int, parts: int) -> Course:
        if (meeting, parts) not in self._courses:
            self._courses[meeting, parts] = self._plot(meeting, parts)
        return self._courses[meeting, parts]

    def _plot(self, meeting: int, parts: int) -> Course:
        stretches: list[tuple[float, int, dict[int, float], dict[int, float]]] = []
        last_s: dict[int, float] = {}
        now_s = 0.0
        for number, phase in enumerate(self.program.meetings[meeting].phases):
            stretches.append((now_s, number, {}, {}))
            now_s += phase.latency_s
            left = self._whole(meeting, number, parts)
            while left:
                classes = tuple(sorted(left))
                rate = dict(zip(classes, self.table.rates(classes), strict=True))
                stretches.append((now_s, number, dict(left), rate))
                step_s = min(left[c] / rate[c] for c in classes)
                now_s += step_s
                for ended in self._drain(meeting, left, rate, step_s, parts):
                    for lane in self._lanes_of_class[ended]:
                        last_s[lane] = now_s
        lane_done = {lane: last_s.get(lane, now_s) for lane in self.program.meetings[meeting].lanes}
        return Course(stretches=tuple(stretches), lane_done_s=lane_done, end_s=now_s)

    def _leave_course(self, transfer: Transfer) -> None:
        """Puts a transfer where its course has brought it, to be advanced from change to change."""
        if transfer.course_from_s is None:
            return
        elapsed = self.env.now - transfer.course_from_s
        course = self._course(transfer.meeting, transfer.parts)
        at = max(index for index, stretch in enumerate(course.stretches) if stretch[0] <= elapsed)
        start_s, phase, left, rate = course.stretches[at]
        transfer.course_from_s, transfer.version, transfer.phase = None, transfer.version + 1, phase
        transfer.since_s = self.env.now
        if rate:
            transfer.left = {c: left[c] - rate[c] * (elapsed - start_s) for c in left}
            transfer.rate = dict(rate)
            self._schedule(transfer)
        else:
            latency = self.program.meetings[transfer.meeting].phases[phase].latency_s
            self._wait(transfer, max(0.0, start_s + latency - elapsed))

    # ---- together

    def _next_phase(self, transfer: Transfer) -> None:
        phases = self.program.meetings[transfer.meeting].phases
        transfer.phase += 1
        if transfer.phase == len(phases):
            self._finish(transfer)
        else:
            self._wait(transfer, phases[transfer.phase].latency_s)

    def _wait(self, transfer: Transfer, delay_s: float) -> None:
        transfer.left, transfer.rate = {}, {}
        event = self.env.timeout(delay_s, (transfer, transfer.version))
        event.callbacks.append(self._begin_phase)

    def _begin_phase(self, event: Any) -> None:
        transfer, version = event.value
        if transfer.version != version:
            return
        transfer.left = self._whole(transfer.meeting, transfer.phase, transfer.parts)
        transfer.since_s = self.env.now
        if transfer.left:
            self._share_again(transfer)
        else:
            self._next_phase(transfer)

    def _on_change(self, event: Any) -> None:
        """A flow class of a transfer has ended."""
        transfer, version = event.value
        if transfer.version != version:
            return
        self._lanes_ended(transfer, self._advance(transfer))
        self._share_again(transfer)

    def _share_again(self, changed: Transfer) -> None:
        """New rates for all that shares links, directly or through others, with the transfer that changed."""
        together = self._together(changed)
        for transfer in together:
            if transfer is not changed:
                self._lanes_ended(transfer, self._advance(transfer))
        classes = tuple(sorted(c for transfer in together for c in transfer.left))
        known = dict(zip(classes, self.table.rates(classes), strict=True))
        for transfer in together:
            rate = {c: known[c] for c in transfer.left}
            if transfer is changed or rate != transfer.rate:
                transfer.rate = rate
                transfer.version += 1
                self._schedule(transfer)
        for transfer in [transfer for transfer in together if not transfer.left]:
            self._next_phase(transfer)

    def _together(self, transfer: Transfer) -> list[Transfer]:
        found, frontier = {transfer.meeting: transfer}, [transfer.meeting]
        while frontier:
            for other in self._rivals[frontier.pop()]:
                if other in self.active and other not in found and self.active[other].left:
                    found[other] = self.active[other]
                    frontier.append(other)
        return [found[meeting] for meeting in sorted(found)]

    def _schedule(self, transfer: Transfer) -> None:
        if transfer.left:
            soonest = min(transfer.left[c] / transfer.rate[c] for c in transfer.left)
            event = self.env.timeout(max(soonest, 0.0), (transfer, transfer.version))
            event.callbacks.append(self._on_change)

    def _advance(self, transfer: Transfer) -> list[int]:
        """Moves what flowed since the last change; the classes that ended."""
        step_s = self.env.now - transfer.since_s
        transfer.since_s = self.env.now
        return self._drain(transfer.meeting, transfer.left, transfer.rate, step_s, transfer.parts)

    # ---- sizes and ends

    def _whole(self, meeting: int, phase: int, parts: int) -> dict[int, float]:
        size = self._sizes[meeting] / parts
        classes = self.program.meetings[meeting].phases[phase].classes
        return {c: self._share[c] * size for c in classes if self._share[c] * size > 0}

    def _drain(
        self, meeting: int, left: dict[int, float], rate: dict[int, float], step_s: float, parts: int
    ) -> list[int]:
        size, ended = self._sizes[meeting] / parts, []
        instant_s = 4 * ulp(self.env.now)
        for c in list(left):
            flow = rate.get(c, 0.0)
            left[c] -= flow * step_s
            if left[c] <= max(_DONE * self._share[c] * size, flow * instant_s):
                del left[c]
                ended.append(c)
        return ended

    def _lanes_ended(self, transfer: Transfer, ended: list[int]) -> None:
        """In the last phase a lane is done when none of its flows is left."""
        last = transfer.phase == len(self.program.meetings[transfer.meeting].phases) - 1
        if not ended or not last or not transfer.left:
            return
        busy = {lane for c in transfer.left for lane in self._lanes_of_class[c]}
        touched = {lane for c in ended for lane in self._lanes_of_class[c]}
        self._lanes_done(transfer, sorted((touched & transfer.lanes_left) - busy))

    def _lanes_done(self, transfer: Transfer, lanes: list[int]) -> None:
        for lane in lanes:
            transfer.lanes_left.discard(lane)
            transfer.on_lane_done(transfer.meeting, lane)

    def _finish(self, transfer: Transfer) -> None:
        del self.active[transfer.meeting]
        transfer.version += 1
        self._lanes_done(transfer, sorted(transfer.lanes_left))


def _rivals(program: Program) -> list[list[int]]:
    """For each meeting those that cross a common class of links, in rising order."""
    uses = np.zeros((len(program.meetings), program.flows.crossing_CK.shape[1]), np.float32)
    for number, meeting in enumerate(program.meetings):
        classes = [c for phase in meeting.phases for c in phase.classes]
        uses[number] = program.flows.crossing_CK[classes].any(axis=0)
    shared = uses @ uses.T
    np.fill_diagonal(shared, 0)
    return [np.flatnonzero(row).tolist() for row in shared]
