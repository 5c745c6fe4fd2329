"""Which layers and which ends of the model each virtual stage has, and which pipeline ranks hold it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType

from moeplan import menu
from moeplan.domain.model import Layer, Model
from moeplan.domain.plan import Plan
from moeplan.domain.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtualStage:
    """Consecutive layers of the model. `moe[i]` counts the layers with experts before layer i in the whole model."""

    number: int
    layers: tuple[Layer, ...]
    first_layer: int
    moe: tuple[int, ...]
    has_embedding: bool
    has_head: bool
    prediction: tuple[Layer, ...]
    """Layers of multi-token prediction, in the last virtual stage of a training step."""
    holders: tuple[int, ...]
    """Pipeline ranks that hold it, in rising order: two in DualPipe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """The virtual stages of a plan. `virtual[rank][chunk]` is the number of the one that a rank holds as a chunk."""

    schedule: ModuleType
    stages: tuple[VirtualStage, ...]
    virtual: tuple[tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.virtual)

    def neighbour(self, rank: int, number: int, target: int) -> int:
        """The rank that takes over at virtual stage `target` from `rank` at `number`: it holds it as the same chunk
        if any does.
        """
        chunk = self.virtual[rank].index(number)
        holders = self.stages[target].holders
        return next((each for each in holders if self.virtual[each][chunk] == target), holders[0])


def pipeline(model: Model, plan: Plan, workload: Workload) -> Pipeline:
    """The virtual stages of `plan`, which must be legal."""
    schedule = menu.module("schedules", plan.schedule)
    virtual = tuple(
        tuple(schedule.virtual_stage(rank, chunk, num_stages=plan.pp, num_chunks=plan.vpp) for chunk in range(plan.vpp))
        for rank in range(plan.pp)
    )
    starts = list(accumulate(plan.stages, initial=0))
    layers = model.all_layers
    moe_before = list(accumulate((int(layer.is_moe) for layer in layers), initial=0))
    last = len(plan.stages) - 1
    stages = tuple(
        VirtualStage(
            number=number,
            layers=layers[starts[number] : starts[number + 1]],
            first_layer=starts[number],
            moe=tuple(moe_before[starts[number] : starts[number + 1]]),
            has_embedding=number == 0,
            has_head=number == last,
            prediction=_prediction(model, workload) if number == last else (),
            holders=tuple(rank for rank, held in enumerate(virtual) if number in held),
        )
        for number in range(len(plan.stages))
    )
    return Pipeline(schedule=schedule, stages=stages, virtual=virtual)


def _prediction(model: Model, workload: Workload) -> tuple[Layer, ...]:
    if model.mtp is None or not workload.is_training or not workload.train_mtp:
        return ()
    return model.mtp.layers * model.mtp.depth
