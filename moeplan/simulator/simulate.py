"""Program to timeline, in virtual time."""

from __future__ import annotations

import numpy as np
import simpy

from moeplan.cost.cost_model import CostModel
from moeplan.domain.program import Program, Stream
from moeplan.domain.timeline import Timeline
from moeplan.simulator.checks import check
from moeplan.simulator.noise import Noise, factors
from moeplan.simulator.streams import Streams


def simulate(program: Program, cost_model: CostModel, *, noise: Noise | None = None) -> Timeline:
    """When every task runs. The same program, costs and noise give the same timeline, to the last bit.

    Raises SimulationError if tasks wait for one another, or if a conservation law is broken (a defect of moeplan).
    """
    costs = [cost_model.cost(work) for work in program.works]
    compute = program.tasks.stream_T == Stream.COMPUTE
    seconds, launch = np.zeros(len(program.tasks)), np.zeros(len(program.tasks))
    units = program.tasks.unit_T[compute]
    seconds[compute] = np.array([cost.seconds for cost in costs])[units]
    launch[compute] = np.array([cost.launch_s for cost in costs])[units]
    if noise is not None:
        seconds *= factors(program, noise)
    streams = Streams(simpy.Environment(), program, seconds)
    streams.run()
    timeline = Timeline(
        program=program,
        start_s_T=_frozen(streams.start_s),
        end_s_T=_frozen(streams.end_s),
        launch_s_T=launch,
    )
    check(timeline, seconds)
    return timeline


def _frozen(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array = np.array(values)
    array.setflags(write=False)
    return array
