"""The distinct ranks of a plan, each run alone on one device: real kernels and allocator, exchanges that take as long
as they are predicted to.

What stays modelled: how long exchanges take and when other ranks come to them, the processors of a GPU that a library
of exchanges would use, and so what either slows down of the other. Losses and gradients mean nothing: noise comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.program import Ints, Program, Stream
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.errors import ExecutionError
from moeplan.executor.execute import Job, check, check_device, document_of, read_rank
from moeplan.executor.launch import PATIENCE_S, folder_of_a_run, run_ranks

MODELLED = (
    "modelled: how long exchanges take, when other ranks come to them, and what exchanges and kernels slow down of "
    "one another"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Role:
    """A rank that no other one of the plan is like, run alone."""

    rank: int
    name: str
    device: str
    step_s: float
    predicted_step_s: float
    busy_s: Mapping[str, tuple[float, float]]
    """By kind of work: predicted, and measured in all tasks of the kind."""
    allocated_bytes: int
    """The most of a step; of a process on processor cores the memory that it grew by."""
    reserved_bytes: int
    predicted_bytes: float


def roles_of(program: Program) -> dict[int, str]:
    """The ranks to run: of the first, a middle and the last stage those whose experts get most and fewest tokens."""
    stages = sorted({lane.stage for lane in program.lanes})
    middle = {stages[len(stages) // 2]: "middle stage, "} if len(stages) > 2 else {}
    named = {stages[0]: "first stage, ", stages[-1]: "last stage, "} | middle if len(stages) > 1 else {stages[0]: ""}
    flops, found = _expert_flops(program), dict[int, str]()
    for stage, name in named.items():
        ranks = [number for number, lane in enumerate(program.lanes) if lane.stage == stage]
        hottest, coldest = (pick(ranks, key=flops.__getitem__) for pick in (max, min))
        found |= {hottest: f"{name}hottest experts"}
        found |= (
            {coldest: f"{name}coldest experts"} if flops[coldest] < flops[hottest] else {hottest: f"{name}any experts"}
        )
    return found


def _expert_flops(program: Program) -> list[float]:
    """Of each rank in one step."""
    tasks, found = program.tasks, [0.0] * len(program.lanes)
    by_work = [
        sum(kernel.flops for kernel in work.kernels) if work.kind == "experts" else 0.0 for work in program.works
    ]
    for task in np.flatnonzero(tasks.stream_T == Stream.COMPUTE).tolist():
        found[int(tasks.lane_T[task])] += by_work[int(tasks.unit_T[task])]
    return found


def run_roles(
    scenario: Scenario, plan: Plan, predicted: Timeline, memory_bytes: Mapping[int, float], *, steps: int, seed: int,
    device: str, patience_s: float = PATIENCE_S,
) -> list[Role]:  # fmt: skip
    """Each role by itself, one after another. `predicted` has a lane for each rank, `memory_bytes` is by stage.

    Raises ExecutionError, before a process starts, for what cannot be run, and for a role that fails.
    """
    check(plan, scenario)
    if steps < 1:
        raise ExecutionError(f"execute: steps: {steps} is none; use 1 or more")
    where, program = check_device(plan, device, processes=1), predicted.program
    found = []
    for rank, name in roles_of(program).items():
        job = document_of(Job(scenario=scenario, plan=plan, steps=steps, seed=seed), where)
        with folder_of_a_run([job | {"delays": _delays(predicted, rank)}]) as folder:
            run_ranks(folder, [program], plan.world_size, patience_s=patience_s, ranks=(rank,))
            measured = read_rank(folder, 0, rank)
        found.append(_role(predicted, measured, rank, name, where, memory_bytes[program.lanes[rank].stage]))
    return found


def _delays(predicted: Timeline, rank: int) -> dict[str, tuple[float, float]]:
    """By task: when the last other rank comes to the exchange, and how long it then takes."""
    program, tasks = predicted.program, predicted.program.tasks
    found = {}
    for together in _meetings(program):
        mine = [task for task in together if tasks.lane_T[task] == rank]
        others = [float(predicted.start_s_T[task]) for task in together if tasks.lane_T[task] != rank]
        last_s = float(predicted.start_s_T[together].max())
        if mine:
            found[str(mine[0])] = (max(others, default=0.0), float(predicted.end_s_T[mine[0]]) - last_s)
        elif tasks.stream_T[together[0]] == Stream.PIPELINE:
            found[str(int(together[0]))] = (float(predicted.end_s_T[together[0]]), 0.0)
    return found


def _meetings(program: Program) -> list[Ints]:
    """The tasks of each exchange: the n-th time that each of its lanes comes to it."""
    tasks, seen = program.tasks, dict[tuple[int, int], int]()
    found: dict[tuple[int, int], list[int]] = {}
    for task in np.flatnonzero(tasks.stream_T != Stream.COMPUTE).tolist():
        key = (int(tasks.unit_T[task]), int(tasks.lane_T[task]))
        seen[key] = seen.get(key, -1) + 1
        found.setdefault((key[0], seen[key]), []).append(task)
    return [np.array(each) for each in found.values()]


def _role(
    predicted: Timeline, measured: Mapping[str, np.ndarray], rank: int, name: str, device: str,
    memory_bytes: float,
) -> Role:  # fmt: skip
    start_ST, end_ST, numbers = measured["start_s_ST"], measured["end_s_ST"], measured["tasks"]
    steps_S = end_ST.max(axis=1) - start_ST.min(axis=1)
    counted = steps_S[1:] if len(steps_S) > 1 else steps_S
    step = int(np.argsort(counted, kind="stable")[(len(counted) - 1) // 2]) + len(steps_S) - len(counted)
    program, busy = predicted.program, dict[str, tuple[float, float]]()
    for at, task in enumerate(numbers.tolist()):
        if program.tasks.stream_T[task] == Stream.COMPUTE:
            said, took = busy.get(program.kind(task), (0.0, 0.0))
            said += float(predicted.end_s_T[task] - predicted.start_s_T[task])
            busy[program.kind(task)] = (said, took + float(end_ST[step, at] - start_ST[step, at]))
    before, allocated, reserved = measured["memory_bytes"].tolist()
    return Role(
        rank=rank, name=name, device=device, step_s=float(steps_S[step]),
        predicted_step_s=float(predicted.end_s_T[numbers].max() - predicted.start_s_T[numbers].min()), busy_s=busy,
        allocated_bytes=int(allocated - (0 if device == "cuda" else before)), predicted_bytes=memory_bytes,
        reserved_bytes=int(reserved - (0 if device == "cuda" else before)),
    )  # fmt: skip
