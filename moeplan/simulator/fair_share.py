"""Max-min fair rates of flow classes on link classes. A active classes, K link classes."""

from __future__ import annotations

import numpy as np

from moeplan.domain.program import Floats, Flows


def max_min_rates(crossing_AK: Floats, capacity_K: Floats) -> Floats:
    """Bytes per second of one flow of each class, by progressive filling: all grow alike until a link is full.

    No flow can have more without one that has no more having less. A class that crosses no link has no limit.
    Reference: Bertsekas, Gallager, "Data Networks" (1992), section 6.5.2.
    """
    rates = np.full(len(crossing_AK), np.inf)
    used = crossing_AK.any(axis=0)
    crossing, left = crossing_AK[:, used], capacity_K[used].copy()
    growing = crossing.any(axis=1)
    while growing.any():
        load = crossing[growing].sum(axis=0)
        level = np.divide(left, load, out=np.full(len(left), np.inf), where=load > 0)
        lowest = level.min()
        full = level <= lowest * (1 + 1e-12)
        frozen = growing & crossing[:, full].any(axis=1)
        rates[frozen] = lowest
        left = np.maximum(left - lowest * crossing[frozen].sum(axis=0), 0.0)
        growing &= ~frozen
    return rates


class RateTable:
    """Rates of sets of active classes, each set solved once."""

    def __init__(self, flows: Flows) -> None:
        self._crossing_CK, self._capacity_K = flows.crossing_CK, flows.capacity_bytes_per_s_K
        self._known: dict[tuple[int, ...], list[float]] = {}

    def rates(self, classes: tuple[int, ...]) -> list[float]:
        """Bytes per second of one flow of each of `classes`, which may name a class twice."""
        if classes not in self._known:
            self._known[classes] = max_min_rates(self._crossing_CK[list(classes)], self._capacity_K).tolist()
        return self._known[classes]
