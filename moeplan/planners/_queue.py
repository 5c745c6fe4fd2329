"""What a search has before it: branches and plans by their bounds, and plans that are left for later."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats
from moeplan.planners._space import Branch

Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(order=True, slots=True)
class Entry:
    """A branch not yet opened, an opened one (by its best plan left), or a plan with a closer bound."""

    bound_s: float
    number: int
    rank: int = field(compare=False)
    """0: branch at a glance, 1: branch by its pipeline, 2: by those of its plans that fit, 3: opened, 4: plan."""
    what: object = field(compare=False)


@dataclass(frozen=True, slots=True)
class Weighed:
    """A branch, of whose plans some fit."""

    branch: Branch
    fits: Flags
    spare: Flags
    """Which have room for replicas."""


@dataclass(slots=True)
class Opened:
    """The plans of a branch in the order of their bounds."""

    branch: Branch
    bounds_s: Floats
    order: np.ndarray[tuple[int], np.dtype[np.int64]]
    spare: Flags
    at: int = 0


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
