"""The verbs of the package: a scenario is loaded and planned, a plan is simulated, what came out is exported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from moeplan import catalogue, menu
from moeplan.accuracy.intervals import belief_of
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.causes import breakdown_s
from moeplan.domain.placement import ExpertMap
from moeplan.domain.plan import Plan
from moeplan.domain.result import Figures, PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError, PlanError
from moeplan.partition.footprint import footprint
from moeplan.partition.legal import check_plan
from moeplan.simulator import simulate as simulator
from moeplan.simulator.noise import Noise

if TYPE_CHECKING:
    from moeplan.placing import Placing

Progress = Callable[[str, float, float | None], None]
"""Is told a message, how much is done, and of how much in all (None: nobody knows)."""
Source = Scenario | str | PathLike[str] | Mapping[str, Any]
"""A scenario, its name, the path of its file or of a result's, or its resolved document."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Simulation:
    """One step of one plan in virtual time."""

    scenario: Scenario
    plan: Plan
    timeline: Timeline
    figures: Figures
    noise: Noise | None


Exported: TypeAlias = "Simulation | Timeline | Plan | PlanResult | Placing | ExpertMap"


def load(source: Source, changes: Mapping[str, object] = MappingProxyType({})) -> Scenario:
    """The scenario that `source` means, after `changes`: `{"nodes": 4, "cluster.nic.bandwidth": "25 GB/s"}`.

    A change may replace the whole model or cluster, and others then change what took its place. Raises CatalogueError.
    """
    given = source.document if isinstance(source, Scenario) else source
    if isinstance(source, Scenario) and not changes:
        return source
    origin = given if isinstance(given, str | Mapping) else fspath(given)
    wholes = changes.keys() & {"model", "cluster"}
    inner = {key: value for key, value in changes.items() if key not in wholes and _section(key) in wholes}
    if inner:
        origin = catalogue.document(origin, {key: value for key, value in changes.items() if key not in inner})
        changes = inner
    return catalogue.load(origin, changes=changes)


def _section(key: str) -> str:
    return "cluster" if key == "nodes" else key.partition(".")[0]


def plan(
    scenario: Source,
    *,
    planner: str = "ours",
    time_limit_s: float | None = None,
    gap: float | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """The best plan that the planner finds, with its certificate: no plan is faster than `lower_bound_s`.

    The planner stops when the plan is proven within `gap` of the best (0.01: one per cent; 0: proven best), or when
    the time is over; with neither, when it is proven best or a fixed amount of work is done. Raises CatalogueError,
    and InfeasibleError if no plan fits.
    """
    check_search(planner=planner, time_limit_s=time_limit_s, gap=gap)
    run = menu.load("planners", planner, "plan")
    problem = load(scenario)
    found: PlanResult = run(problem, time_limit_s=time_limit_s, gap=gap, progress=progress)
    belief = belief_of(found.step_s, problem, found.plan.precision.compute)
    return found.model_copy(update={"step_interval_s": (belief.low_s, belief.high_s), "tier": belief.tier})


def check_search(*, planner: str, time_limit_s: float | None, gap: float | None) -> None:
    """Raises MoeplanError for a planner that is not on the menu, a time limit without time and a gap below 0."""
    if gap is not None and not 0 <= gap < float("inf"):
        raise MoeplanError(f"gap: {gap} is no share of the step; use 0 (proven best) or more, such as 0.01")
    if time_limit_s is not None and not 0 < time_limit_s < float("inf"):
        raise MoeplanError(f"time limit: {time_limit_s} s is no time; use more than 0, such as 60")
    menu.module("planners", planner)


def simulate(
    scenario: Source, plan: Plan | PlanResult | str | PathLike[str], *, noise: Noise | None = None
) -> Simulation:
    """One step of `plan` in virtual time; `plan` may be the path of a plan's or a result's file.

    Whether the plan fits in memory is told in `figures.memory`, and not asked here. Raises PlanError if it is illegal,
    with the name of its file.
    """
    problem, chosen = load(scenario), plan_of(plan)
    try:
        program = compile_plan(chosen, problem)
    except PlanError as error:
        if isinstance(plan, Plan | PlanResult):
            raise
        raise PlanError(f"{fspath(plan)}: {error}") from None
    timeline = simulator.simulate(program, CostModel(gpu=problem.cluster.gpu), noise=noise)
    figures = _figures(timeline, chosen, problem)
    return Simulation(scenario=problem, plan=chosen, timeline=timeline, figures=figures, noise=noise)


def plan_of(plan: Plan | PlanResult | str | PathLike[str]) -> Plan:
    """The plan itself, out of a result or a file. Raises MoeplanError for a file that holds none."""
    if isinstance(plan, PlanResult):
        return plan.plan
    return plan if isinstance(plan, Plan) else catalogue.read_plan(fspath(plan))


def _figures(timeline: Timeline, plan: Plan, scenario: Scenario) -> Figures:
    memory = footprint(plan, scenario)
    belief = belief_of(timeline.step_s, scenario, plan.precision.compute)
    return Figures(
        step_s=timeline.step_s,
        step_interval_s=(belief.low_s, belief.high_s),
        tier=belief.tier,
        mfu=timeline.mfu(scenario.cluster.gpu.peak_flops_per_s[plan.precision.compute]),
        tokens_per_s_per_gpu=timeline.tokens_per_s_per_gpu,
        peak_memory_bytes=max(stage.total for stage in memory),
        breakdown_s=breakdown_s(timeline),
        memory=memory,
    )


def export(
    result: Exported,
    path: str | PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word that a user looks for
    **options: Any,
) -> None:
    """A file at `path` of what `result` holds, written whole or not at all by one dish of the exporters' menu.

    Without a `format` the suffix of `path` chooses it. Raises MoeplanError if several formats, or none, have that
    suffix, and where the path cannot be written.
    """
    name = format or _format_of(path, result)
    dish = menu.load("exporters", name, "export")
    noun = noun_of(name)
    if (what := _nouns(result).get(noun)) is None:
        remedy = "place experts (`moeplan place --plan`)" if noun == "placing" else f"give it a {noun}"
        raise MoeplanError(f"format {name!r} exports a {noun}, not a {type(result).__name__}; {remedy}")
    dish(what, fspath(path), **options)


def noun_of(format_name: str) -> str:
    """What a dish of the exporters' menu writes down: timeline, plan, simulation, result or placing."""
    return next(iter(inspect.signature(menu.load("exporters", format_name, "export")).parameters))


def expert_map(scenario: Source, plan: Plan | PlanResult | str | PathLike[str]) -> ExpertMap:
    """Where a placed plan has its experts, as engines load it. Raises PlanError if it is illegal, or not placed."""
    problem, chosen = load(scenario), plan_of(plan)
    check_plan(chosen, problem)
    if chosen.placement is None:
        raise PlanError("plan: has no placement of experts; place them with `moeplan place --plan`")
    layers = problem.model.all_layers
    numbers = [number for number, layer in enumerate(layers) if layer.is_moe]
    return ExpertMap.of(chosen.placement, numbers=numbers, num_layers=len(layers), num_gpus=chosen.ep)


def _nouns(result: Exported) -> dict[str, object]:
    """What can be exported of a result, by the name that a dish's first argument has."""
    if isinstance(result, Simulation):
        placing = {} if result.plan.placement is None else {"placing": expert_map(result.scenario, result.plan)}
        return {"timeline": result.timeline, "plan": result.plan, "simulation": result, **placing}
    if isinstance(result, ExpertMap):
        return {"placing": result}
    if placed := getattr(result, "expert_map", None):
        return {"placing": placed()}
    if isinstance(result, PlanResult):
        return {"plan": result.plan, "result": result}
    return {"timeline" if isinstance(result, Timeline) else "plan": result}


def _format_of(path: str | PathLike[str], result: Exported) -> str:
    nouns, suffixes = _nouns(result), {}
    for name in menu.names("exporters"):
        if noun_of(name) in nouns:
            suffixes[name] = menu.module("exporters", name).SUFFIXES
    fitting = [name for name, known in suffixes.items() if fspath(path).lower().endswith(known)]
    if len(fitting) == 1:
        return fitting[0]
    can = " and ".join(filter(None, (", ".join(fitting[:-1]), *fitting[-1:]))) or "no format"
    raise MoeplanError(f"{fspath(path)}: {can} can write this; say which format it shall be: {', '.join(suffixes)}")
