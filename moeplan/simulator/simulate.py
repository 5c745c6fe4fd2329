"""Program to timeline, in virtual time."""

from __future__ import annotations

from typing import Literal

import numpy as np
import simpy

from moeplan.cost.cost_model import CostModel, Shares
from moeplan.cost.transfer import wire_s
from moeplan.domain.program import Floats, Program, Stream
from moeplan.domain.timeline import Timeline
from moeplan.errors import SimulationError
from moeplan.simulator.noise import Noise, factors
from moeplan.simulator.packed import with_stream_order
from moeplan.simulator.streams import Streams

_SLACK = 1e-9
Engine = Literal["auto", "compiled", "simpy"]
COMPILED_FROM = 1000
"""Tasks from which `auto` takes the compiled engine. It hangs on the program alone: what is printed must not differ
by what a process did before, not even by a rounding."""


def simulate(
    program: Program, cost_model: CostModel, *, noise: Noise | None = None, engine: Engine = "auto",
    slowness_T: Floats | None = None,
) -> Timeline:  # fmt: skip
    """When every task runs. The same program, costs and noise give the same timeline, to the last bit.

    `slowness_T` are factors of each task's kernels. Both engines say the same but for rounding: `simpy` is written to
    be read, `compiled` to be fast, once it is loaded. Ranks that share processors take turns in the former alone.
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
    if slowness_T is not None:
        seconds[compute] *= slowness_T[compute]
    takes_turns = cost_model.shares.processors < program.num_gpus
    if takes_turns and engine == "compiled":
        raise SimulationError("engine 'compiled' knows no ranks that share processors; use auto or simpy")
    is_large = engine == "auto" and len(program.tasks) >= COMPILED_FROM and not takes_turns
    is_compiled = engine == "compiled" or is_large
    run = _by_compiled if is_compiled else _by_simpy
    timeline = _timeline(program, run(program, seconds, cost_model.shares), launch)
    _check(timeline, seconds, cost_model.shares)
    return timeline


_Runs = tuple[Floats, Floats, Floats]
"""Start, end and what exchanges beside cost, of each task; -1 where it never comes to that."""


def _by_simpy(program: Program, seconds_T: Floats, shares: Shares) -> _Runs:
    streams = Streams(simpy.Environment(), program, seconds_T, shares)
    streams.run()
    return np.array(streams.start_s), np.array(streams.end_s), np.array(streams.lost_s)


def _by_compiled(program: Program, seconds_T: Floats, shares: Shares) -> _Runs:
    # numba takes its time to load, and small programs do without it.
    from moeplan.simulator.compiled import run

    return run(program, seconds_T, shares)


def _timeline(program: Program, runs: _Runs, launch_s_T: Floats) -> Timeline:
    for values in runs:
        values.setflags(write=False)
    start_s_T, end_s_T, lost_s_T = runs
    if (end_s_T < 0).any():
        task = int(np.argmax(end_s_T < 0))
        raise SimulationError(f"deadlock: {_shown(program, task)} never ends; this is a defect of moeplan")
    return Timeline(program=program, start_s_T=start_s_T, end_s_T=end_s_T, launch_s_T=launch_s_T, lost_s_T=lost_s_T)


def _shown(program: Program, task: int) -> str:
    tasks = program.tasks
    where = f"lane {tasks.lane_T[task]}, layer {tasks.layer_T[task]}, micro-batch {tasks.microbatch_T[task]}"
    return f"task {task} ({program.kind(task)}, {where})"


# ---- laws


def _check(timeline: Timeline, seconds_T: Floats, shares: Shares) -> None:
    """Raises SimulationError for the first law that is broken: order, one thing at a time, no faster than the wires.

    Kernels take at least what they cost, and at most that over their share of the GPU beside exchanges.
    """
    program, start, end = timeline.program, timeline.start_s_T, timeline.end_s_T
    slack = _SLACK * max(timeline.step_s, 1e-6)
    compute = program.tasks.stream_T == Stream.COMPUTE
    before, after = with_stream_order(program)
    _law((start >= 0).all() and (end >= start).all(), "a task ends before it starts")
    _law((start[after] >= end[before] - slack).all(), "a task starts before what it waits for ends")
    spent, cost = (end - start)[compute], seconds_T[compute]
    _law((spent >= cost * (1 - _SLACK) - slack).all(), "a task takes less than its cost")
    turns = max(1.0, program.num_gpus / shares.processors)
    most = cost / shares.compute * turns * (1 + _SLACK) + slack
    _law((spent <= most).all(), "a task takes more than its cost and what exchanges beside it may cost")
    away = np.flatnonzero(~compute)
    least_s_M = _alone_s(program)
    _law(((end - start)[away] >= least_s_M[program.tasks.unit_T[away]] - slack).all(), "an exchange beats its wires")


def _alone_s(program: Program) -> Floats:
    """The least time of exchanges of one lane; nothing for others, whose lanes do not all wait for the last flow."""
    least = [wire_s(program, number) if len(each.lanes) == 1 else 0.0 for number, each in enumerate(program.meetings)]
    return np.array(least)


def _law(holds: bool | np.bool_, broken: str) -> None:
    if not holds:
        raise SimulationError(
            f"conservation: {broken}; this is a defect of moeplan, please report it with the scenario"
        )
