"""SmartMoE: a pool of layouts chosen for the load that is expected, then experts put on GPUs greedily.

Offline, skeletons (data, tensor, pipeline and expert parallelism) are scored by a model that knows how uneven the load
is: experts take as long as the fullest GPU needs. A pool is a skeleton with every assignment of experts to its equal
slots, since these can be turned into one another at little cost; so a skeleton is scored at what its best assignment
could reach, here the lower bound of any placement without replicas. Online, experts go heaviest first to the lightest
GPU with a free slot, where that lowers the fullest one. The skeletons of the best scores are simulated, each with its
experts so placed, and the fastest is kept.

All else is what the framework runs by default: 1F1B, all-to-alls that are linear, nothing overlapped, neither
replicas nor sliced experts. Not carried over: a mapping that changes while training goes on (`moeplan place
--routing-trace` replays that), since one step is planned, with the load that the scenario states.
Reference: Zhai and others, "SmartMoE: Efficiently training sparsely-activated models through combining offline and
online parallelization", USENIX ATC 2023, sections 4 and 5.
"""

from __future__ import annotations

from moeplan.domain.placement import Placement, PlacementProblem
from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.partition.route import Tokens, load_of
from moeplan.placers._layers import place_layers
from moeplan.planners._published import Trials, best_set, certified, is_runnable, plainest
from moeplan.planners._search import Progress, Search
from moeplan.planners._space import Branch, Layout, Space

IS_EXACT = False
_SCORED, _POOLS = 60, 6
"""Skeletons that are scored, and that are simulated."""
_TIME_LIMIT_S = 10.0
"""Of one layer; the greedy rule needs a thousandth of it."""


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The fastest of the pools with the best scores, its experts placed greedily, simulated.

    `gap` changes nothing; when the time is over the best pool tried so far is kept. Raises InfeasibleError if nothing
    fits.
    """
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress)
    trials = Trials(search)
    for skeleton in pools(search) or [plainest(search)]:
        chosen = placed(skeleton, scenario)
        trials.step_s(chosen if is_runnable(chosen, scenario) else skeleton)
    return certified(search, planner="smartmoe")


def pools(search: Search) -> list[Plan]:
    """The plans of the best scores, each with the micro-batch, recomputation and ZeRO of the least bound that fits."""
    scored: list[tuple[float, int, Plan]] = []
    for number, branch in enumerate(_skeletons(search)):
        if len(scored) == _SCORED:
            break
        if (found := best_set(search, branch)) is not None:
            scored.append((search.once.plan_s(found), number, found))
    return [found for _, _, found in sorted(scored, key=lambda each: each[:2])[:_POOLS]]


def _skeletons(search: Search) -> list[Branch]:
    """The plainest of what is left open beside the degrees (1F1B, whole experts, no context parallelism), the fastest
    pipeline first.
    """
    branches = search.space.branches
    least = min(_plainness(branch.layout) for branch in branches)
    chosen = [branch for branch in branches if _plainness(branch.layout) == least]
    return sorted(chosen, key=lambda branch: float(search.once.bounds.pipeline_s(branch).min()))


def _plainness(layout: Layout) -> tuple[object, ...]:
    return (layout.cp, layout.etp, layout.copies, layout.vpp, layout.schedule != "one_f_one_b", layout.schedule)


def placed(plan: Plan, scenario: Scenario) -> Plan:
    """The plan with each layer's experts placed greedily; as it was where nothing is uneven."""
    load = load_of(scenario, plan, rank_tokens=Tokens.of(plan, scenario.workload).rank)
    if load is None or load.is_even or plan.ep == 1:
        return plan
    tables = [table.sum(axis=0) for table in load.tokens_SE_by_layer]
    problems = [PlacementProblem(tokens_SE=each, num_gpus=plan.ep, slots=each.size) for each in tables]
    layers = place_layers(
        problems, range(len(problems)), placer="smartmoe_greedy", seed=0, time_limit_s=_TIME_LIMIT_S
    )  # fmt: skip
    placement = Placement.of([each.placement for each in layers], num_places=plan.ep)
    return plan if placement.is_in_order else plan.model_copy(update={"placement": placement})
