"""Why this plan and not the runner-up: what decides the step, what would help most, and how firm the choice is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from moeplan import api, catalogue
from moeplan.api import Progress, Source, check_search, load
from moeplan.catalogue.files import is_path, read
from moeplan.cost.cost_model import CostModel
from moeplan.cost.critical import COMPUTING, PathPart, by_resource, critical_parts
from moeplan.domain.causes import breakdown_s
from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult, StageMemory
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError, PlanError
from moeplan.grid import Row, in_short, sweep
from moeplan.knobs import Knob, Steps, asking_for_another_plan, calibrated, worth_buying
from moeplan.partition.footprint import check_memory, footprint
from moeplan.partition.legal import check_plan, problems
from moeplan.units import show

_MOST_RIVALS = 3
_ALIKE = 1e-4
"""Of a step: nearer than any two runs of one plan."""
_ROUNDING = 1e-9
"""Plans whose times differ by less are equally fast."""
_WORTH_SAYING = 1e-6
"""Of the step: what less of it a cause costs is no reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """What a change of the scenario does to the step."""

    knob: Knob
    step_s: float | None
    """With the plan as it is; None for a change that only another plan can use."""
    step_change: float | None
    """step_s over that of the scenario as it is, minus 1: -0.03 is three per cent less."""
    replanned: Row | None
    """The same change planned anew, where that was asked for."""

    def anew(self, step_s: float) -> float | None:
        """What planning anew makes of a step of `step_s`, as a share of it; None where there is no such plan."""
        found = None if self.replanned is None else self.replanned.step_s
        return None if found is None else found / step_s - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """Another plan: what it decides otherwise, and its time by cause."""

    plan: Plan
    differences: Mapping[str, tuple[object, object]]
    """By field of the plan: ours and theirs."""
    step_s: float
    causes_s: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimit:
    """How full the fullest GPU is, and whether a faster plan is known that does not fit."""

    fullest: StageMemory
    too_big: Rival | None
    """Of the plans that do not fit the one with the least bound, if that is below the plan's step."""
    too_big_bytes: float | None
    """What its fullest GPU would need."""
    binds: bool | None
    """None: plans were left open, or do not fit and were passed over unbounded, so that nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """The plan and its best rival after a change of one calibrated constant."""

    knob: Knob
    step_s: float | None
    """None: the plan does not fit any more."""
    rival_step_s: float | None
    rival: Plan | None

    @property
    def lead(self) -> float | None:
        """The rival's time over the plan's, minus 1; None where one of the two is missing."""
        return self.rival_step_s / self.step_s - 1 if self.step_s and self.rival_step_s else None

    @property
    def is_beaten(self) -> bool:
        """Whether the choice would be another one."""
        return self.step_s is None or (self.lead or 0.0) < -_ROUNDING


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Why a plan is the plan."""

    scenario: Scenario
    plan: Plan
    step_s: float
    lower_bound_s: float | None
    """No plan of the space is faster; None where the scenario is not the one that was planned."""
    causes_s: Mapping[str, float]
    """As in a result's `breakdown_s`."""
    path: tuple[PathPart, ...]
    """The critical path, the largest part first; the seconds sum to `step_s`."""
    helps: tuple[Sensitivity, ...]
    """What would help most comes first."""
    memory: MemoryLimit
    runner_up: Rival | None
    """The fastest rival that fits and is not as fast for the same causes."""
    twins: int
    """Plans of the result that are as fast for the same causes: they differ in what does not matter here."""
    stability: tuple[Shift, ...]
    """Without rivals nothing but whether the plan still fits."""

    @property
    def bound_by(self) -> str:
        """What decides the step, in a sentence."""
        found = by_resource(self.path)
        if found.keys() <= set(COMPUTING):
            return "computation alone: no exchange is on the critical path"
        resource, seconds = next(iter(found.items()))
        return f"{resource}: {100 * seconds / self.step_s:.1f} % of the critical path"

    @property
    def why_it_lost(self) -> str:
        """What the runner-up's time goes into, and what it decides otherwise; or that there is none."""
        other = self.runner_up
        if other is None:
            return "no other plan is known that fits"
        more = {cause: seconds - self.causes_s[cause] for cause, seconds in other.causes_s.items()}
        most, least = max(more, key=more.__getitem__), min(more, key=more.__getitem__)
        change, words = other.step_s / self.step_s - 1, []
        if more[most] > _WORTH_SAYING * self.step_s:
            words.append(f"{show(more[most], 's')} more {in_words(most)}")
        if more[least] < -_WORTH_SAYING * self.step_s:
            words.append(f"{show(-more[least], 's')} less {in_words(least)}")
        head = "as fast" if abs(change) <= _ROUNDING else f"{100 * abs(change):.3g} % {_slower(change)}"
        return f"{head}: {' but '.join(words) or 'the same causes'}, with {_decided(other.differences)}"

    def document(self) -> dict[str, Any]:
        """What `explain --json` prints."""
        return {
            "schema": "moeplan.explanation/v1", "moeplan_version": version("moeplan"),
            "scenario": self.scenario.document, "plan": _dumped(self.plan), "step_s": self.step_s,
            "lower_bound_s": self.lower_bound_s, "bound_by": self.bound_by, "causes_s": dict(self.causes_s),
            "critical_path": [asdict(part) for part in self.path],
            "helps": [_help_document(each) for each in self.helps],
            "memory": {
                "fullest": self.memory.fullest.model_dump(mode="json"), "binds": self.memory.binds,
                "too_big": _rival_document(self.memory.too_big), "too_big_bytes": self.memory.too_big_bytes,
            },
            "runner_up": _rival_document(self.runner_up), "why_it_lost": self.why_it_lost, "twins": self.twins,
            "stability": [_shift_document(each) for each in self.stability],
        }  # fmt: skip


def explain(
    source: Source | PlanResult,
    plan: Plan | PlanResult | str | PathLike[str] | None = None,
    *,
    replan: bool = False,
    planner: str = "ours",
    time_limit_s: float | None = None,
    gap: float | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Why the plan of a result, or of a scenario, is the plan, and what would change that.

    `source` is a result, its file, or a scenario; `plan` a plan in its place. Rivals are those of the result; where
    there is none the scenario is planned. With `replan` every change that may help is planned anew as well, and so are
    more memory and more nodes; `planner`, `time_limit_s` and `gap` are for each of these plans. A change is made as
    `load` makes it, and the step simulated again: `+10 %` is a finite difference and no derivative. Raises
    CatalogueError, PlanError if the plan is not legal in the scenario, InfeasibleError if no plan fits.
    """
    check_search(planner=planner, time_limit_s=time_limit_s, gap=gap)
    scenario, given, known = _asked(source, plan)
    if known is not None and not replan and (planner, time_limit_s, gap) != ("ours", None, None):
        raise MoeplanError("planner, time limit and gap have no effect on a result; add replan, or leave them out")
    search: dict[str, Any] = {"planner": planner, "time_limit_s": time_limit_s, "gap": gap, "progress": progress}
    result = known or api.plan(scenario, **search)
    chosen = given or result.plan
    steps = Steps(scenario)
    timeline = steps.timeline(chosen)
    field = _Field.of(steps, chosen, timeline, result)
    replanned = (lambda knob: _replanned(scenario, knob, search)) if replan else None
    is_same = dict(result.scenario) == dict(scenario.document)
    return Explanation(
        scenario=scenario,
        plan=chosen,
        step_s=timeline.step_s,
        lower_bound_s=result.lower_bound_s if is_same else None,
        causes_s=breakdown_s(timeline),
        path=critical_parts(timeline, CostModel(gpu=scenario.cluster.gpu)),
        helps=_helps(steps, chosen, timeline.step_s, replanned, progress),
        memory=field.memory(result if is_same else None),
        runner_up=min(field.rivals, key=lambda rival: rival.step_s, default=None),
        twins=field.twins,
        stability=tuple(field.shifts(progress)),
    )


def _asked(
    source: Source | PlanResult, plan: Plan | PlanResult | str | PathLike[str] | None
) -> tuple[Scenario, Plan | None, PlanResult | None]:
    """The scenario; the plan to explain, if one is given; and the result that it comes from, if there is one."""
    scenario = load(source.scenario if isinstance(source, PlanResult) else source)
    held = source if plan is None else plan
    if isinstance(held, str | PathLike) and (plan is not None or held_plan(held)):
        known = catalogue.read_result(fspath(held))
        chosen = known.plan if known else catalogue.read_plan(fspath(held))
        _check(chosen, scenario, f"{fspath(held)}: ")
        return scenario, chosen, known
    if not isinstance(held, Plan | PlanResult):
        return scenario, None, None
    chosen = held if isinstance(held, Plan) else held.plan
    _check(chosen, scenario, "")
    return scenario, chosen, None if isinstance(held, Plan) else held


def held_plan(source: str | PathLike[str]) -> Path | None:
    """The file that `source` names, if there is a plan in it beside the scenario."""
    is_file = not isinstance(source, str) or is_path(source)
    return Path(source) if is_file and "plan" in read(Path(source)).data else None


def _check(plan: Plan, scenario: Scenario, where: str) -> None:
    try:
        check_plan(plan, scenario)
    except PlanError as error:
        raise PlanError(f"{where}{error}") from None
    if problem := check_memory(plan, scenario):
        raise PlanError(f"{where}plan: {problem}")


# ---- what would help


def _helps(
    steps: Steps,
    plan: Plan,
    step_s: float,
    replanned: Callable[[Knob], Row] | None,
    progress: Progress | None,
) -> tuple[Sensitivity, ...]:
    knobs, found = worth_buying(steps.scenario), []
    for number, knob in enumerate(knobs):
        if progress is not None:
            progress(f"{knob.name} {knob.change}", number, len(knobs))
        changed_s = steps.changed_s(plan, load(steps.scenario, knob.changes).cluster)
        again = None if replanned is None else replanned(knob)
        change = changed_s / step_s - 1
        found.append(Sensitivity(knob=knob, step_s=changed_s, step_change=change, replanned=again))
    found.sort(key=lambda each: each.step_change or 0.0)
    if replanned is None:
        return tuple(found)
    others = asking_for_another_plan(steps.scenario)
    return *found, *(Sensitivity(knob=k, step_s=None, step_change=None, replanned=replanned(k)) for k in others)


def _replanned(scenario: Scenario, knob: Knob, search: Mapping[str, Any]) -> Row:
    """The changed scenario planned from scratch, or why it has no plan."""
    (row,) = sweep(scenario, {key: [value] for key, value in knob.changes.items()}, **search)
    return row


# ---- the rivals


@dataclass(frozen=True, kw_only=True, slots=True)
class _Field:
    """The plan and those that it was chosen from."""

    steps: Steps
    ours: Rival
    rivals: tuple[Rival, ...]
    too_big: Rival | None
    twins: int

    @classmethod
    def of(cls, steps: Steps, plan: Plan, timeline: Timeline, result: PlanResult) -> _Field:
        """The first rivals of a result, each unlike the plan and the others, and the first that does not fit."""
        scenario = steps.scenario
        ours = _rival(plan, plan, timeline)
        found, too_big, twins = list[Rival](), None, 0
        for other in dict.fromkeys([result.plan, *(each.plan for each in result.runners_up)]):
            if other == plan or next(problems(other, scenario), None) is not None:
                continue
            fits = check_memory(other, scenario) is None
            if len(found) >= _MOST_RIVALS if fits else too_big is not None:
                continue
            rival = _rival(other, plan, steps.timeline(other))
            if not fits:
                too_big = rival
            elif _alike(rival, ours):
                twins += 1
            elif not any(_alike(rival, each) for each in found):
                found.append(rival)
        return cls(steps=steps, ours=ours, rivals=tuple(found), too_big=too_big, twins=twins)

    def memory(self, result: PlanResult | None) -> MemoryLimit:
        """Whether memory binds. `result`: of this scenario, and so what its counts say holds."""
        fullest = max(footprint(self.ours.plan, self.steps.scenario), key=lambda stage: stage.total)
        is_faster = self.too_big is not None and self.too_big.step_s < self.ours.step_s * (1 - _ROUNDING)
        counts = result.evaluated if result is not None and result.plan == self.ours.plan else None
        all_fit = counts is not None and counts.infeasible_by_memory == counts.unresolved == 0
        binds = True if is_faster else False if all_fit else None
        needs = None if self.too_big is None else _peak_bytes(self.too_big.plan, self.steps.scenario)
        return MemoryLimit(fullest=fullest, too_big=self.too_big, too_big_bytes=needs, binds=binds)

    def shifts(self, progress: Progress | None) -> Iterator[Shift]:
        """The plan against its rivals under each change of a calibrated constant."""
        knobs = calibrated(self.steps.scenario)
        for number, knob in enumerate(knobs):
            if progress is not None:
                progress(f"{knob.name} {knob.change}", number, len(knobs))
            yield self._shift(knob)

    def _shift(self, knob: Knob) -> Shift:
        changed = load(self.steps.scenario, knob.changes)
        others = [rival.plan for rival in chain(self.rivals, [self.too_big] if self.too_big else [])]
        steps = {
            plan: self.steps.changed_s(plan, changed.cluster)
            for plan in (self.ours.plan, *others)
            if check_memory(plan, changed) is None
        }
        step_s = steps.pop(self.ours.plan, None)
        best = min(steps, key=steps.__getitem__, default=None)
        return Shift(knob=knob, step_s=step_s, rival_step_s=None if best is None else steps[best], rival=best)


def _peak_bytes(plan: Plan, scenario: Scenario) -> float:
    return max(stage.total for stage in footprint(plan, scenario))


def _rival(plan: Plan, ours: Plan, timeline: Timeline) -> Rival:
    mine, theirs = (_dumped(each) for each in (ours, plan))
    differences = {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}
    return Rival(plan=plan, differences=differences, step_s=timeline.step_s, causes_s=breakdown_s(timeline))


def _alike(one: Rival, other: Rival) -> bool:
    """Whether both take the same time for the same causes."""
    slack = _ALIKE * other.step_s
    return all(abs(seconds - other.causes_s[cause]) <= slack for cause, seconds in one.causes_s.items())


def in_words(cause: str) -> str:
    """The cause as a person writes it."""
    return cause.replace("_", " ").replace("all to all", "all-to-all")


def _slower(change: float) -> str:
    return "slower" if change > 0 else "faster"


def _decided(differences: Mapping[str, tuple[object, object]]) -> str:
    whole = {key for key, pair in differences.items() if any(isinstance(each, dict) for each in pair)}
    words = {key: f"{key} {theirs} instead of {ours}" for key, (ours, theirs) in differences.items()}
    return ", ".join(f"another {key}" if key in whole else words[key] for key in differences)


# ---- documents


def _dumped(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json", by_alias=True)


def _rival_document(rival: Rival | None) -> dict[str, Any] | None:
    if rival is None:
        return None
    differences = {key: {"plan": ours, "other": theirs} for key, (ours, theirs) in rival.differences.items()}
    plan = {"plan": _dumped(rival.plan), "in_short": in_short(rival.plan), "differences": differences}
    return plan | {"step_s": rival.step_s, "causes_s": dict(rival.causes_s)}


def _help_document(each: Sensitivity) -> dict[str, Any]:
    replanned = None if each.replanned is None else each.replanned.record()
    return asdict(each.knob) | {"step_s": each.step_s, "step_change": each.step_change, "replanned": replanned}


def _shift_document(each: Shift) -> dict[str, Any]:
    figures = {"step_s": each.step_s, "rival_step_s": each.rival_step_s, "is_beaten": each.is_beaten}
    return asdict(each.knob) | figures | {"rival": None if each.rival is None else in_short(each.rival)}
