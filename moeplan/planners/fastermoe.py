"""FasterMoE: experts overlap with an exchange that goes from one group of GPUs to the next.

Its smart schedule divides the workers into n groups that are near each other, here the nodes, or four GPUs of one node
(the size that its code takes unless told); step j exchanges tokens with the group j away, and experts compute on what
came while the next step is on its way. A plan cuts the tokens of every exchange into parts instead. So that this costs
FasterMoE nothing, the schedule's size, which it leaves to the user, is tried: every power of two up to n parts, with
`grouped_pairwise` where there are several nodes, simulated; the fastest is taken, or none if the schedule slows down.

Not carried over: shadowed experts, since no planner looks for placements yet (the placers `shadow_paper` and
`shadow_code` have both published rules), and the gate that keeps tokens near. All else is what the framework runs by
default: data and expert parallelism alone.
Reference: He et al., "FasterMoE: Modeling and optimizing training of large-scale dynamic pre-trained models"
(PPoPP 2022), sections 4.2 and 5; the FastMoE repository for the size of groups.
"""

from __future__ import annotations

from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.partition.ranks import groups, ranks_of_stage
from moeplan.planners._published import Trials, algorithms_of, certified, degrees_of, plainest
from moeplan.planners._search import Progress, Search
from moeplan.planners._space import Space

IS_EXACT = False
_GROUP = 4
"""Workers of a group inside one node."""


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The framework's layout with the fastest of FasterMoE's schedules, simulated.

    `gap` changes nothing; when the time is over the best schedule tried so far is kept. Raises InfeasibleError if
    nothing fits.
    """
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress)
    plain, trials = plainest(search), Trials(search)
    trials.step_s(plain)
    algorithm = algorithms_of(scenario, plain, ("grouped_pairwise",))[0]
    for degree in degrees(scenario, plain):
        trials.step_s(plain.model_copy(update={"overlap_degree": degree, "all_to_all": algorithm}))
    return certified(search, planner="fastermoe")


def degrees(scenario: Scenario, plan: Plan) -> tuple[int, ...]:
    """The parts that are tried: powers of two, or `choose.overlap_degree`, up to the number of groups."""
    allowed, most = degrees_of(scenario, plan, (1, 2, 4, 8, 16, 32, 64)), num_groups(scenario, plan)
    return tuple(degree for degree in allowed if degree <= most) or allowed[:1]


def num_groups(scenario: Scenario, plan: Plan) -> int:
    """Groups of workers of an expert-parallel group: its nodes, or fours of its GPUs in one node; 64 at most."""
    members = ranks_of_stage(plan, 0)[groups(plan, ("ep",))][0]
    nodes = len(set((members // scenario.cluster.gpus_per_node).tolist()))
    return min(64, nodes if nodes > 1 else max(1, plan.ep // _GROUP))
