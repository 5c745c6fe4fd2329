"""Intervals that hold four measured values of five, and how much a prediction is worth.

An interval's ends are the tenth and the ninetieth percentile of measured over predicted, among rows that are predicted
without their group: of the same kind, tier, and as to whether something had to be guessed. A row's own group never
counts for its interval, so what it covers is what it would cover of groups that nobody has seen. Of few groups the
percentiles are taken further out: the range of G draws covers (G - 1) / (G + 1) of what they are drawn from, so that
tails beyond an end are as much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from moeplan import catalogue
from moeplan.accuracy.prediction import Tier
from moeplan.accuracy.scores import quantile
from moeplan.catalogue.files import read
from moeplan.domain.scenario import Scenario
from moeplan.units import parse

TAIL = 0.1
"""Beyond either end."""
_ENOUGH = 8
"""Rows of which percentiles are taken; of fewer those of the whole kind are."""
_WIDEST = (-0.7, 0.7)
"""Logarithms, where a kind has no rows to tell: from half to twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """How far a prediction without its group was off, and what it is like."""

    kind: str
    tier: Tier
    is_guessed: bool
    group: tuple[str, ...]
    log_ratio: float
    """Of measured over predicted."""
    weight: float


Spread = tuple[float, float]
"""Logarithms of an interval's ends over the prediction."""


def spread_of(like: Residual, known: Sequence[Residual]) -> Spread:
    """The interval of a prediction, from residuals of other groups that are like it."""
    others = [each for each in known if each.group != like.group and each.kind == like.kind and each.weight > 0]
    alike = [each for each in others if (each.tier, each.is_guessed) == (like.tier, like.is_guessed)]
    almost = [each for each in others if each.is_guessed == like.is_guessed]
    for chosen in (alike, almost, others):
        if len(chosen) >= _ENOUGH:
            return _ends(chosen)
    return _WIDEST


def _ends(rows: Sequence[Residual]) -> Spread:
    value_N, weight_N = np.array([row.log_ratio for row in rows]), np.array([row.weight for row in rows])
    tail = tail_of(len({row.group for row in rows}))
    return quantile(value_N, weight_N, tail), quantile(value_N, weight_N, 1 - tail)


def tail_of(groups: int) -> float:
    """The share beyond either end of an interval that so many groups tell."""
    return TAIL * (groups - 1) / (groups + 1)


def around(predicted: float, spread: Spread) -> tuple[float, float]:
    """The interval, which holds the prediction itself even if nearly all others were off to one side."""
    return predicted * math.exp(min(spread[0], 0.0)), predicted * math.exp(max(spread[1], 0.0))


# ---- what is shipped


@lru_cache(maxsize=1)
def shipped() -> Mapping[str, Any]:
    """`cost_models/intervals.yaml`, which `benchmarks/accuracy.py --refit` writes."""
    data: Mapping[str, Any] = read(catalogue.root() / "cost_models" / "intervals.yaml").data
    return data


def shipped_spread(kind: str, tier: Tier, *, is_guessed: bool) -> Spread:
    """The interval of a prediction with the constants that come with the package."""
    by_tier = shipped()["spreads"].get(kind, {})
    # What was fitted to the very configuration has been off no more than its like.
    like = "interpolated" if tier == "measured" else tier
    for name in (f"{like}, guessed" if is_guessed else like, like, "any"):
        if name in by_tier:
            low, high = (parse(str(end), "share") for end in by_tier[name])
            return math.log1p(low), math.log1p(high)
    return _WIDEST


def tier_of(scenario: Scenario, dtype: str) -> Tier:
    """What a step of this GPU and number format rests on, with the constants that come with the package."""
    gpu = scenario.cluster.gpu
    if dtype in shipped()["fitted"].get(gpu.name, ()):
        return "interpolated"
    return "extrapolated" if is_measured(scenario) else "assumed"


def is_measured(scenario: Scenario) -> bool:
    """Whether kernels of the GPU were measured: its share of matrix products names a source that was."""
    figure = scenario.document["cluster"]["gpu"].get("gemm_efficiency", {})
    source = scenario.document["sources"].get(figure.get("source"), {})
    return source.get("kind") in ("measured", "published")


class Belief(NamedTuple):
    """How long a step may really take: four times of five between `low_s` and `high_s`."""

    low_s: float
    high_s: float
    tier: Tier


def belief_of(step_s: float, scenario: Scenario, dtype: str) -> Belief:
    """What published steps of training, or of serving, say of a simulated one whose products are in `dtype`."""
    tier = tier_of(scenario, dtype)
    kind = "training_e2e" if scenario.workload.is_training else "serving_e2e"
    return Belief(*around(step_s, shipped_spread(kind, tier, is_guessed=False)), tier)
