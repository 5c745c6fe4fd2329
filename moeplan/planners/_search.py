"""Best bound first: the queue of branches and plans, and what has been learned of each plan."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

import numpy as np

from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.causes import breakdown_s
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats
from moeplan.domain.timeline import Timeline
from moeplan.errors import InfeasibleError
from moeplan.partition import footprint
from moeplan.planners._bounds import Bounds
from moeplan.planners._filled import Filled
from moeplan.planners._places import best_placed, is_open
from moeplan.planners._queue import Entry, Flags, Later, Opened, Row, Weighed
from moeplan.planners._space import Branch, Space, no_layout, row_of
from moeplan.planners._step import StepBounds
from moeplan.simulator.simulate import simulate

Progress = Callable[[str, float, float], None]
_PATIENCE = 5
"""Times the time limit that the search goes on for as long as it has no plan at all."""
_ROUNDING = 1e-9
"""Bounds and simulation add the same numbers in another order."""
EFFORT_TASKS, EFFORT_PLANS = 100_000, 8
"""Without a time limit or a gap to reach, the search ends when so many tasks of so many plans have been simulated: an
amount of work, not of time, so that the answer is the same anywhere."""
EFFORT_MOST = 2_500_000
"""Tasks that are enough of any number of plans: ten seconds or so of a processor."""
EFFORT_LOOK = 5_000
"""Tasks that could be simulated while a plan is looked at layer by layer, as uneven routing asks for."""
_SELDOM: dict[str, object] = {"arbitration": "fair"}
_OFTEN: dict[str, object] = _SELDOM | {"zero_dense": 0, "zero_expert": 0}
_FAR = 0.1
"""Plans that differ in ZeRO from one that is farther from the best are left for later."""
_LOOSE = 1.3
"""Where steps are farther above their bounds these do not tell one plan from another."""
_UNFIT = 20
"""Branches in which the fastest plan that does not fit is looked for."""
KEPT = 64
"""Plans with a closer bound that are remembered as runners-up."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A simulated plan."""

    plan: Plan
    bound_s: float
    step_s: float
    mfu: float
    tokens_per_s_per_gpu: float
    causes_s: dict[str, float]


@dataclass
class Search:
    """One run of the search. `best` is the best plan found, `lower_bound_s` a bound of all that is left
    and found.
    """

    space: Space
    gap: float | None
    time_limit_s: float | None
    progress: Progress | None
    places: bool = False
    """Experts are placed, plan by plan, where routing is uneven; else they stand in blocks."""
    best: Tried | None = None
    tried: list[Tried] = field(default_factory=list)
    bounded: list[tuple[float, Plan]] = field(default_factory=list)
    infeasible: int = 0
    too_big: tuple[float, Plan] | None = None
    """Of the plans that do not fit the one with the lowest bound."""
    smallest: tuple[float, Plan] | None = None
    """Share of the usable memory, and the plan that needs least."""
    front_s: float = 0.0
    placed_s: float = np.inf
    """The least bound of the plans whose experts were placed: they might stand better still."""
    proven: bool = False
    simulated_tasks: int = 0
    looked_at: int = 0
    _queue: list[Entry] = field(default_factory=list)
    _later: Later = field(default_factory=Later)
    _over: dict[tuple[object, ...], float] = field(default_factory=dict)
    """By how much the steps of plans of one family are over their bounds, at least."""
    _unfit: list[tuple[float, int, Weighed]] = field(default_factory=list)
    """Branches with plans that do not fit, by the least that a pipeline of those takes."""
    _known_s: dict[Plan, float] = field(default_factory=dict)
    """The least step of plans that differ little, by what they have in common."""
    _count: int = 0

    def __post_init__(self) -> None:
        if not self.space.branches:
            raise InfeasibleError(no_layout(self.space.scenario))
        self.scenario, self.filled = self.space.scenario, Filled(self.space)
        self.exact = StepBounds(Bounds(self.scenario))
        """Of experts in blocks."""
        is_even = self.exact.bounds.prices.is_even
        self.places = self.places and not is_even
        self.once = self.exact if is_even else StepBounds(Bounds(self.scenario, coarse=True, replicas=False))
        """Wherever they stand, each once."""
        self.more = self.exact if is_even else StepBounds(Bounds(self.scenario, coarse=True))
        """Wherever they stand, with at least one slot to spare on each place."""
        self.cost_model = CostModel(gpu=self.scenario.cluster.gpu)

    @property
    def lower_bound_s(self) -> float:
        """No plan of the space is faster."""
        assert self.best is not None
        return min(self.front_s, self.placed_s, self.best.step_s)

    def run(self) -> None:
        """Until the best plan is proven, the time is over, or nothing is left. Raises InfeasibleError if nothing
        fits.
        """
        started = time.monotonic()
        self._bound_branches()
        while self._queue or self._later:
            ahead = self._queue and (not self._later or not self._is_enough(self._queue[0].bound_s))
            self.front_s = min(inf if not self._queue else self._queue[0].bound_s, self._later.least_s)
            if self._is_enough(self.front_s) or self._is_over(started):
                break
            if ahead:
                self._advance(heapq.heappop(self._queue))
            else:
                self.simulate(*self._later.pop())
        else:
            self.front_s = np.inf
        if self.best is None:
            raise InfeasibleError(no_time(self) if self._queue else nothing_fits(self))
        if not self._is_late(started):
            self._polish()
        self._find_too_big()
        self.proven = self.lower_bound_s >= self.best.step_s * (1 - _ROUNDING)

    def unresolved(self) -> int:
        """Plans that were not simulated and may be faster than the best found: all of a branch that was not opened."""
        assert self.best is not None
        best_s = self.best.step_s * (1 - _ROUNDING)
        total = sum(bound_s < best_s for _, bound_s in self._later)
        for entry in self._queue:
            if entry.bound_s < best_s:
                if isinstance(entry.what, Branch):
                    total += entry.what.size
                elif isinstance(entry.what, Weighed):
                    total += int(entry.what.fits.sum()) * len(entry.what.branch.arbitration)
                elif isinstance(entry.what, Opened | Row):
                    total += entry.what.num_below(best_s)
        return total

    def _is_enough(self, bound_s: float) -> bool:
        """Whether no plan with this bound need be looked at."""
        return self.best is not None and bound_s >= self.best.step_s / (1 + (self.gap or 0.0)) * (1 - _ROUNDING)

    def _is_over(self, started: float) -> bool:
        if self.time_limit_s is not None:
            return self._is_late(started)
        looks_closely = self.exact is not self.once and not self.places
        work = self.simulated_tasks + (self.looked_at * EFFORT_LOOK if looks_closely else 0)
        is_enough = work >= EFFORT_TASKS and len(self.tried) >= EFFORT_PLANS
        return self.gap is None and (is_enough or self.simulated_tasks >= EFFORT_MOST)

    def _is_late(self, started: float) -> bool:
        limit_s = inf if self.time_limit_s is None else self.time_limit_s * (1 if self.best else _PATIENCE)
        return time.monotonic() - started > limit_s

    def _bound_branches(self) -> None:
        branches = self.space.branches
        for number, branch in enumerate(branches):
            if self.progress is not None and number % 500 == 0:
                self.progress("bounding layouts", number, len(branches))
            self._push(self._glance.bounds.floor_s(branch), 0, branch)

    def _push(self, bound_s: float, rank: int, what: object) -> None:
        self._count += 1
        heapq.heappush(self._queue, Entry(bound_s, self._count, rank, what))

    def _advance(self, entry: Entry) -> None:
        what, bound_s = entry.what, entry.bound_s
        if isinstance(what, Branch) and entry.rank == 0:
            self._push(max(bound_s, float(self._glance.bounds.pipeline_s(what).min())), 1, what)
        elif isinstance(what, Branch):
            self._weigh(what, bound_s)
        elif isinstance(what, Weighed):
            self._open(what)
        elif isinstance(what, Opened):
            self._next_row(what)
        elif isinstance(what, Row):
            self._next_plans(what)

    def _is_promising(self, plan: Plan, likely_s: float) -> bool:
        """Whether it is likely to be better than the best, plans that differ in what seldom counts are not simulated
        yet, and those of other ZeRO stages are not far from the best.
        """
        if self.best is None:
            return True
        if likely_s >= self.best.step_s:
            return False
        far_s = self.best.step_s * (1 + _FAR)
        return _but_for(plan, _SELDOM) not in self._known_s and self._known_s.get(_but_for(plan, _OFTEN), 0.0) <= far_s

    def _polish(self) -> None:
        """What was left for later of the plans that differ from the best in one choice that seldom counts."""
        assert self.best is not None
        for name in ("arbitration", "rank_order"):
            best = self.best.plan.model_copy(update={"placement": None})
            same = {name: getattr(best, name)}
            for plan, bound_s in self._later.take(lambda plan: plan.model_copy(update=same) == best):  # noqa: B023
                if bound_s < self.best.step_s:
                    self.simulate(plan, bound_s)

    @property
    def _glance(self) -> StepBounds:
        return self.more if self.places else self.once

    def anywhere_s(self, branch: Branch) -> Floats:
        """[U, D, E]: a bound of every plan of a branch wherever experts stand, with or without replicas."""
        once = self.once.branch_s(branch)
        return once if self.more is self.once else np.minimum(once, self.more.branch_s(branch))

    def plan_s(self, plan: Plan, *, spare: bool = True) -> float:
        """A bound of a plan wherever experts stand; `spare`: there may be replicas."""
        once_s = self.once.plan_s(plan)
        return min(once_s, self.more.plan_s(plan)) if spare and self.more is not self.once else once_s

    def _weigh(self, branch: Branch, bound_s: float) -> None:
        """Which plans of a branch fit, and the least that a pipeline of those takes."""
        share = self._share(branch)
        fits = share <= 1
        self.infeasible += int((~fits).sum()) * len(branch.arbitration)
        if not fits.all():
            self._remember_smallest(branch, share)
        if not fits.any():
            return
        spare = np.zeros_like(fits)
        found = self.once.bounds.pipeline_s(branch)[:, None, None]
        if self.places and branch.layout.ep > 1:
            spare = fits & (self._share(branch, spare=True) <= 1)
        if spare.any():
            found = np.where(spare, np.minimum(self.more.bounds.pipeline_s(branch)[:, None, None], found), found)
        found = np.broadcast_to(found, fits.shape)
        weighed = Weighed(branch, fits, spare)
        self._push(max(bound_s, float(found[fits].min())), 2, weighed)
        if not fits.all():
            self._unfit.append((float(found[~fits].min()), self._count, weighed))

    def _share(self, branch: Branch, *, spare: bool = False) -> Floats:
        """[U, D, E]: of the usable memory."""
        share = self.filled.share(branch, spare=spare, evened=self.places)
        return np.asarray(share.reshape(-1, *share.shape[4:]))

    def _open(self, weighed: Weighed) -> None:
        """The rows of a branch of which something fits, best bound first."""
        bounds_UDE = np.where(weighed.fits, self._branch_s(weighed.branch, weighed.spare), inf)
        least_U = bounds_UDE.min(axis=(1, 2))
        order_U = np.argsort(least_U, kind="stable")
        opened = Opened(weighed, bounds_UDE, order_U[: np.isfinite(least_U).sum()])
        self._push(opened.least_s, 3, opened)

    def _branch_s(self, branch: Branch, spare: Flags) -> Floats:
        """[U, D, E]: of every plan; those with a slot to `spare` on each place may have replicas."""
        once = self.once.branch_s(branch)
        return np.where(spare, np.minimum(once, self.more.branch_s(branch)), once) if spare.any() else once

    def _remember_smallest(self, branch: Branch, share: Floats) -> None:
        """The plan that comes nearest to fitting, for those who ask why."""
        least = int(share.argmin())
        if self.smallest is None or share.flat[least] < self.smallest[0]:
            self.smallest = (float(share.flat[least]), self.space.plan(branch, least * len(branch.arbitration)))

    def _find_too_big(self) -> None:
        """The plan with the lowest bound that does not fit, of the branches that have one and may be ahead."""
        for pipeline_s, _, weighed in sorted(self._unfit, key=lambda each: each[:2])[:_UNFIT]:
            known_s = inf if self.too_big is None else self.too_big[0]
            if pipeline_s >= known_s:
                break
            over = np.where(weighed.fits, np.inf, self._branch_s(weighed.branch, weighed.spare))
            fastest = int(over.argmin())
            if over.flat[fastest] < known_s:
                plan = self.space.plan(weighed.branch, fastest * len(weighed.branch.arbitration))
                self.too_big = (float(over.flat[fastest]), plan)

    def _next_row(self, opened: Opened) -> None:
        """Closer bounds of the best row that is left."""
        branch, row = opened.weighed.branch, int(opened.order_U[opened.at])
        bounds_DE, alone = opened.bounds_UDE[row], row_of(branch, row)
        opened.at += 1
        if opened.least_s < inf:
            self._push(opened.least_s, 3, opened)
        closer_DE = self.once.row_s(alone)
        spare_DE = opened.weighed.spare[row]
        if self.more is not self.once and spare_DE.any():
            closer_DE = np.where(spare_DE, np.minimum(closer_DE, self.more.row_s(alone)), closer_DE)
        if not self.places and self.exact is not self.once:
            closer_DE = np.maximum(closer_DE, self.exact.row_s(alone))
        self.looked_at += 1
        closer = np.maximum(bounds_DE, closer_DE).ravel()
        order = np.argsort(closer, kind="stable")[: np.isfinite(closer).sum()]
        found = Row(branch, row * closer.size + order, closer[order])
        self._push(found.least_s, 4, found)
        self.bounded.append((found.least_s, self._plans(found)[0]))
        if len(self.bounded) > 4 * KEPT:
            self.bounded = sorted(self.bounded, key=lambda each: each[0])[:KEPT]

    def _plans(self, row: Row) -> list[Plan]:
        """The best that are left of a row: they differ in arbitration."""
        count = len(row.branch.arbitration)
        return [self.space.plan(row.branch, int(row.numbers[row.at]) * count + each) for each in range(count)]

    def _next_plans(self, row: Row) -> None:
        """Simulates the best that are left of a row, or leaves them for later."""
        bound_s, plans = row.least_s, self._plans(row)
        row.at += 1
        if row.least_s < inf:
            self._push(row.least_s, 4, row)
        for plan in plans:
            likely_s = bound_s * min(_LOOSE, self._over.get(_family(plan), 1.0))
            if self._is_promising(plan, likely_s):
                self.simulate(plan, bound_s)
            else:
                self._later.push(likely_s, plan, bound_s)

    def _timeline(self, plan: Plan) -> Timeline:
        found = simulate(compile_plan(plan, self.scenario), self.cost_model)
        self.simulated_tasks += len(found.program.tasks)
        return found

    def simulate(self, plan: Plan, bound_s: float) -> None:
        """Simulates a plan and remembers it; its experts are placed first where that is open. Small programs are also
        simulated with their experts in blocks.
        """
        in_blocks = plan
        if self.places and plan.placement is None and is_open(plan, self.scenario):
            self.placed_s = min(self.placed_s, bound_s)
            placed = best_placed(plan, self.scenario)
            if placed is None:
                self.infeasible += 1
                return
            plan = placed
        timeline = self._timeline(plan)
        if plan is not in_blocks and len(timeline.program.tasks) <= EFFORT_LOOK:
            other = self._timeline(in_blocks)
            if other.step_s < timeline.step_s and footprint.filled_share(in_blocks, self.scenario) <= 1:
                plan, timeline = in_blocks, other
        peak = self.scenario.cluster.gpu.peak_flops_per_s[plan.precision.compute]
        found = Tried(
            plan=plan,
            bound_s=bound_s,
            step_s=timeline.step_s,
            mfu=timeline.mfu(peak),
            tokens_per_s_per_gpu=timeline.tokens_per_s_per_gpu,
            causes_s=breakdown_s(timeline),
        )
        self.tried.append(found)
        for fields in (_SELDOM, _OFTEN):
            alike = _but_for(plan, fields)
            self._known_s[alike] = min(found.step_s, self._known_s.get(alike, np.inf))
        family, over = _family(plan), found.step_s / bound_s if bound_s else 1.0
        self._over[family] = min(over, self._over.get(family, np.inf))
        if self.best is None or found.step_s < self.best.step_s:
            self.best = found
        if self.progress is not None:
            self.progress(f"best {self.best.step_s:.4g} s, bound {self.front_s:.4g} s", self.front_s, self.best.step_s)


def _family(plan: Plan) -> tuple[object, ...]:
    """What makes bounds loose: plans of one family are about as far above theirs."""
    return plan.schedule, plan.overlap_degree


def _but_for(plan: Plan, fields: Mapping[str, object]) -> Plan:
    """The plan with what does not count set to the same. Stages inside blocks change few groups."""
    near = "tp-cp-dp-ep-pp" if plan.rank_order == "tp-cp-dp-ep-pp" else "tp-cp-ep-dp-pp"
    return plan.model_copy(update={**fields, "rank_order": near, "placement": None})


def no_time(search: Search) -> str:
    """That the time was too short, which says nothing about the scenario."""
    found = f"no plan was simulated within {search.time_limit_s} s"
    return f"{search.scenario.name}: {found}; use a longer time limit or narrow choose"


def nothing_fits(search: Search) -> str:
    """Which constraint binds, and the smallest change that helps."""
    assert search.smallest is not None
    _, plan = search.smallest
    scenario = search.scenario
    share = footprint.filled_share(plan, scenario)
    least = f"the smallest of {search.space.size} plans needs {share:.2f} times the usable memory of a GPU"
    return f"{scenario.name}: memory binds: {least}: {footprint.check_memory(plan, scenario)}"
