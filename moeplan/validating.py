"""The verbs that hold predictions against devices: calibrate and validate."""

from __future__ import annotations

from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from moeplan import api
from moeplan.api import Progress, Source
from moeplan.catalogue.overlay import Given
from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.validator.calibrate import Calibration
    from moeplan.validator.validate import Validation


def calibrate(
    out: str | PathLike[str],
    scenario: Source = "tiny-moe-2-ranks",
    *,
    quick: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Calibration:
    """This machine's devices, measured into the cost model `out`, which extends the sheet of the scenario's.

    It takes about ten minutes, or two if it is to be quick. Raises ExecutionError where nothing can be run.
    """
    from moeplan.validator import calibrate as calibrator
    from moeplan.validator import sheet

    path = Path(fspath(out))
    sheet.check_target(path)
    found = calibrator.calibrate(api.load(scenario), quick=quick, device=device, progress=progress)
    sheet.write(found, path)
    return found


def with_cost_model(scenario: Scenario, cost_model: str | PathLike[str] | None) -> Scenario:
    """The scenario with another sheet for its devices: a name of the catalogue, or a file."""
    if cost_model is None:
        return scenario
    return api.load(scenario, {"cluster.gpu": Given(fspath(cost_model), "cost model")})


def validate(
    scenario: Source,
    plan: Plan | PlanResult | str | PathLike[str] | None = None,
    *,
    cost_model: str | PathLike[str] | None = None,
    candidates: int = 1,
    launches: int = 3,
    steps: int = 12,
    device: str = "auto",
    seed: int = 0,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> list[Validation]:
    """The plan (without one, the best; then also `candidates` - 1 of those behind it) simulated, executed and joined.

    The first is the chosen plan's. Raises ExecutionError, before a process starts, for what cannot be run.
    """
    if candidates < 1 or launches < 1:
        raise MoeplanError(f"candidates: {candidates}, launches: {launches}; use 1 or more of each")
    if plan is not None and candidates > 1:
        raise MoeplanError("candidates: a given plan has no runners-up; leave out the plan, or candidates")
    problem = with_cost_model(api.load(scenario), cost_model)
    from moeplan.validator import validate as validator

    plans = [api.plan_of(plan)] if plan is not None else _best(problem, candidates, progress)
    return validator.validate(
        problem, plans, launches=launches, steps=steps, device=device, seed=seed, tolerance=tolerance, progress=progress
    )


_OTHERS = (
    ("overlap_degree", 1), ("overlap_degree", 2), ("pp", 2), ("tp", 2), ("ep", 2), ("overlap_degree", 4), ("ep", 1),
    ("pp", 1), ("tp", 1),
)  # fmt: skip
"""Choices whose best plans are candidates, in this order."""


def _best(problem: Scenario, count: int, progress: Progress | None) -> list[Plan]:
    """The best plan, and the best of others that differ in a degree, an overlap or a schedule."""
    from moeplan.validator.validate import candidates

    result = api.plan(problem, progress=progress)
    found = [result.plan, *(each.plan for each in result.runners_up)]
    for field, value in _OTHERS if count > 1 else ():
        if len(candidates(problem, found, count)) == count:
            break
        if getattr(result.plan, field) != value:
            with suppress(MoeplanError):
                found.append(api.plan(api.load(problem, {f"choose.{field}": value}), progress=progress).plan)
    return candidates(problem, found, count)
