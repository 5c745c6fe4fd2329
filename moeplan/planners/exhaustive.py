"""Every legal plan with experts in blocks, best bound first: bound, simulate, stop when no bound is better than the
best step found.

Branches of plans wait in one queue by their lower bound. The branch with the lowest is opened and gives up its plans,
the one with the lowest bound first; a plan that fits the memory gets a closer bound, goes back, and is simulated when
it comes to the front again. When the front is no better than the best plan found, that plan is proven best: nothing
behind the front can be better. Reference: Lawler, Wood, "Branch-and-bound methods: a survey", Operations Research 14,
1966.
"""

from __future__ import annotations

from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.planners._report import result_of
from moeplan.planners._search import Progress, Search
from moeplan.planners._space import Space

IN_BLOCKS = True
"""Its space, and its certificate, is of plans without a placement."""


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The best plan, with its lower bound and what became of all the others.

    Stops when the best found is proven within `gap` (a share; 0: proven best), or after `time_limit_s` seconds. With
    neither it stops when the plan is proven best or a fixed number of tasks has been simulated, so that the answer
    does not depend on the machine. Raises InfeasibleError if no plan fits.
    """
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress)
    search.run()
    return result_of(search, planner="exhaustive")
