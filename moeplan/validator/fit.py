"""Terms and tables that agree best with samples, and by how much they miss them.

Errors count relative to what was measured, so that small things matter as much as large ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from moeplan.domain.measured import Table, Terms, at
from moeplan.domain.program import Floats
from moeplan.validator.samples import Sample

_ROUNDS = 8
"""Of reweighting, which makes squares into absolute values: single samples that were disturbed pull less."""
_SPACING = 1.3
"""Sizes that differ by less share one row of a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """How far a fit is off: the mean of |fit / measured - 1| over the shapes that it knew, and over those it did not.

    `p90` is the ninth decile of the latter, or of the former where nothing was held out.
    """

    name: str
    fitted: float
    held_out: float | None
    p90: float
    count: int
    """Samples in all."""

    @staticmethod
    def of(name: str, samples: Sequence[Sample], errors: Sequence[float]) -> Residual:
        """Of the errors of all samples of a class."""
        known = [abs(error) for error, each in zip(errors, samples, strict=True) if not each.is_held_out]
        unknown = [abs(error) for error, each in zip(errors, samples, strict=True) if each.is_held_out]
        return Residual(
            name=name, fitted=_mean(known), held_out=_mean(unknown) if unknown else None,
            p90=float(np.percentile(unknown or known or [0.0], 90)), count=sum(each.count for each in samples),
        )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def fit_terms(samples: Sequence[Sample], *, beside_s: Sequence[float] | None = None) -> Terms:
    """The terms of a class: least relative error of beside_s + calls x overhead + FLOP / peak + bytes / bandwidth, none
    of them negative. `beside_s` is what is known already of each sample.
    """
    chosen = [place for place, each in enumerate(samples) if not each.is_held_out] or list(range(len(samples)))
    seconds = np.array([samples[place].seconds for place in chosen])
    known = np.array([0.0 if beside_s is None else beside_s[place] for place in chosen])
    columns = np.array([[samples[place].calls, samples[place].flops, samples[place].size_bytes] for place in chosen])
    overhead, per_flop, per_byte = _not_negative(columns / seconds[:, None], 1.0 - known / seconds)
    return Terms(
        overhead_s=overhead, peak_flops_per_s=1 / per_flop if per_flop > 0 else None,
        bandwidth_bytes_per_s=1 / per_byte if per_byte > 0 else None,
    )  # fmt: skip


def _not_negative(columns: Floats, wanted: Floats) -> Floats:
    """The x >= 0 with the least sum of |columns x - wanted|, by reweighted least squares."""
    weights = np.ones(len(wanted))
    best = np.zeros(columns.shape[1])
    for _ in range(_ROUNDS):
        best = _least_squares(columns * weights[:, None], wanted * weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(columns @ best - wanted), 1e-3))
    return best


def _least_squares(columns: Floats, wanted: Floats) -> Floats:
    """Three columns at most, so every choice of them can be tried."""
    best, least = np.zeros(columns.shape[1]), math.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in combinations(range(columns.shape[1]), size):
            part = columns[:, chosen]
            if not part.any(axis=0).all():
                continue
            scale = np.abs(part).max(axis=0)
            found = np.linalg.lstsq(part / scale, wanted, rcond=None)[0] / scale
            miss = float(((part @ found - wanted) ** 2).sum())
            if (found >= 0).all() and miss < least - 1e-12:
                best, least = np.zeros(columns.shape[1]), miss
                best[list(chosen)] = found
    return best


def fit_table(samples: Iterable[Sample]) -> Table:
    """Seconds by bytes: the median of samples of about one size, which never falls with the size."""
    ordered = sorted((each.size_bytes, each.seconds) for each in samples if not each.is_held_out)
    groups: list[list[tuple[float, float]]] = []
    for size, seconds in ordered:
        if groups and size <= groups[-1][0][0] * _SPACING:
            groups[-1].append((size, seconds))
        else:
            groups.append([(size, seconds)])
    rows = [(float(np.median([s for s, _ in group])), float(np.median([t for _, t in group]))) for group in groups]
    return tuple((size, seconds) for (size, _), seconds in zip(rows, _rising([t for _, t in rows]), strict=True))


def _rising(values: Sequence[float]) -> list[float]:
    """Pools neighbours that fall into their mean, until none do."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [_mean(pool) for pool in pools for _ in pool]


def table_errors(samples: Sequence[Sample]) -> list[float]:
    """Each sample against the table of all others, so that none is judged by itself."""
    errors = []
    for place, each in enumerate(samples):
        others = fit_table([*samples[:place], *samples[place + 1 :]])
        errors.append(at(others, each.size_bytes) / each.seconds - 1 if others else 0.0)
    return errors
