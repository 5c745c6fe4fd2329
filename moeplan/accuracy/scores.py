"""Predicted against measured: errors, their weighted summary, and whether the best layouts were foreseen."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.accuracy.prediction import Tier

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured quantity of one record beside its prediction, both in the same unit."""

    id: str
    kind: str
    completeness: str
    quantity: str
    predicted: float
    measured: float
    interval: tuple[float, float]
    """In which the measured value lies four times of five."""
    tier: Tier
    weight: float
    scorable: bool
    tags: Mapping[str, str]
    """source, gpu, model, scale (GPUs), precision: what errors are broken down by."""
    guessed: tuple[str, ...]

    @property
    def error(self) -> float:
        """Signed, as a share of the measured value."""
        return self.predicted / self.measured - 1

    @property
    def is_covered(self) -> bool:
        """Whether the interval holds the measured value."""
        return self.interval[0] <= self.measured <= self.interval[1]

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "id": self.id, "kind": self.kind, "completeness": self.completeness, "quantity": self.quantity,
            "predicted": self.predicted, "measured": self.measured, "error": self.error,
            "interval": list(self.interval), "tier": self.tier, "weight": self.weight, "scorable": self.scorable,
            "guessed": list(self.guessed), **self.tags,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Weighted errors of several rows, as shares; `errors` absolute, `bias` their signed mean."""

    n: int
    median_error: float
    p90_error: float
    bias: float
    coverage: float


def summary_of(rows: Sequence[Row]) -> Summary:
    """Of rows of which at least one weighs something."""
    weight_N = np.array([row.weight for row in rows])
    error_N = np.array([row.error for row in rows])
    covered_N = np.array([row.is_covered for row in rows], np.float64)
    return Summary(
        n=len(rows),
        median_error=quantile(np.abs(error_N), weight_N, 0.5),
        p90_error=quantile(np.abs(error_N), weight_N, 0.9),
        bias=float(np.average(error_N, weights=weight_N)),
        coverage=float(np.average(covered_N, weights=weight_N)),
    )


def quantile(value_N: Floats, weight_N: Floats, share: float) -> float:
    """The smallest value at or below which `share` of the weight lies."""
    order = np.argsort(value_N, kind="stable")
    until_N = np.cumsum(weight_N[order])
    place = int(np.searchsorted(until_N, share * until_N[-1] * (1 - 1e-12)))
    return float(value_N[order[min(place, len(order) - 1)]])


def scored(rows: Iterable[Row]) -> list[Row]:
    """Those that count."""
    return [row for row in rows if row.scorable and row.weight > 0]


def summaries(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, Summary]:
    """Of the rows that count, by a key that can be sorted."""
    ordered = sorted(scored(rows), key=lambda row: str(key(row)))
    return {name: summary_of(list(each)) for name, each in groupby(ordered, key)}


def kendall(first_N: Floats, second_N: Floats) -> float:
    """Kendall's tau-b: of all pairs, those in the same order less those in opposite order; ties count in neither."""
    sign = np.sign(first_N[:, None] - first_N) * np.sign(second_N[:, None] - second_N)
    pairs = np.triu_indices(len(first_N), 1)
    untied = [np.count_nonzero((each[:, None] - each)[pairs]) for each in (first_N, second_N)]
    return float(sign[pairs].sum() / np.sqrt(float(untied[0]) * untied[1])) if all(untied) else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Layouts of one model on one GPU at one scale: how well their order was foreseen."""

    model: str
    gpu: str
    scale: str
    n: int
    tau: float
    best: str
    """The measured best."""
    best_place: int
    """At which place it was foreseen, 1 the first."""


def rankings(rows: Iterable[Row], *, least: int = 4) -> list[Ranking]:
    """One for each group of at least `least` layouts of training. Measured more than once, a layout is its median."""
    chosen = [row for row in scored(rows) if row.kind == "training_e2e"]
    names = ("model", "gpu", "scale")
    found = []
    by_group: dict[tuple[str, ...], list[Row]] = {}
    for row in chosen:
        by_group.setdefault(tuple(row.tags[name] for name in names), []).append(row)
    for group, members in sorted(by_group.items()):
        by_layout: dict[str, list[Row]] = {}
        for row in members:
            by_layout.setdefault(row.tags["layout"], []).append(row)
        if len(by_layout) >= least:
            found.append(_ranking(group, by_layout))
    return found


def _ranking(group: tuple[str, ...], by_layout: Mapping[str, Sequence[Row]]) -> Ranking:
    """By time for a token, so that layouts run with other batches can be compared."""
    rows = list(by_layout.values())
    measured_N = np.array([np.median([row.measured / float(row.tags["tokens"]) for row in each]) for each in rows])
    predicted_N = np.array([np.median([row.predicted / float(row.tags["tokens"]) for row in each]) for each in rows])
    best = int(measured_N.argmin())
    return Ranking(
        model=group[0], gpu=group[1], scale=group[2], n=len(rows), tau=kendall(measured_N, predicted_N),
        best=rows[best][0].id, best_place=1 + int((predicted_N < predicted_N[best]).sum()),
    )  # fmt: skip
