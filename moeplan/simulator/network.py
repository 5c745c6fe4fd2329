"""Exchanges as fluid on shared links: rates are fair, and change only when a flow class starts or ends.

The readable reference; `compiled.py` does the same, step by step. Axes: A active classes, K link classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import ceil, inf, ulp
from typing import Any

import numpy as np
import simpy

from moeplan.domain.program import Floats, Flows, Program
from moeplan.simulator.packed import DONE, FULL, INSTANT, rivals


@dataclass
class Transfer:
    """One running exchange: which phase (of which micro-op) it is in and, class by class, what is left to move."""

    meeting: int
    on_lane_done: Callable[[int, int], None]
    parts: int
    lanes_left: set[int]
    phase: int = 0
    left: dict[int, float] = field(default_factory=dict)
    fair: dict[int, float] = field(default_factory=dict)
    pace: dict[int, float] = field(default_factory=dict)
    """The fair rate, or what of it is left beside computing lanes."""
    since_s: float = 0.0
    version: int = 0


class Network:
    """Runs transfers; `start` begins one, and its lanes are told one by one when their own flows have ended.

    A flow one of whose lanes computes has `exchange_share` of its fair rate; nobody gets what it leaves.
    """

    def __init__(
        self,
        env: simpy.Environment,
        program: Program,
        *,
        exchange_share: float = 1.0,
        on_moving: Callable[[], None] = lambda: None,
    ) -> None:
        self.env, self.program, self.exchange_share, self.on_moving = env, program, exchange_share, on_moving
        self.table = RateTable(program.flows)
        self.active: dict[int, Transfer] = {}
        self.num_moving = [0] * len(program.lanes)
        """How many exchanges of each lane move; `on_moving` is called when one begins or ends."""
        self.is_computing = [False] * len(program.lanes)
        self._sizes = [program.exchanges[meeting.exchange].size_bytes for meeting in program.meetings]
        self._share, self._extra = program.flows.share_C.tolist(), program.flows.extra_bytes_C.tolist()
        self._lanes_of_class = program.flows.lanes_C
        self._rivals = [np.flatnonzero(row).tolist() for row in rivals(program)]
        self._last_phase: dict[int, dict[int, int]] = {}

    def parts_of(self, meeting: int) -> int:
        """Micro-ops into which an exchange is cut so that more urgent ones need not wait for all of it."""
        return max(1, ceil(self._sizes[meeting] / self.program.micro_op_bytes))

    def start(self, meeting: int, on_lane_done: Callable[[int, int], None], *, parts: int = 1) -> None:
        """Begins an exchange, or one of its micro-ops, at the present time."""
        lanes = set(self.program.meetings[meeting].lanes)
        transfer = Transfer(meeting=meeting, on_lane_done=on_lane_done, parts=parts, lanes_left=lanes)
        self.active[meeting] = transfer
        for lane in lanes:
            self.num_moving[lane] += 1
        self.on_moving()
        self._wait(transfer)

    def compute_changed(self, lanes: Iterable[int]) -> None:
        """Lanes began or ceased to compute: the flows that touch them go on at another pace."""
        for lane in lanes:
            self.is_computing[lane] = not self.is_computing[lane]
        for transfer in [self.active[meeting] for meeting in sorted(self.active)]:
            pace = {c: self._pace(c, transfer.fair[c]) for c in transfer.left}
            if pace != transfer.pace:
                ended = self._advance(transfer)
                transfer.pace = {c: pace[c] for c in transfer.left}
                if ended:
                    self._lanes_ended(transfer, ended)
                    self._share_again(transfer)
                else:
                    self._schedule(transfer)

    # ---- phases

    def _next_phase(self, transfer: Transfer) -> None:
        transfer.phase += 1
        if transfer.phase == len(self.program.meetings[transfer.meeting].phases):
            self._finish(transfer)
        else:
            self._wait(transfer)

    def _wait(self, transfer: Transfer) -> None:
        """What passes before the bytes of a phase flow."""
        transfer.left, transfer.fair, transfer.pace = {}, {}, {}
        transfer.version += 1
        size = self._sizes[transfer.meeting] / transfer.parts
        phases = self.program.meetings[transfer.meeting].phases
        delay_s = phases[transfer.phase].delay_s(size) if phases else 0.0
        self.env.timeout(delay_s, transfer).callbacks.append(self._begin_phase)

    def _begin_phase(self, event: Any) -> None:
        transfer: Transfer = event.value
        if not self.program.meetings[transfer.meeting].phases:
            self._finish(transfer)
            return
        transfer.left, transfer.since_s = self._whole(transfer), self.env.now
        if transfer.left:
            self._share_again(transfer)
        else:
            self._next_phase(transfer)

    def _whole(self, transfer: Transfer) -> dict[int, float]:
        size = self._sizes[transfer.meeting] / transfer.parts
        classes = self.program.meetings[transfer.meeting].phases[transfer.phase].classes
        return {c: self._share[c] * size + self._extra[c] for c in classes if self._share[c] * size > 0}

    # ---- rates

    def _on_change(self, event: Any) -> None:
        """A flow class of a transfer has ended."""
        transfer, version = event.value
        if transfer.version == version:
            self._lanes_ended(transfer, self._advance(transfer))
            self._share_again(transfer)

    def _share_again(self, changed: Transfer) -> None:
        """New rates for all that shares links, directly or through others, with the transfer that changed."""
        together = self._together(changed)
        for transfer in together:
            if transfer is not changed:
                self._lanes_ended(transfer, self._advance(transfer))
        fair = iter(self.table.rates(tuple(c for transfer in together for c in transfer.left)))
        for transfer in together:
            transfer.fair = {c: next(fair) for c in transfer.left}
            pace = {c: self._pace(c, rate) for c, rate in transfer.fair.items()}
            if transfer is changed or pace != transfer.pace:
                transfer.pace = pace
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

    def _pace(self, flow_class: int, fair: float) -> float:
        beside = any(self.is_computing[lane] for lane in self._lanes_of_class[flow_class])
        return fair * self.exchange_share if beside else fair

    def _schedule(self, transfer: Transfer) -> None:
        transfer.version += 1
        if transfer.left:
            soonest = min(transfer.left[c] / transfer.pace[c] for c in transfer.left)
            event = self.env.timeout(max(soonest, 0.0), (transfer, transfer.version))
            event.callbacks.append(self._on_change)

    # ---- ends

    def _advance(self, transfer: Transfer) -> list[int]:
        """Moves what flowed since the last change; the classes that ended."""
        step_s, size, ended = self.env.now - transfer.since_s, self._sizes[transfer.meeting] / transfer.parts, []
        transfer.since_s = self.env.now
        instant_s = INSTANT * ulp(self.env.now)
        for c in list(transfer.left):
            flow = transfer.pace[c]
            left = transfer.left[c] - flow * step_s if flow < inf else 0.0
            if left <= max(DONE * (self._share[c] * size + self._extra[c]), flow * instant_s):
                del transfer.left[c]
                ended.append(c)
            else:
                transfer.left[c] = left
        return ended

    def _lanes_ended(self, transfer: Transfer, ended: list[int]) -> None:
        """A lane is done when none of its flows is left, in this phase or a later one; the last ones at the end."""
        if transfer.meeting not in self._last_phase:
            self._last_phase[transfer.meeting] = self._last_phases(transfer)
        last = self._last_phase[transfer.meeting]
        if not transfer.left and transfer.phase == max(last.values()):
            return
        busy = {lane for c in transfer.left for lane in self._lanes_of_class[c]}
        touched = {lane for c in ended for lane in self._lanes_of_class[c]} & transfer.lanes_left
        self._lanes_done(transfer, sorted(lane for lane in touched - busy if last[lane] == transfer.phase))

    def _last_phases(self, transfer: Transfer) -> dict[int, int]:
        """The last phase in which each lane has flows."""
        phases, size = self.program.meetings[transfer.meeting].phases, self._sizes[transfer.meeting]
        return {
            lane: number
            for number, phase in enumerate(phases)
            for c in phase.classes
            if self._share[c] * size > 0
            for lane in self._lanes_of_class[c]
        }

    def _lanes_done(self, transfer: Transfer, lanes: list[int]) -> None:
        for lane in lanes:
            transfer.lanes_left.discard(lane)
            self.num_moving[lane] -= 1
            self.on_moving()
            transfer.on_lane_done(transfer.meeting, lane)

    def _finish(self, transfer: Transfer) -> None:
        del self.active[transfer.meeting]
        transfer.version += 1
        self._lanes_done(transfer, sorted(transfer.lanes_left))


def max_min_rates(crossing_AK: Floats, capacity_K: Floats) -> Floats:
    """Bytes per second of one flow of each class, by progressive filling: all grow alike until a link is full.

    No flow can have more without one that has no more having less. A class that crosses no link has no limit.
    Reference: Bertsekas, Gallager, "Data Networks" (1992), section 6.5.2.
    """
    rates = np.full(len(crossing_AK), np.inf)
    used = crossing_AK.any(axis=0)
    crossing, left = crossing_AK[:, used], capacity_K[used].copy()
    growing = crossing.any(axis=1)
    while growing.any():
        load = crossing[growing].sum(axis=0)
        level = np.divide(left, load, out=np.full(len(left), np.inf), where=load > 0)
        lowest = level.min()
        full = level <= lowest * (FULL)
        frozen = growing & crossing[:, full].any(axis=1)
        rates[frozen] = lowest
        left = np.maximum(left - lowest * crossing[frozen].sum(axis=0), 0.0)
        growing &= ~frozen
    return rates


class RateTable:
    """Rates of sets of active classes, each set solved once."""

    def __init__(self, flows: Flows) -> None:
        self._crossing_CK, self._capacity_K = flows.crossing_CK, flows.capacity_bytes_per_s_K
        self._known: dict[tuple[int, ...], list[float]] = {}

    def rates(self, classes: tuple[int, ...]) -> list[float]:
        """Bytes per second of one flow of each of `classes`, which may name a class twice."""
        if classes not in self._known:
            self._known[classes] = max_min_rates(self._crossing_CK[list(classes)], self._capacity_K).tolist()
        return self._known[classes]
