"""The verb that runs: a plan on the devices at hand, by PyTorch."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from moeplan import api
from moeplan.api import Progress, Source
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.errors import MoeplanError
from moeplan.simulator.simulate import simulate

if TYPE_CHECKING:
    from moeplan.executor.execute import Execution
    from moeplan.executor.roles import Role


def execute(
    scenario: Source,
    plan: Plan | PlanResult | str | PathLike[str] | None = None,
    *,
    steps: int = 3,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Execution:
    """`steps` steps of training under a plan (without one, the best), a process for each rank; measured.

    `device`: cpu, cuda, or auto, the GPUs where there are enough of them. `seed` is that of weights and words. The
    experts of each token are given, such that counts are those predicted. Raises ExecutionError, before a
    process starts, for what cannot be run, and with rank and task for a run that fails; no process outlives the call.
    """
    if steps < 1:
        raise MoeplanError(f"steps: {steps} is none; use 1 or more, the first of which warms up")
    problem = api.load(scenario)
    chosen = api.plan(problem, progress=progress).plan if plan is None else api.plan_of(plan)
    if progress is not None:
        progress(f"running {steps} steps on {chosen.world_size} ranks", 0, None)
    # The executor itself needs no PyTorch to be imported, and says so where there is none.
    from moeplan.executor import execute as executor

    return executor.execute(problem, chosen, steps=steps, seed=seed, device=device)


def execute_roles(
    scenario: Source,
    plan: Plan | PlanResult | str | PathLike[str] | None = None,
    *,
    steps: int = 3,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Role]:
    """Each distinct rank of a plan alone on one device, with real kernels and memory; exchanges take what is predicted.

    The first, a middle and the last stage, and of each the ranks whose experts get most and fewest tokens.
    Raises ExecutionError as `execute` does.
    """
    problem = api.load(scenario)
    chosen = api.plan(problem, progress=progress).plan if plan is None else api.plan_of(plan)
    figures = api.simulate(problem, chosen).figures
    predicted = simulate(compile_plan(chosen, problem, folded=False), CostModel(gpu=problem.cluster.gpu))
    if progress is not None:
        progress(f"running the roles among {chosen.world_size} ranks, one at a time", 0, None)
    from moeplan.executor.roles import run_roles

    memory = {stage.stage: stage.total for stage in figures.memory}
    return run_roles(problem, chosen, predicted, memory, steps=steps, seed=seed, device=device)
