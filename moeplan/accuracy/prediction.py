"""What is said of one record, and how much that is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["measured", "interpolated", "extrapolated", "assumed"]
TIERS: tuple[Tier, ...] = ("measured", "interpolated", "extrapolated", "assumed")
"""The best first. measured: the very configuration entered a fit. interpolated: GPU, kind of model and number format
did. extrapolated: one of them did not. assumed: nothing of the GPU was measured.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predicted values of one record, by the names and in the units that its `measured` has.

    `guessed` are the fields that the record leaves open, each with what was taken for it: they widen the interval.
    """

    values: Mapping[str, float]
    tier: Tier
    guessed: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a record is not predicted, as one sentence: what was found, what is allowed."""

    reason: str
