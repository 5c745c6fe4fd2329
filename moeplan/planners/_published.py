"""What published planners share: the layout that their frameworks run in, trials, and an honest certificate.

Such a planner decides little: the degree of overlap, the all-to-all, the degrees of the experts. All else is what its
framework runs by default, which `plainest` gives, so that ours and theirs differ in what was decided and nothing else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from heapq import heapify, heapreplace
from math import inf

import numpy as np

from moeplan import menu
from moeplan.domain.plan import Plan
from moeplan.domain.result import Evaluated, PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.errors import InfeasibleError
from moeplan.partition.footprint import filled_share
from moeplan.partition.legal import problems
from moeplan.partition.ranks import groups, ranks_of_stage
from moeplan.planners._report import result_of
from moeplan.planners._search import Search
from moeplan.planners._space import RANK_ORDERS, RECOMPUTE, Branch, Layout

_LOOKS = 300
"""Branches of the space that are bounded more closely than the rest."""


# ---- the certificate


def certified(search: Search, *, planner: str) -> PlanResult:
    """The best of the plans that were simulated. No plan of the space is faster than the least bound of its branches.

    The plans of a branch whose bound does not rule it out count as unresolved, all of them.
    """
    assert search.best is not None
    bounds = _bounds_s(search)
    search.front_s = bounds[0][0]
    tried, branches, step_s = len(search.tried), search.space.branches, search.best.step_s
    others = max(0, search.space.size - tried)
    left = min(others, sum(branches[number].size for bound_s, number, _ in bounds if bound_s < step_s))
    counts = Evaluated(
        legal=others + tried, infeasible_by_memory=0, bounded_out=others - left, simulated=tried, unresolved=left
    )
    return result_of(search, planner=planner).model_copy(update={"evaluated": counts})


def _bounds_s(search: Search) -> list[tuple[float, int, bool]]:
    """A bound of each branch, its number, and whether it was looked at closely, the least first.

    The least are looked at until the least of all has been, or the work is done.
    """
    bounds, branches = search.more.bounds, search.space.branches
    queue = [(float(bounds.pipeline_s(branch).min()), number, False) for number, branch in enumerate(branches)]
    heapify(queue)
    for _ in range(_LOOKS):
        bound_s, number, is_close = queue[0]
        if is_close:
            break
        closer_s = max(bound_s, float(search.anywhere_s(branches[number]).min()))
        heapreplace(queue, (closer_s, number, True))
    return queue


# ---- trials


@dataclass
class Trials:
    """Plans that a planner simulates to choose between them; `search.best` is the best of them."""

    search: Search
    started: float = field(default_factory=lambda: time.monotonic())
    known_s: dict[Plan, float] = field(default_factory=dict)

    def step_s(self, plan: Plan) -> float:
        """Simulated seconds of a step; inf for a plan that is not legal or does not fit, or when the time is over.

        The first plan is tried whatever the time.
        """
        if plan not in self.known_s:
            if self.is_over or not is_runnable(plan, self.search.scenario):
                return inf
            self.search.simulate(plan, self.search.plan_s(plan))
            self.known_s[plan] = self.search.tried[-1].step_s
        return self.known_s[plan]

    @property
    def is_over(self) -> bool:
        """Whether the time limit has passed and there is something to answer."""
        limit_s = self.search.time_limit_s
        return limit_s is not None and bool(self.known_s) and time.monotonic() - self.started > limit_s


def is_runnable(plan: Plan, scenario: Scenario) -> bool:
    """Whether a plan is legal and fits the memory."""
    return next(problems(plan, scenario), None) is None and filled_share(plan, scenario) <= 1


# ---- what the frameworks run by default


def plainest(search: Search, *, shards_experts: bool = False) -> Plan:
    """Data and expert parallelism alone, over as many GPUs as there are experts for, or what comes nearest and fits.

    Tensor, pipeline and context parallelism come in only where nothing fits without; all-to-alls are linear, nothing
    overlaps. Micro-batch, recomputation and ZeRO, which are the user's to set, are those of the least bound, so that
    nobody loses by them; with `shards_experts` experts have the highest ZeRO stage. Raises InfeasibleError if nothing
    fits.
    """
    for branch in sorted(search.space.branches, key=lambda each: _departs(each.layout)):
        sharded = replace(branch, zero_expert=(max(branch.zero_expert),)) if shards_experts else branch
        if (found := best_set(search, sharded)) is not None:
            return found
    raise InfeasibleError(f"{search.scenario.name}: no plan fits; use --planner ours to see what binds")


def _departs(layout: Layout) -> tuple[object, ...]:
    """Sorts layouts, the plainest first."""
    split = layout.tp * layout.pp * layout.cp * layout.etp
    way = (layout.etp, layout.cp, layout.tp, RANK_ORDERS.index(layout.rank_order))
    return (split, -layout.ep, *way, layout.vpp, layout.schedule != "one_f_one_b", layout.copies)


def best_set(search: Search, branch: Branch) -> Plan | None:
    """The plan of the least bound that fits, without overlap if that is allowed; None if not even the leanest fits."""
    space, scenario = search.space, search.scenario
    linear = "linear" if "linear" in branch.all_to_all else branch.all_to_all[0]
    plain = replace(
        branch, all_to_all=(linear,), overlap_degree=(min(branch.overlap_degree),), arbitration=branch.arbitration[:1]
    )
    if filled_share(space.plan(_leanest(plain), 0), scenario) > 1:
        return None
    order = np.argsort(search.once.branch_s(plain), axis=None, kind="stable").tolist()
    return next((found for at in order if filled_share(found := space.plan(plain, at), scenario) <= 1), None)


def _leanest(branch: Branch) -> Branch:
    """The one plan that should need least memory."""
    return replace(
        branch, micro_batch=(min(branch.micro_batch),), recompute=(max(branch.recompute, key=RECOMPUTE.index),),
        zero_dense=(max(branch.zero_dense),), zero_expert=(max(branch.zero_expert),),
    )  # fmt: skip


def is_alike(layout: Layout, plan: Plan) -> bool:
    """Whether a layout is a plan's but for the degrees of its experts and the order of its ranks."""
    names = ("dp", "tp", "cp", "pp", "vpp", "schedule", "stages")
    return all(getattr(layout, name) == getattr(plan, name) for name in names)


def degrees_of(scenario: Scenario, plan: Plan, published: tuple[int, ...]) -> tuple[int, ...]:
    """The degrees of overlap that a published planner may choose from, rising: `choose.overlap_degree`, or its own."""
    return tuple(sorted(scenario.choices.overlap_degree or published)) if plan.ep > 1 else (1,)


def algorithms_of(scenario: Scenario, plan: Plan, published: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a published planner's all-to-alls that are allowed and differ here; the plan's own if there are none."""
    allowed = scenario.choices.all_to_all
    members = ranks_of_stage(plan, 0)[groups(plan, ("ep",))]
    found = tuple(
        name for name in published
        if (allowed is None or name in allowed)
        and (name == "linear" or (plan.ep > 1 and menu.load("collectives", name, "applies")(members, scenario.cluster)))
    )  # fmt: skip
    return found or (plan.all_to_all,)
