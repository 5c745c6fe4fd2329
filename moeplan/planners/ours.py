"""Every legal plan, best bound first, each with the placement of experts that suits it: the default.

As `exhaustive` searches, but where routing is uneven a bound holds wherever experts stand, in blocks or not, with
replicas as far as memory goes, and a plan is simulated once its experts are placed: in blocks, each once and evened
out, or with a slot to spare on each place. So the certificate covers the whole choice: no plan of the space is faster
than `lower_bound_s`, whatever its placement. A placed plan is not proven to be placed best: its own bound stays in the
certificate.
"""

from __future__ import annotations

from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.planners._report import result_of
from moeplan.planners._search import Progress, Search
from moeplan.planners._space import Space

IS_EXACT = False


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The best plan found, with a lower bound of all plans and placements, and what became of the others.

    Stops when the front of the search is within `gap` of the best, after `time_limit_s` seconds, or with neither after
    a fixed amount of work. Raises InfeasibleError if no plan fits.
    """
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress, places=True)
    search.run()
    return result_of(search, planner="ours")
