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
    """A branch not yet opened, an opened one (by its best row left), a row with closer bounds (by its best plan left),
    or a plan.
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
        self._heap: list[tuple[float, Entry]] = []
        self.least_s = inf
        """Of their bounds."""

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, entry in self._heap)

    def push(self, likely_s: float, entry: Entry) -> None:
        """One plan more."""
        heapq.heappush(self._heap, (likely_s, entry))
        self.least_s = min(self.least_s, entry.bound_s)

    def pop(self) -> Entry:
        """The likeliest."""
        _, entry = heapq.heappop(self._heap)
        self._count()
        return entry

    def take(self, is_chosen: Callable[[Plan], bool]) -> list[Entry]:
        """All plans of a kind, the likeliest first."""
        chosen = [each for each in sorted(self._heap) if isinstance(each[1].what, Plan) and is_chosen(each[1].what)]
        for each in chosen:
            self._heap.remove(each)
        heapq.heapify(self._heap)
        self._count()
        return [entry for _, entry in chosen]

    def _count(self) -> None:
        self.least_s = min((entry.bound_s for entry in self), default=inf)
