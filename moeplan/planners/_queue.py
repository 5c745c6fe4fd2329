"""What a search has before it: branches and plans by their bounds, and plans that are left for later."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Ints
from moeplan.planners._space import Branch

Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(order=True, slots=True)
class Entry:
    """A branch not yet opened, an opened one (by its best row left), or a row with closer bounds (by its best plan
    left).
    """

    bound_s: float
    number: int
    rank: int = field(compare=False)
    """0: branch at a glance, 1: branch by its pipeline, 2: by those of its plans that fit, 3: opened, 4: row."""
    what: object = field(compare=False)


@dataclass(frozen=True, slots=True)
class Weighed:
    """A branch, of whose plans some fit; arrays [U, D, E]: arbitration needs no memory and has no bounds."""

    branch: Branch
    fits: Flags
    spare: Flags
    """Which have room for replicas."""


@dataclass(slots=True)
class Opened:
    """The rows of a branch, best bound first."""

    weighed: Weighed
    bounds_UDE: Floats
    """inf for what does not fit."""
    order_U: Ints
    at: int = 0

    @property
    def least_s(self) -> float:
        """Of the best row that is left; inf if none is."""
        return float(self.bounds_UDE[self.order_U[self.at]].min()) if self.at < len(self.order_U) else inf

    def num_below(self, seconds: float) -> int:
        """How many plans that are left have a bound below that."""
        below = self.bounds_UDE[self.order_U[self.at :]] < seconds
        return int(below.sum()) * len(self.weighed.branch.arbitration)


@dataclass(slots=True)
class Row:
    """The plans of a row of a branch by all choices but arbitration, best bound first."""

    branch: Branch
    numbers: Ints
    bounds_s: Floats
    at: int = 0

    @property
    def least_s(self) -> float:
        """Of the best one that is left; inf if none is."""
        return float(self.bounds_s[self.at]) if self.at < len(self.bounds_s) else inf

    def num_below(self, seconds: float) -> int:
        """How many plans that are left have a bound below that."""
        return int((self.bounds_s[self.at :] < seconds).sum()) * len(self.branch.arbitration)


class Later:
    """Plans that are not likely to be the best, by the step that each is likely to take."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, float, int, Plan]] = []
        self._count = 0
        self.least_s = inf
        """Of their bounds."""

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[tuple[Plan, float]]:
        return ((plan, bound_s) for _, bound_s, _, plan in self._heap)

    def push(self, likely_s: float, plan: Plan, bound_s: float) -> None:
        """One plan more."""
        self._count += 1
        heapq.heappush(self._heap, (likely_s, bound_s, self._count, plan))
        self.least_s = min(self.least_s, bound_s)

    def pop(self) -> tuple[Plan, float]:
        """The likeliest, and its bound."""
        _, bound_s, _, plan = heapq.heappop(self._heap)
        self._find_least()
        return plan, bound_s

    def take(self, is_chosen: Callable[[Plan], bool]) -> list[tuple[Plan, float]]:
        """All plans of a kind and their bounds, the likeliest first."""
        chosen = [each for each in sorted(self._heap) if is_chosen(each[3])]
        for each in chosen:
            self._heap.remove(each)
        heapq.heapify(self._heap)
        self._find_least()
        return [(plan, bound_s) for _, bound_s, _, plan in chosen]

    def _find_least(self) -> None:
        self.least_s = min((bound_s for _, bound_s in self), default=inf)
