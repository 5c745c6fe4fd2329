"""What is done for a layer whose gap is still too wide: the methods that `ilp` chooses from, and what they found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from moeplan.domain.placement import LayerPlacement, PlacementProblem
from moeplan.errors import PlanError
from moeplan.jit import clock_s
from moeplan.placers._balance import placement_of, walked_anew
from moeplan.placers._branching import refuted
from moeplan.placers._check import check, value
from moeplan.placers._configurations import ConfigurationLP, Fractions, Prices, stretched
from moeplan.placers._counts import any_counts
from moeplan.placers._direct import WHOLE, size, solved_by_highs, written_out
from moeplan.placers._packing import long_walks, rounded_and_packed
from moeplan.placers._pairs import pairable

SMALL, MEDIUM = 300, 8000
"""Whole variables up to which the whole problem is solved as one programme: at once, and where nothing else is left.

PuLP takes a second to write 8000 out, which no time limit cuts.
"""
_CONFIGURATIONS = "configuration LP: prices of experts and slots that no contents of the GPUs can pay, for any counts"
_BRANCHING = "branching on replica counts: the configuration LP refutes every range of counts by itself"
_PAIRS = "pairs: no replica counts have partners small enough for their large replicas (dual bound of HiGHS)"
_ROUNDING = 1e-9
_NEAR, _AT_ONCE = 10, 0.9
"""Gaps, in wanted ones, up to which the wanted one is tried at once, and what then is tried."""


@dataclass(kw_only=True, slots=True, eq=False)
class Search:
    """What is known of a layer so far: the best placement, the best bound, and when to stop."""

    problem: PlacementProblem
    gap: float
    stop_s: float
    rng: np.random.Generator
    placement: LayerPlacement
    value: float
    bound: float
    proof: str

    def is_done(self) -> bool:
        """Whether the wanted gap is proven, or time is up."""
        return self.value <= self.bound * (1 + self.gap) or clock_s() >= self.stop_s

    def offer(self, placement: LayerPlacement) -> bool:
        """Whether the placement is legal and the best so far; it then is the answer. An illegal one is told."""
        try:
            check(self.problem, placement)
        except PlanError as wrong:
            self.proof = f"{self.proof} (a solver's answer was dropped: {wrong})"
            return False
        found = value(self.problem, placement)
        is_better = found < self.value
        if is_better:
            self.placement, self.value = placement, found
        return is_better

    def prove(self, bound: float, proof: str) -> None:
        """The bound, if it is the best. One above the value of a legal placement is wrong, and told as such."""
        if bound > self.value * (1 + _ROUNDING):
            self.proof = f"{self.proof} (a claim of {bound:.6g} was dropped: a legal placement has {self.value:.6g})"
        elif bound > self.bound:
            self.bound, self.proof = min(bound, self.value), proof


def improve(search: Search) -> None:
    """The methods that fit the problem, in turn."""
    is_special = search.problem.split == "optimal" or search.problem.max_moves is not None
    if size(search.problem) <= (MEDIUM if is_special else SMALL):
        _solve_whole(search)
    if is_special or size(search.problem) <= SMALL:
        return
    if search.problem.slots_per_gpu == 2:
        _bisect(search, _paired, _PAIRS)
    else:
        lp = ConfigurationLP(search.problem)
        lp.add_contents(search.placement)
        if not _refuted_by_lp(search, lp, limit=search.value / (1 + search.gap) * (1 + _ROUNDING)):
            _walk_anew(search)
        _bisect_lp(search, lp)
        _bisect(search, partial(_branched, lp), _BRANCHING)
    if size(search.problem) <= MEDIUM:
        _solve_whole(search)


def _solve_whole(search: Search) -> None:
    """The whole problem as one programme."""
    if search.is_done():
        return
    model = written_out(search.problem, high=search.value)
    answer = solved_by_highs(search.problem, model, gap=search.gap / 2, time_limit_s=search.stop_s - clock_s())
    if answer.placement is not None:
        search.offer(answer.placement)
    search.prove(answer.bound, WHOLE)


def _walk_anew(search: Search) -> None:
    """Walks from other beginnings, towards the bound."""
    if search.is_done():
        return
    problem = search.problem
    at_GC = walked_anew(
        problem.tokens_E, gpus=problem.num_gpus, slots=problem.slots, per_gpu=problem.slots_per_gpu,
        bound=search.bound, gap=search.gap, rng=search.rng, stop_s=search.stop_s,
    )  # fmt: skip
    search.offer(placement_of(at_GC, problem.num_experts))


def _refuted_by_lp(search: Search, lp: ConfigurationLP, *, limit: float) -> bool:
    """Whether the configuration LP refutes the limit, which raises the bound."""
    solution = lp.solve(limit=limit, within=any_counts(search.problem), stop_s=search.stop_s)
    if isinstance(solution, Prices):
        search.prove(stretched(search.problem, solution, limit=limit, high=search.value), _CONFIGURATIONS)
    return isinstance(solution, Prices)


def _bisect_lp(search: Search, lp: ConfigurationLP) -> None:
    """The bound raised to what the configuration LP proves, within an eighth of the wanted gap."""
    high = search.value
    while not search.is_done() and high > search.bound * (1 + search.gap / 8):
        limit = (search.bound * high) ** 0.5
        if not _refuted_by_lp(search, lp, limit=limit):
            high = limit


def _bisect(search: Search, settles: Callable[[Search, float], bool], proof: str) -> None:
    """Limits between bound and value, refuted or met one after the other; one that stays open counts as too low.

    Where they are near, the first is as low as is wanted, since the LP's bound is often nearly met.
    """
    floor, limit = search.bound, search.value
    if search.value <= search.bound * (1 + _NEAR * search.gap):
        limit = search.bound * (1 + _AT_ONCE * search.gap)
    while not search.is_done() and search.value > floor * (1 + search.gap / 4):
        limit = min(limit, (floor * search.value) ** 0.5)
        if settles(search, limit):
            search.prove(limit, proof)
        if search.value > limit * (1 + _ROUNDING):
            floor = limit
        limit = search.value


def _paired(search: Search, limit: float) -> bool:
    """Whether the ILP of pairs refutes the limit; counts that it finds are packed."""
    answer = pairable(search.problem, limit=limit, time_limit_s=search.stop_s - clock_s())
    if answer.count_E is not None:
        search.offer(long_walks(search.problem, answer.count_E, target=limit, rng=search.rng))
    return answer.refuted


def _branched(lp: ConfigurationLP, search: Search, limit: float) -> bool:
    """Whether branching refutes the limit; what it does not refute is rounded and packed."""

    def attempt(solution: Fractions) -> bool:
        search.offer(rounded_and_packed(search.problem, solution, target=limit, rng=search.rng))
        return search.value <= limit * (1 + _ROUNDING) or search.is_done()

    return refuted(search.problem, lp, limit=limit, stop_s=search.stop_s, attempt=attempt)
