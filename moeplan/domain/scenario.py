"""A scenario: a model on a cluster under a workload and a routing law, and what may be chosen. The only input there
is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from moeplan.domain._frozen import Frozen
from moeplan.domain.cluster import Cluster
from moeplan.domain.model import Model
from moeplan.domain.plan import Arbitration, Capacity, Degree, Precision, RankOrder, Recompute, ZeroStage
from moeplan.domain.workload import Workload

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class RoutingLaw(Frozen):
    """Which router of the menu, its seed, and the options that this router takes (checked against its signature)."""

    router: str
    seed: Seed = 0
    options: Mapping[str, Any] = Field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.router, self.seed, tuple(sorted((key, repr(value)) for key, value in self.options.items()))))


class Choices(Frozen):
    """The values that a planner may give each field of a Plan. None: every legal value. One value: it is fixed.

    `precision`, `capacity` and `overlap_gradients` are given, not searched: they change the result or only ever help.
    """

    dp: tuple[Degree, ...] | None = None
    tp: tuple[Degree, ...] | None = None
    pp: tuple[Degree, ...] | None = None
    vpp: tuple[Degree, ...] | None = None
    ep: tuple[Degree, ...] | None = None
    etp: tuple[Degree, ...] | None = None
    cp: tuple[Degree, ...] | None = None
    zero_dense: tuple[ZeroStage, ...] | None = None
    zero_expert: tuple[ZeroStage, ...] | None = None
    micro_batch: tuple[Degree, ...] | None = None
    rank_order: tuple[RankOrder, ...] | None = None
    recompute: tuple[Recompute, ...] | None = None
    all_to_all: tuple[str, ...] | None = None
    overlap_degree: tuple[Degree, ...] | None = None
    schedule: tuple[str, ...] | None = None
    arbitration: tuple[Arbitration, ...] | None = None
    overlap_gradients: bool = True
    capacity: Capacity = Capacity()
    precision: Precision = Precision()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Everything that is given. `document` is the resolved, self-contained text it was built from, with every
    source.
    """

    name: str
    cluster: Cluster
    model: Model
    workload: Workload
    routing: RoutingLaw | None
    """None for a model without experts."""
    choices: Choices
    document: Mapping[str, Any] = field(repr=False, compare=False)
