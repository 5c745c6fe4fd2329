"""Best bound first: the queue of branches and plans, and what has been learned of each plan."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np

from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.causes import breakdown_s
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats
from moeplan.errors import InfeasibleError
from moeplan.partition import footprint
from moeplan.planners._bounds import Bounds
from moeplan.planners._space import Branch, Space, no_layout
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
EFFORT_LOOK = 5_000
"""Tasks that could be simulated while a plan is looked at layer by layer, as uneven routing asks for."""
KEPT = 64
"""Plans with a closer bound that are remembered as runners-up."""


@dataclass(order=True, slots=True)
class _Entry:
    """A branch not yet opened, an opened one (by its best plan left), or a plan with a closer bound."""

    bound_s: float
    number: int
    rank: int = field(compare=False)
    """0: branch at a glance, 1: branch, 2: opened branch, 3: plan."""
    what: object = field(compare=False)


@dataclass(slots=True)
class _Opened:
    """The plans of a branch in the order of their bounds."""

    branch: Branch
    bounds_s: Floats
    order: np.ndarray[tuple[int], np.dtype[np.int64]]
    at: int = 0


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
    best: Tried | None = None
    tried: list[Tried] = field(default_factory=list)
    bounded: list[tuple[float, Plan]] = field(default_factory=list)
    infeasible: int = 0
    too_big: tuple[float, Plan] | None = None
    """Of the plans that do not fit the one with the lowest bound."""
    smallest: tuple[float, Plan] | None = None
    """Share of the usable memory, and the plan that needs least."""
    front_s: float = 0.0
    proven: bool = False
    simulated_tasks: int = 0
    looked_at: int = 0
    _queue: list[_Entry] = field(default_factory=list)
    _later: list[_Entry] = field(default_factory=list)
    """Plans that differ in arbitration alone from one that was simulated and is not the best."""
    _seen: set[Plan] = field(default_factory=set)
    _count: int = 0

    def __post_init__(self) -> None:
        if not self.space.branches:
            raise InfeasibleError(no_layout(self.space.scenario))
        self.scenario = self.space.scenario
        self.steps = StepBounds(Bounds(self.scenario))
        even = self.steps.bounds.prices.is_even
        self.coarse = self.steps if even else StepBounds(Bounds(self.scenario, coarse=True))
        self.cost_model = CostModel(gpu=self.scenario.cluster.gpu)

    @property
    def lower_bound_s(self) -> float:
        """No plan of the space is faster."""
        assert self.best is not None
        return min(self.front_s, self.best.step_s)

    def run(self) -> None:
        """Until the best plan is proven, the time is over, or nothing is left. Raises InfeasibleError if nothing
        fits.
        """
        started = time.monotonic()
        self._bound_branches()
        while self._queue or self._later:
            ahead = self._queue and (not self._later or not self._is_enough(self._queue[0].bound_s))
            self.front_s = min(heap[0].bound_s for heap in (self._queue, self._later) if heap)
            if self._is_enough(self.front_s) or self._is_over(started):
                break
            if ahead:
                self._advance(heapq.heappop(self._queue))
            else:
                entry = heapq.heappop(self._later)
                self.simulate(entry.what, entry.bound_s)  # type: ignore[arg-type]
        else:
            self.front_s = np.inf
        if self.best is None:
            raise InfeasibleError(no_time(self) if self._queue else nothing_fits(self))
        self.proven = self.front_s >= self.best.step_s * (1 - _ROUNDING)

    def unresolved(self) -> int:
        """Plans that were not simulated and may be faster than the best found: all of a branch that was not opened."""
        assert self.best is not None
        total = 0
        for entry in (*self._queue, *self._later):
            if entry.bound_s < self.best.step_s * (1 - _ROUNDING):
                if isinstance(entry.what, Branch):
                    total += prod(len(values) for values in entry.what.lists)
                elif isinstance(entry.what, _Opened):
                    opened = entry.what
                    total += int((opened.bounds_s[opened.order[opened.at :]] < self.best.step_s).sum())
                else:
                    total += 1
        return total

    def _is_enough(self, bound_s: float) -> bool:
        """Whether no plan with this bound need be looked at."""
        return self.best is not None and bound_s >= self.best.step_s / (1 + (self.gap or 0.0)) * (1 - _ROUNDING)

    def _is_over(self, started: float) -> bool:
        if self.time_limit_s is not None:
            limit_s = self.time_limit_s * (1 if self.best else _PATIENCE)
            return time.monotonic() - started > limit_s
        work = self.simulated_tasks + (0 if self.coarse is self.steps else self.looked_at * EFFORT_LOOK)
        return self.gap is None and work >= EFFORT_TASKS and len(self.tried) >= EFFORT_PLANS

    def _bound_branches(self) -> None:
        branches = self.space.branches
        for number, branch in enumerate(branches):
            if self.progress is not None and number % 500 == 0:
                self.progress("bounding layouts", number, len(branches))
            self._push(self.coarse.bounds.floor_s(branch), 0, branch)

    def _push(self, bound_s: float, rank: int, what: object) -> None:
        self._count += 1
        heapq.heappush(self._queue, _Entry(bound_s, self._count, rank, what))

    def _advance(self, entry: _Entry) -> None:
        if entry.rank == 0:
            assert isinstance(entry.what, Branch)
            self._push(max(entry.bound_s, float(self.coarse.bounds.pipeline_s(entry.what).min())), 1, entry.what)
        elif entry.rank == 1:
            assert isinstance(entry.what, Branch)
            self._open(entry.what)
        elif entry.rank == 2:
            assert isinstance(entry.what, _Opened)
            self._next_plan(entry.what)
        else:
            assert isinstance(entry.what, Plan)
            alike = _but_for_arbitration(entry.what)
            if alike not in self._seen or (self.best is not None and alike == _but_for_arbitration(self.best.plan)):
                self._seen.add(alike)
                self.simulate(entry.what, entry.bound_s)
            else:
                heapq.heappush(self._later, entry)

    def _open(self, branch: Branch) -> None:
        """The plans of a branch that fit, best bound first."""
        sizes = [len(values) for values in branch.lists]
        share = np.broadcast_to(self._filled(branch)[..., None], sizes).ravel()
        if (share > 1).all():
            self._remember_smallest(branch, share, np.full(len(share), np.inf))
            self.infeasible += len(share)
            return
        bounds = self.coarse.branch_s(branch)
        every = np.broadcast_to(bounds[..., None], (*bounds.shape, sizes[-1])).ravel()
        self._remember_smallest(branch, share, every)
        order = np.argsort(every, kind="stable")
        order = order[share[order] <= 1]
        self.infeasible += len(every) - len(order)
        self._push(float(every[order[0]]), 2, _Opened(branch, every, order))

    def _filled(self, branch: Branch) -> Floats:
        """Share of the usable memory that the fullest rank needs, by all choices but arbitration."""
        sizes = [len(values) for values in branch.lists]
        usable = self.scenario.cluster.gpu.usable_memory_bytes

        def plan(*index: int) -> Plan:
            return self.space.plan(branch, int(np.ravel_multi_index(index, sizes)))

        staying = np.array(
            [
                [footprint.states(plan(0, 0, 0, 0, d, e, 0), self.scenario).total_P for e in range(sizes[5])]
                for d in range(sizes[4])
            ]
        )
        found = np.full(sizes[:6], np.inf)
        hopeless = staying.max(axis=2).min() > usable
        for m, r, o in np.ndindex(sizes[0], sizes[1], sizes[3]):
            if hopeless and (m, r, o) != (0, sizes[1] - 1, 0):
                continue  # one of the leanest is enough to tell by how much it fails
            passing = footprint.held(plan(m, r, 0, o, 0, 0, 0), self.scenario).total_P
            found[m, r, :, o] = (staying + passing).max(axis=2) / usable
        return found

    def _remember_smallest(self, branch: Branch, share: Floats, bounds_s: Floats) -> None:
        """The plan that comes nearest to fitting, and the fastest that does not, for those who ask why."""
        least = int(share.argmin())
        if self.smallest is None or share[least] < self.smallest[0]:
            self.smallest = (float(share[least]), self.space.plan(branch, least))
        over = np.where(share > 1, bounds_s, np.inf)
        fastest = int(over.argmin())
        if over[fastest] < (np.inf if self.too_big is None else self.too_big[0]):
            self.too_big = (float(over[fastest]), self.space.plan(branch, fastest))

    def _next_plan(self, opened: _Opened) -> None:
        plan = self.space.plan(opened.branch, int(opened.order[opened.at]))
        bound_s = float(opened.bounds_s[opened.order[opened.at]])
        opened.at += 1
        if opened.at < len(opened.order):
            self._push(float(opened.bounds_s[opened.order[opened.at]]), 2, opened)
        closer = max(bound_s, self.steps.plan_s(plan))
        self.looked_at += 1
        self._push(closer, 3, plan)
        self.bounded.append((closer, plan))
        if len(self.bounded) > 4 * KEPT:
            self.bounded = sorted(self.bounded, key=lambda each: each[0])[:KEPT]

    def simulate(self, plan: Plan, bound_s: float) -> None:
        """Simulates a plan and remembers it."""
        timeline = simulate(compile_plan(plan, self.scenario), self.cost_model)
        self.simulated_tasks += len(timeline.program.tasks)
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
        if self.best is None or found.step_s < self.best.step_s:
            self.best = found
        if self.progress is not None:
            self.progress(f"best {self.best.step_s:.4g} s, bound {self.front_s:.4g} s", self.front_s, self.best.step_s)


def _but_for_arbitration(plan: Plan) -> Plan:
    return plan.model_copy(update={"arbitration": "fair"})


def no_time(search: Search) -> str:
    """That the time was too short, which says nothing about the scenario."""
    found = f"no plan was simulated within {search.time_limit_s} s"
    return f"{search.scenario.name}: {found}; use a longer time limit or narrow choose"


def nothing_fits(search: Search) -> str:
    """Which constraint binds, and the smallest change that helps."""
    assert search.smallest is not None
    share, plan = search.smallest
    scenario = search.scenario
    least = f"the smallest of {search.space.size} plans needs {share:.2f} times the usable memory of a GPU"
    return f"{scenario.name}: memory binds: {least}: {footprint.check_memory(plan, scenario)}"
