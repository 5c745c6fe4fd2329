"""Plans simulated, executed and joined: how far off the prediction was, task by task, and whether the ranking held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Ints
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.errors import ExecutionError
from moeplan.executor.execute import Execution, Job, check, check_device, execute_all, problems
from moeplan.partition.footprint import footprint
from moeplan.simulator.noise import Noise
from moeplan.simulator.simulate import simulate
from moeplan.validator.device import check_cost_model
from moeplan.validator.metrics import (
    Error,
    bias,
    busy_s,
    joined,
    kendall_tau,
    noise,
    phases_s,
    regret,
    task_error,
)

Progress = Callable[[str, float, float | None], None]
TOLERANCES = {1: 0.06, 2: 0.08}
"""Of a step, by ranks, as the project promises at most; and with more ranks:"""
MANY_RANKS = 0.12
_DRAWS = 9
"""Of a step with jitter."""
WARM_UP = 3
"""Steps in which memory is touched for the first time, by the process and by the host of a virtual machine."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Validation:
    """One plan, predicted and measured. Predictions are for the speed that the device had while it was measured."""

    scenario: Scenario
    plan: Plan
    device: str
    step: Error
    speed: float | None
    """Of the device, as its yardstick says, over that at which it was calibrated; None: it was not calibrated."""
    tasks: Mapping[str, Error]
    phases: Mapping[str, Error]
    memory: Mapping[str, Error]
    bias: float
    task_error: float
    launches: int
    repetitions: int
    dropped_repetitions: int
    tolerance: float
    predicted: Timeline
    measured: Timeline

    @property
    def is_within_tolerance(self) -> bool:
        """Whether the step's error is no more than the tolerance, or than twice the noise."""
        return self.step.is_within(self.tolerance)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ranking:
    """Several plans of one scenario, in the order in which they were predicted; the first is the chosen one."""

    validations: tuple[Validation, ...]

    @property
    def tau(self) -> float:
        """Agreement of predicted and measured order: 1 the same, -1 reversed. Plans that are no farther apart than
        their noise are not told apart.
        """
        return kendall_tau(*self._steps, noise=[each.step.noise for each in self.validations])

    @property
    def regret(self) -> float:
        """By how much the chosen plan is slower than the best one that was measured."""
        return regret(*self._steps)

    @property
    def _steps(self) -> tuple[list[float], list[float]]:
        """At one speed of the device, since the plans ran one after another."""
        speeds = [each.speed or 1.0 for each in self.validations]
        predicted = [each.step.predicted * speed for each, speed in zip(self.validations, speeds, strict=True)]
        measured = [each.step.measured * speed for each, speed in zip(self.validations, speeds, strict=True)]
        return predicted, measured


def check_all(scenario: Scenario, plans: Sequence[Plan], device: str) -> str:
    """The device that will run them. Raises MoeplanError before a process starts, for anything that cannot be run."""
    for plan in plans:
        check(plan, scenario)
    where = check_device(max(plans, key=lambda each: each.world_size), device)
    check_cost_model(scenario.cluster.gpu, where)
    return where


def validate(
    scenario: Scenario, plans: Sequence[Plan], *, launches: int = 3, steps: int = 12, device: str = "auto",
    seed: int = 0, tolerance: float | None = None, progress: Progress | None = None,
) -> list[Validation]:  # fmt: skip
    """Each plan, in `launches` launches of `steps` steps in which the plans of one size take turns.

    Raises ExecutionError for what cannot be run, before a process starts.
    """
    where = check_all(scenario, plans, device)
    if steps <= WARM_UP:
        raise ExecutionError(f"validate: steps: {steps}, of which {WARM_UP} warm up; use {WARM_UP + 1} or more")
    found: list[list[Execution]] = [[] for _ in plans]
    sizes = sorted({plan.world_size for plan in plans})
    for launch in range(launches):
        for place, size in enumerate(sizes):
            if progress is not None:
                progress(f"launch {launch + 1}", launch * len(sizes) + place, launches * len(sizes))
            chosen = [number for number, plan in enumerate(plans) if plan.world_size == size]
            jobs = [Job(scenario=scenario, plan=plans[number], steps=steps, seed=seed) for number in chosen]
            for number, run in zip(chosen, execute_all(jobs, device=where), strict=True):
                found[number].append(run)
    return [
        _validated(scenario, plan, runs, device=where, tolerance=tolerance, seed=seed)
        for plan, runs in zip(plans, found, strict=True)
    ]


def _validated(
    scenario: Scenario, plan: Plan, runs: Sequence[Execution], *, device: str, tolerance: float | None, seed: int
) -> Validation:
    measured = scenario.cluster.gpu.measured
    counted = [counted_steps(run) for run in runs]
    speed_R = np.ones(plan.world_size)
    if measured is not None:
        pairs = zip(runs, counted, strict=True)
        speed_R = np.median([_speed_R(run, steps, measured.reference_s) for run, steps in pairs], axis=0)
    speed = float(speed_R.mean())
    predicted = slowed(_simulated(scenario, plan, speed / speed_R, seed), speed)
    timelines = [median_timeline(run, steps) for run, steps in zip(runs, counted, strict=True)]
    step_s = [float(np.median(run.step_s_S[steps])) for run, steps in zip(runs, counted, strict=True)]
    middle = timelines[int(np.argsort(step_s, kind="stable")[(len(step_s) - 1) // 2])]
    ranks = plan.world_size
    return Validation(
        scenario=scenario, plan=plan, device=device, speed=speed if measured else None,
        step=Error(predicted=predicted.step_s, measured=median(step_s), noise=noise(step_s)),
        tasks=joined(busy_s(predicted), [busy_s(each) for each in timelines]),
        phases=joined(phases_s(predicted), [phases_s(each) for each in timelines]),
        memory=_memory(scenario, plan, runs, device), bias=bias(predicted, middle),
        task_error=task_error(predicted, middle), launches=len(runs),
        repetitions=sum(len(run.step_s_S) - WARM_UP for run in runs),
        dropped_repetitions=sum(int((~run.repetitions.is_clean_S[WARM_UP:]).sum()) for run in runs),
        tolerance=TOLERANCES.get(ranks, MANY_RANKS) if tolerance is None else tolerance, predicted=predicted,
        measured=middle,
    )  # fmt: skip


def counted_steps(run: Execution) -> Ints:
    """The steps behind the warm-up that nobody disturbed; all of them where each was disturbed, which is told."""
    is_clean_S = run.repetitions.is_clean_S.copy()
    is_clean_S[:WARM_UP] = False
    steps = np.flatnonzero(is_clean_S)
    return steps if len(steps) else np.arange(min(WARM_UP, len(is_clean_S) - 1), len(is_clean_S))


def _speed_R(run: Execution, steps: Ints, reference_s: float) -> Floats:
    """Of each rank, since processors of one machine are slowed down by others as it comes."""
    found: Floats = reference_s / np.median(run.repetitions.yardstick_s_SR[steps], axis=0)
    return found


def _simulated(scenario: Scenario, plan: Plan, slowness_R: Floats, seed: int) -> Timeline:
    """With a lane for each rank, as it was run. Ranks that meet wait for the slowest, so that the device's jitter makes
    a step longer: of several steps with other draws the one that takes as long as half of them do.
    """
    program, model = compile_plan(plan, scenario, folded=False), CostModel(gpu=scenario.cluster.gpu)
    slowness_T = slowness_R[program.tasks.lane_T]
    jitter = 0.0 if model.gpu.measured is None else model.gpu.measured.jitter
    draws = [Noise(jitter=jitter, seed=seed + draw) for draw in range(_DRAWS if jitter else 1)]
    found = [simulate(program, model, noise=noise, slowness_T=slowness_T) for noise in draws]
    return sorted(found, key=lambda each: each.step_s)[len(found) // 2]


def slowed(timeline: Timeline, speed: float) -> Timeline:
    """The same on a device of that speed."""
    lost = timeline.lost_s_T
    return Timeline(
        program=timeline.program, start_s_T=timeline.start_s_T / speed, end_s_T=timeline.end_s_T / speed,
        launch_s_T=timeline.launch_s_T / speed, lost_s_T=None if lost is None else lost / speed, source=timeline.source,
    )  # fmt: skip


def median_timeline(run: Execution, steps: Ints) -> Timeline:
    """Of the counted step that took as long as half of them do."""
    step = int(steps[np.argsort(run.step_s_S[steps], kind="stable")[(len(steps) - 1) // 2]])
    start_s_T, end_s_T = run.repetitions.start_s_ST[step], run.repetitions.end_s_ST[step]
    return Timeline(
        program=run.timeline.program, start_s_T=start_s_T - start_s_T.min(), end_s_T=end_s_T - start_s_T.min(),
        launch_s_T=np.zeros(len(start_s_T)), source="measured",
    )  # fmt: skip


def _memory(scenario: Scenario, plan: Plan, runs: Sequence[Execution], device: str) -> dict[str, Error]:
    """The fullest rank: of a processor its whole process, of a GPU what its allocator had given out."""
    tensors = max(stage.total for stage in footprint(plan, scenario))
    measured = scenario.cluster.gpu.measured
    before = float(measured.process_memory_bytes) if measured and device == "cpu" else 0.0
    peaks = [float(run.repetitions.memory_bytes_RM[:, 1].max()) for run in runs]
    name = "process" if device == "cpu" else "allocated"
    return {name: Error(predicted=before + tensors, measured=median(peaks), noise=noise(peaks))}


def candidates(scenario: Scenario, plans: Sequence[Plan], count: int) -> list[Plan]:
    """The first plan, and then those of the others that can be run, `count` in all where there are as many. Of plans
    that differ only in what counts little the first is taken.
    """
    found = {_but_for_trifles(plans[0]): plans[0]}
    for plan in plans[1:]:
        alike = _but_for_trifles(plan)
        if len(found) < count and alike not in found and not any(problems(plan, scenario)):
            found[alike] = plan
    return list(found.values())


def _but_for_trifles(plan: Plan) -> Plan:
    """Without ZeRO stages, arbitration, the order of ranks and where experts stand."""
    order = {"rank_order": "tp-cp-ep-dp-pp", "arbitration": "fair", "placement": None}
    return plan.model_copy(update={"zero_dense": 0, "zero_expert": 0, **order})


def document(found: Sequence[Validation]) -> dict[str, Any]:
    """Everything of the first plan in plain numbers, and the ranking of all."""
    first = found[0]
    ranking = None
    if len(found) > 1:
        whole = Ranking(validations=tuple(found))
        ranking = {
            "kendall_tau": whole.tau, "regret": whole.regret,
            "candidates": [
                {"plan": _document(each.plan), "step": _error(each.step), "speed": each.speed} for each in found
            ],
        }  # fmt: skip
    return {
        "schema": "moeplan.validation/v1", "scenario": dict(first.scenario.document),
        "plan": _document(first.plan), "device": first.device, "step": _error(first.step),
        "speed": first.speed, "tasks": {name: _error(each) for name, each in first.tasks.items()},
        "phases": {name: _error(each) for name, each in first.phases.items()},
        "memory": {name: _error(each, unit="bytes") for name, each in first.memory.items()}, "bias": first.bias,
        "task_error": first.task_error, "ranking": ranking, "launches": first.launches,
        "repetitions": sum(each.repetitions for each in found),
        "dropped_repetitions": sum(each.dropped_repetitions for each in found), "tolerance": first.tolerance,
        "within_tolerance": all(each.is_within_tolerance for each in found),
    }  # fmt: skip


def _document(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json", by_alias=True)


def _error(found: Error, *, unit: str = "s") -> dict[str, float]:
    return {
        f"predicted_{unit}": found.predicted, f"measured_{unit}": found.measured, "error": found.error,
        "noise": found.noise,
    }  # fmt: skip
