"""A grid of changed scenarios: what each would be planned like, and what that changes against the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from moeplan.api import Progress, Source, check_search, load, plan, simulate
from moeplan.catalogue.overlay import Given
from moeplan.domain.plan import Plan
from moeplan.domain.result import Figures, PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.errors import CatalogueError, MoeplanError, PlanError
from moeplan.partition.footprint import check_memory
from moeplan.partition.legal import check_plan

_Cell = tuple[Mapping[str, object], Scenario | str]
"""The changes, and the scenario that they make or the reason why they make none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One changed scenario: its plan and figures, or the reason why there are none."""

    changes: Mapping[str, object]
    plan: Plan | None = None
    result: PlanResult | Figures | None = None
    """Figures alone, without a certificate, where a plan was kept and not sought."""
    error: str | None = None
    step_change: float | None = None
    """step_s over the base's step_s, minus 1: -0.2 is a fifth less."""

    @property
    def step_s(self) -> float | None:
        """Seconds of the step, if there is one."""
        return None if self.result is None else self.result.step_s

    @property
    def lower_bound_s(self) -> float | None:
        """No plan of this scenario is faster, if a plan was sought."""
        return self.result.lower_bound_s if isinstance(self.result, PlanResult) else None

    @property
    def gap(self) -> float | None:
        """How far from the best possible the plan can be, if a plan was sought."""
        return self.result.gap if isinstance(self.result, PlanResult) else None

    def record(self) -> dict[str, Any]:
        """The row in plain values, as a line of a table."""
        certificate = {"lower_bound_s": self.lower_bound_s, "gap": self.gap}
        short = None if self.plan is None else in_short(self.plan)
        figures = {"plan": short, "step_s": self.step_s, **certificate, "step_change": self.step_change}
        return {"changes": dict(self.changes), **figures, "error": self.error}


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """The scenario as it is, and each cell of a grid of changes."""

    base: Row
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """How the plan of each cell is sought."""

    planner: str
    time_limit_s: float | None
    gap: float | None
    progress: Progress | None

    def __post_init__(self) -> None:
        check_search(planner=self.planner, time_limit_s=self.time_limit_s, gap=self.gap)

    def __call__(self, scenario: Scenario, label: str) -> PlanResult:
        tell = self.progress
        told = None if tell is None else lambda message, done, total: tell(f"{label}: {message}", done, total)
        return plan(scenario, planner=self.planner, time_limit_s=self.time_limit_s, gap=self.gap, progress=told)


def sweep(
    scenario: Source,
    grid: Mapping[str, object],
    *,
    planner: str = "ours",
    time_limit_s: float | None = None,
    gap: float | None = None,
    progress: Progress | None = None,
) -> tuple[Row, ...]:
    """A row for each cell of `grid`, the last key varied fastest, each planned from scratch; see `what_if`."""
    search = _Search(planner=planner, time_limit_s=time_limit_s, gap=gap, progress=progress)
    cells = _cells(load(scenario), grid)
    return tuple(_row(changes, found, search) for changes, found in cells)


def what_if(
    scenario: Source,
    changes: Mapping[str, object],
    *,
    replan: bool = True,
    planner: str = "ours",
    time_limit_s: float | None = None,
    gap: float | None = None,
    progress: Progress | None = None,
) -> WhatIf:
    """What each cell of the grid over `changes` gives, against the scenario as it is.

    `{"nodes": [4, 8], "routing.skew": [0, 1]}` are four cells. With `replan` each is what planning that scenario from
    scratch gives (`time_limit_s` and `gap` are those of one plan); without it the base's plan is kept where it is still
    legal and fits. A cell without a plan says why and stops nothing. Raises CatalogueError if not one of the cells is a
    scenario, and without `replan` InfeasibleError if there is no plan to keep.
    """
    origin = load(scenario)
    cells = _cells(origin, changes)
    search = _Search(planner=planner, time_limit_s=time_limit_s, gap=gap, progress=progress)
    if not replan:
        kept = search(origin, "base")
        base = Row(changes={}, plan=kept.plan, result=kept)
        rows = [_row(each, found, lambda it, label: _kept(kept.plan, it)) for each, found in cells]
    else:
        base = _row({}, origin, search)
        rows = [_row(each, found, _remembering(search, origin, base)) for each, found in cells]
    return WhatIf(base=_compared(base, base), rows=tuple(_compared(row, base) for row in rows))


def _remembering(search: _Search, origin: Scenario, base: Row) -> Callable[[Scenario, str], PlanResult]:
    """`search`, but for a cell that changes nothing: its answer is known."""
    known = base.result

    def answer(scenario: Scenario, label: str) -> PlanResult:
        if scenario == origin and isinstance(known, PlanResult):
            return known.model_copy(update={"scenario": scenario.document})
        return search(scenario, label)

    return answer


def _cells(origin: Scenario, grid: Mapping[str, object]) -> list[_Cell]:
    """The changes of every cell, with the scenario that they make or the reason why they make none."""
    columns = {key: list(value) if isinstance(value, list | tuple | range) else [value] for key, value in grid.items()}
    for key, values in columns.items():
        if not values:
            raise CatalogueError(f"{key}: has no values to try; name one, or leave the key out")
    if not columns:
        raise CatalogueError("what if what? Name a change, such as nodes=4,8 or routing.skew=0,1")
    cells = [dict(zip(columns, values, strict=True)) for values in product(*columns.values())]
    found: list[_Cell] = [(changes, _changed(origin, changes)) for changes in cells]
    errors = [made for _, made in found if isinstance(made, str)]
    if len(errors) == len(found):
        raise CatalogueError(errors[0])
    return found


def _changed(origin: Scenario, changes: Mapping[str, object]) -> Scenario | str:
    try:
        return load(origin, {key: Given(value, f"what-if {key}") for key, value in changes.items()})
    except CatalogueError as error:
        return str(error)


def _row(
    changes: Mapping[str, object], found: Scenario | str, answer: Callable[[Scenario, str], PlanResult | Row]
) -> Row:
    if isinstance(found, str):
        return Row(changes=changes, error=found)
    label = ", ".join(f"{key}={value}" for key, value in changes.items()) or "base"
    try:
        made = answer(found, label)
    except MoeplanError as error:
        return Row(changes=changes, error=str(error))
    return (
        replace(made, changes=changes) if isinstance(made, Row) else Row(changes=changes, plan=made.plan, result=made)
    )


def _kept(plan: Plan, scenario: Scenario) -> Row:
    """The same plan in another scenario. Raises PlanError where it is not legal any more, or does not fit."""
    check_plan(plan, scenario)
    if problem := check_memory(plan, scenario):
        raise PlanError(f"plan: {problem}")
    return Row(changes={}, plan=plan, result=simulate(scenario, plan).figures)


def _compared(row: Row, base: Row) -> Row:
    if row.step_s is None or not base.step_s:
        return row
    return replace(row, step_change=row.step_s / base.step_s - 1)


def in_short(plan: Plan) -> str:
    """The plan on a line: `pp4 dp16 ep8 one_f_one_b mb1`, and what differs from the usual."""
    degrees = [f"{axis}{getattr(plan, axis)}" for axis in ("pp", "vpp", "dp", "tp", "cp", "ep", "etp")]
    shown = [text for text in degrees if text.startswith("dp") or text.strip("abcdefghijklmnopqrstuvwxyz") != "1"]
    zero = {f"z{plan.zero_dense}", f"z{plan.zero_expert}"} - {"z1"}
    extras = [
        f"z{plan.zero_dense}/{plan.zero_expert}" if zero else "",
        f"recompute-{plan.recompute}" if plan.recompute != "none" else "",
        plan.all_to_all if plan.all_to_all != "linear" else "",
        f"overlap{plan.overlap_degree}" if plan.overlap_degree > 1 else "",
        plan.arbitration if plan.arbitration != "fair" else "",
        plan.rank_order if plan.rank_order != "tp-cp-ep-dp-pp" else "",
    ]
    return " ".join([*shown, plan.schedule, f"mb{plan.micro_batch}", *filter(None, extras)])
