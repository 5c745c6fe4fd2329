"""What a planner answers: the plan, what it costs and why, and how far from the best possible it can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moeplan.domain._frozen import Frozen
from moeplan.domain.plan import Plan

Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[float, Field(ge=0)]


class StageMemory(Frozen):
    """Peak bytes of one GPU of a pipeline rank, the hottest under uneven routing; the parts sum to `total`."""

    stage: Annotated[int, Field(ge=0)]
    weights: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    buffers: Bytes
    """Dispatched and combined tokens in transit, padding to capacity, gathered weights of ZeRO 3."""
    logits: Bytes
    cache: Bytes
    total: Bytes
    usable: Bytes


class Figures(Frozen):
    """One simulated step of one plan."""

    step_s: Seconds
    step_interval_s: tuple[Seconds, Seconds] | None = Field(default=None, strict=False)
    """In which such a step lies four times of five, as published measurements say (`moeplan accuracy`)."""
    tier: str | None = None
    """What that rests on: measured, interpolated, extrapolated or assumed."""
    mfu: Annotated[float, Field(ge=0)]
    tokens_per_s_per_gpu: Annotated[float, Field(ge=0)]
    peak_memory_bytes: Bytes
    breakdown_s: Mapping[str, Seconds]
    """What the busiest rank does or waits for: disjoint causes that sum to `step_s`."""
    memory: tuple[StageMemory, ...] = Field(strict=False)


class Evaluated(Frozen):
    """How the plans of the space were dealt with; the counts sum to `legal`."""

    legal: int
    infeasible_by_memory: int
    bounded_out: int
    """Their lower bound is no better than the best step found."""
    simulated: int
    unresolved: int
    """Neither simulated nor bounded out when the time was over."""


class RunnerUp(Frozen):
    """Another plan, and the reason why it lost."""

    plan: Plan
    lower_bound_s: Seconds
    step_s: Seconds | None
    """None: its bound alone ruled it out."""
    reason: str


class PlanResult(Frozen):
    """A plan with its certificate: no plan of the space is faster than `lower_bound_s` under this cost model."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal["moeplan.result/v1"] = Field(default="moeplan.result/v1", alias="schema")
    moeplan_version: str
    planner: str
    scenario: Mapping[str, Any]
    plan: Plan
    step_s: Seconds
    step_interval_s: tuple[Seconds, Seconds] | None = Field(default=None, strict=False)
    tier: str | None = None
    mfu: Annotated[float, Field(ge=0)]
    tokens_per_s_per_gpu: Annotated[float, Field(ge=0)]
    peak_memory_bytes: Bytes
    lower_bound_s: Seconds
    gap: Annotated[float, Field(ge=0)]
    """step_s / lower_bound_s - 1: 0 means that the plan is proven best."""
    breakdown_s: Mapping[str, Seconds]
    memory: tuple[StageMemory, ...] = Field(strict=False)
    evaluated: Evaluated
    runners_up: tuple[RunnerUp, ...] = Field(strict=False)
