"""Laws that every timeline must keep, looked at in every run: order, one thing at a time, and no faster than the
wires.
"""

from __future__ import annotations

import numpy as np

from moeplan.cost.transfer import wire_s
from moeplan.domain.program import Floats, Stream
from moeplan.domain.timeline import Timeline
from moeplan.errors import SimulationError

_SLACK = 1e-9


def check(timeline: Timeline, seconds_T: Floats) -> None:
    """Raises SimulationError for the first law that is broken."""
    program, start, end = timeline.program, timeline.start_s_T, timeline.end_s_T
    slack = _SLACK * max(timeline.step_s, 1e-6)
    compute = program.tasks.stream_T == Stream.COMPUTE
    _law((start >= 0).all() and (end >= start).all(), "a task ends before it starts")
    _law((start[program.after_D] >= end[program.before_D] - slack).all(), "a task starts before what it waits for ends")
    _law(
        np.allclose((end - start)[compute], seconds_T[compute], rtol=1e-9, atol=slack),
        "a task takes another time than its cost",
    )
    order = np.lexsort((start, end, program.tasks.stream_T, program.tasks.lane_T))
    lane, stream = program.tasks.lane_T[order], program.tasks.stream_T[order]
    same = (lane[1:] == lane[:-1]) & (stream[1:] == stream[:-1])
    _law((start[order][1:][same] >= end[order][:-1][same] - slack).all(), "two tasks of one stream overlap")
    least = np.array([wire_s(program, number) for number in range(len(program.meetings))])
    away = np.flatnonzero(~compute)
    last_of_meeting = (end - start)[away]
    alone = np.array([len(meeting.lanes) == 1 for meeting in program.meetings], bool)[program.tasks.unit_T[away]]
    _law(
        (last_of_meeting[alone] >= least[program.tasks.unit_T[away]][alone] - slack).all(),
        "an exchange beats its wires",
    )


def _law(holds: bool | np.bool_, broken: str) -> None:
    if not holds:
        raise SimulationError(
            f"conservation: {broken}; this is a defect of moeplan, please report it with the scenario"
        )
