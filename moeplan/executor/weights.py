"""The weights that one rank holds, layer by layer, with their gradients, their shards under ZeRO, and AdamW.

A unit is what the program gathers or reduces as one: the dense weights of a layer, those of its experts, or those of
the model's ends. It is a table of slots (one, or one for each expert) by weights; of R replicas the r-th owns columns
r n / R to (r + 1) n / R of every slot, so that replicas of an expert on other places own the same columns.
Reference: Rajbhandari et al., "ZeRO" (SC 2020).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moeplan.domain.feed_forward import Experts
from moeplan.domain.placement import EMPTY
from moeplan.domain.plan import Plan
from moeplan.domain.program import Ints, Pass
from moeplan.domain.scenario import Scenario
from moeplan.executor.exchange import Ring, Wire
from moeplan.executor.lane import Task
from moeplan.executor.layers import Parameter, block_parameters, end_parameters, expert_prefix, layer_parameters
from moeplan.partition.ranks import coordinate, groups, ranks_of_stage
from moeplan.partition.stages import VirtualStage, pipeline
from moeplan.partition.weights import weights_of

if TYPE_CHECKING:
    from moeplan.executor.rank import Rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENDS = -1
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


def slot_prefix(layer: int, slot: int) -> str:
    """What the names of a slot's weights begin with on a rank."""
    return f"layers.{layer}.slots.{slot}."


@dataclass(frozen=True, kw_only=True)
class UnitSpec:
    """What a unit holds on one rank."""

    chunk: int
    layer: int
    is_expert: bool
    zero: int
    """The ZeRO stage; 0 where nobody else holds the same."""
    replicas: tuple[int, ...]
    """The GPUs that hold the same, in the order of their shards."""
    member: int
    """Which of them this is."""
    experts: tuple[int, ...]
    """The expert in each slot; one entry for dense weights."""
    parameters: tuple[Parameter, ...]
    """Of each slot."""
    ranks: int
    """Tensor ranks that share the weights."""
    rank: int

    @cached_property
    def starts(self) -> Ints:
        """The first column of each weight, and the number of columns."""
        sizes = [int(np.prod(each.part_shape(self.ranks))) for each in self.parameters]
        return np.cumsum([0, *sizes])

    @property
    def columns(self) -> int:
        """Weights of a slot."""
        return int(self.starts[-1])

    def bounds(self, member: int) -> slice:
        """The columns that a replica owns."""
        count = len(self.replicas)
        return slice(member * self.columns // count, (member + 1) * self.columns // count)

    @property
    def own(self) -> slice:
        """The columns whose optimizer state this rank has."""
        return self.bounds(self.member) if self.zero else slice(0, self.columns)

    def names(self) -> Iterator[tuple[str, int, int]]:
        """Name on this rank, slot and number of each weight."""
        for slot in range(len(self.experts)):
            prefix = slot_prefix(self.layer, slot) if self.is_expert else ""
            yield from ((prefix + each.name, slot, number) for number, each in enumerate(self.parameters))

    def filled(self, whole: Callable[[str], Tensor]) -> Tensor:
        """The table of (slots, columns) from whole weights of the one-device model; empty slots are 0."""
        rows = []
        for expert in self.experts:
            prefix = expert_prefix(self.layer, expert) if self.is_expert else ""
            parts = [
                torch.zeros(int(np.prod(each.part_shape(self.ranks))))
                if expert == EMPTY and self.is_expert
                else each.part(whole(prefix + each.name), self.ranks, self.rank).reshape(-1)
                for each in self.parameters
            ]
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def whole_ranges(self) -> list[tuple[int, int]]:
        """Columns of weights that every tensor rank holds whole, and adds its own tokens' gradients to."""
        if self.ranks == 1 or self.is_expert:
            return []
        pairs = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), self.parameters, strict=True)
        return [(start, stop) for start, stop, each in pairs if each.axis is None]


def unit_specs(plan: Plan, scenario: Scenario, rank: int) -> list[UnitSpec]:
    """The units of one GPU, chunk by chunk."""
    stage, position = place_of(plan, rank)
    pipes, model = pipeline(scenario.model, plan, scenario.workload), scenario.model
    found: list[UnitSpec] = []
    for chunk, number in enumerate(pipes.virtual[stage]):
        virtual = pipes.stages[number]
        ends = tuple(end_parameters(model, embedding=virtual.has_embedding, head=virtual.has_head))
        for weights in weights_of(virtual, model, plan):
            layer = None if weights.layer == ENDS else virtual.layers[weights.layer - virtual.first_layer]
            dense = ends if layer is None else tuple(layer_parameters(layer, f"layers.{weights.layer}."))
            specs = [_dense_unit(plan, virtual, chunk, weights.layer, dense, rank=rank, position=position)]
            if layer is not None and layer.experts:
                moe = virtual.moe[weights.layer - virtual.first_layer]
                specs += [
                    _expert_unit(plan, virtual, chunk, weights.layer, layer.experts, moe, rank=rank, position=position)
                ]
            for spec in specs:
                assert spec.columns * len(spec.experts) == weights.count(expert=spec.is_expert), spec
            if plan.tp > 1:
                assert sum(stop - start for start, stop in specs[0].whole_ranges()) == weights.replicated, specs[0]
            found += specs
    return found


def place_of(plan: Plan, rank: int) -> tuple[int, int]:
    """Pipeline rank and position of a GPU."""
    for stage in range(plan.pp):
        found = np.flatnonzero(ranks_of_stage(plan, stage) == rank)
        if len(found):
            return stage, int(found[0])
    raise AssertionError(rank)


def _replicas(plan: Plan, holders: tuple[int, ...], axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
    rows = np.concatenate([ranks_of_stage(plan, holder)[groups(plan, axes)] for holder in holders], axis=1)
    row = rows[(rows == rank).any(axis=1)][0]
    return tuple(int(each) for each in row)


def _dense_unit(
    plan: Plan, virtual: VirtualStage, chunk: int, layer: int, parameters: tuple[Parameter, ...], *, rank: int,
    position: int,
) -> UnitSpec:  # fmt: skip
    replicas = _replicas(plan, virtual.holders, ("cp", "dp"), rank)
    return UnitSpec(
        chunk=chunk, layer=layer, is_expert=False, zero=plan.zero_dense if len(replicas) > 1 else 0,
        replicas=replicas, member=replicas.index(rank), experts=(EMPTY,), parameters=parameters, ranks=plan.tp,
        rank=int(coordinate(plan, "tp")[position]),
    )  # fmt: skip


def _expert_unit(
    plan: Plan, virtual: VirtualStage, chunk: int, layer: int, experts: Experts, moe: int, *, rank: int, position: int
) -> UnitSpec:
    replicas = _replicas(plan, virtual.holders, ("edp",), rank)
    row = range(experts.num_experts) if plan.placement is None else plan.placement.experts[moe]
    place, slots = int(coordinate(plan, "ep")[position]), len(row) // plan.ep
    return UnitSpec(
        chunk=chunk, layer=layer, is_expert=True, zero=plan.zero_expert if len(replicas) > 1 else 0,
        replicas=replicas, member=replicas.index(rank), experts=tuple(row[place * slots : (place + 1) * slots]),
        parameters=tuple(block_parameters(experts, experts.hidden_size, "")), ranks=plan.etp,
        rank=int(coordinate(plan, "etp")[position]),
    )  # fmt: skip


class Unit:
    """The tensors of a unit. `full` is None while ZeRO 3 has it nowhere."""

    def __init__(self, spec: UnitSpec, whole: Callable[[str], Tensor], plan: Plan, device: torch.device) -> None:
        precision = plan.precision
        self.spec = spec
        self.dtype, self.gradient_dtype = DTYPES[precision.weights], DTYPES[precision.gradients]
        full = spec.filled(whole).to(device=device, dtype=self.dtype)
        self.full: Tensor | None = full
        own = full[:, spec.own]
        self.shard = own if spec.zero == 0 else own.clone()
        master = precision.master_weights
        self.master = self.shard if master is None else spec.filled(whole)[:, spec.own].to(device, DTYPES[master])
        self.gradients: dict[int, Tensor] = {}
        self.shard_gradient: Tensor | None = None
        self.places = {name: (slot, number) for name, slot, number in spec.names()}
        if spec.zero == 3:
            self.full = None

    def _view(self, table: Tensor, name: str) -> Tensor:
        slot, number = self.places[name]
        start, stop = self.spec.starts[number : number + 2].tolist()
        return table[slot, start:stop].view(self.spec.parameters[number].part_shape(self.spec.ranks))

    def value(self, name: str) -> Tensor:
        """The weight as it is now."""
        assert self.full is not None, f"{name} has not been gathered"
        return self._view(self.full, name)

    def gradient_of(self, microbatch: int) -> Tensor:
        """The table into which a micro-batch adds: one for all, but under ZeRO 2 and 3, where each is reduced alone."""
        key = microbatch if self.spec.zero >= 2 else 0
        if key not in self.gradients:
            like = self.master.device
            self.gradients[key] = torch.zeros(
                (len(self.spec.experts), self.spec.columns), dtype=self.gradient_dtype, device=like
            )
        return self.gradients[key]

    def gradient_view(self, name: str, microbatch: int) -> Tensor:
        """One weight's part of the table into which a micro-batch adds."""
        return self._view(self.gradient_of(microbatch), name)

    def empty(self) -> Tensor:
        """A table for whole weights, with nothing in it yet."""
        return torch.empty((len(self.spec.experts), self.spec.columns), dtype=self.dtype, device=self.shard.device)

    def add_reduced(self, part: Tensor) -> None:
        """A reduced gradient of the columns that this rank owns."""
        self.shard_gradient = part if self.shard_gradient is None else self.shard_gradient.add_(part)

    def final_gradient(self) -> Tensor:
        """What the optimizer gets: of the columns that this rank owns, summed over micro-batches and replicas."""
        if self.spec.zero == 0:
            return self.gradient_of(0)
        assert self.shard_gradient is not None
        return self.shard_gradient

    def chunks(self, table: Tensor) -> list[Tensor]:
        """The columns of each replica, each in one piece of memory: of one slot the table's own."""
        return [table[:, self.spec.bounds(member)].contiguous() for member in range(len(self.spec.replicas))]

    def set_chunks(self, table: Tensor, chunks: list[Tensor]) -> None:
        """Puts the columns of each replica where they belong, if they are not there."""
        for member, chunk in enumerate(chunks):
            place = table[:, self.spec.bounds(member)]
            if place.data_ptr() != chunk.data_ptr() or place.stride() != chunk.stride():
                place.copy_(chunk)

    def clear(self) -> None:
        """Forgets the gradients of the step."""
        self.gradients.clear()
        self.shard_gradient = None


class OfMicrobatch:
    """A unit's weights as a tape of one micro-batch wants them."""

    def __init__(self, unit: Unit, microbatch: int) -> None:
        self.unit, self.microbatch = unit, microbatch

    def value(self, name: str) -> Tensor:
        """The weight as it is now."""
        return self.unit.value(name)

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Adds to this micro-batch's table."""
        self.unit.gradient_view(name, self.microbatch).add_(gradient)


class Optimizer:
    """AdamW over what this rank owns of all its units; a rank whose stages have no layer owns nothing."""

    def __init__(self, units: list[Unit]) -> None:
        self.units = units
        owned = [unit.master for unit in units]
        self.adam = torch.optim.AdamW(owned, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True) if owned else None

    def update(self) -> None:
        """One update; the shards, and what of the full tables is at hand, have the new weights."""
        for unit in self.units:
            unit.master.grad = unit.final_gradient().to(unit.master.dtype)
        if self.adam is not None:
            self.adam.step()
        for unit in self.units:
            unit.master.grad = None
            if unit.shard is not unit.master:
                unit.shard.copy_(unit.master)
            if unit.spec.zero in (1, 2) and unit.full is not None:
                unit.full[:, unit.spec.own] = unit.shard


class Sharding:
    """Gathers of weights, reductions of gradients, the optimizer."""

    def __init__(self, rank: Rank, wires: Mapping[str, Wire]) -> None:
        self.rank, self.wires = rank, wires
        self.optimizer_of = Optimizer(rank.units) if rank.scenario.workload.is_training else None
        self.holders: dict[int, tuple[int, ...]] = {}
        self.lock = threading.Lock()
        self.final: list[Tensor] | None = None
        """What the optimizer last got for each unit, if `keeps_gradients`."""
        self.keeps_gradients = False

    def parameters(self, task: Task) -> None:
        """Gathers a unit's weights from the shards of all replicas."""
        unit, ring = self.rank.sharded_unit(task), self.rank.ring(task)
        table = unit.full if unit.full is not None and unit.spec.zero < 3 else unit.empty()
        chunks = unit.chunks(table)
        chunks[ring.me].copy_(unit.shard)
        ring.gather(self.wires["shard"], chunks)
        unit.set_chunks(table, chunks)
        with self.lock:
            unit.full, self.holders[id(unit)] = table, _instance(task)

    def free(self, task: Task) -> None:
        """Drops the weights that ZeRO 3 gathered for a pass, behind the last task of the layer."""
        if task.number not in self.rank.closing:
            return
        for unit in self.rank.units:
            is_here = (unit.spec.chunk, unit.spec.layer) == (task.chunk, task.layer)
            with self.lock:
                if is_here and unit.spec.zero == 3 and self.holders.get(id(unit)) == _instance(task):
                    unit.full = None

    def gradients(self, task: Task) -> None:
        """Sums a unit's gradients over its replicas, or those of experts that stand on several places of a group."""
        if task.operation == "all_to_all":
            self._same_experts(task)
            return
        unit, ring = self.rank.sharded_unit(task), self.rank.ring(task)
        table = unit.gradient_of(max(task.microbatch, 0))
        chunks = unit.chunks(table)
        if unit.spec.zero == 0:
            ring.all_reduce(self.wires["shard"], chunks)
            unit.set_chunks(table, chunks)
            return
        ring.reduce_scatter(self.wires["shard"], chunks)
        unit.add_reduced(chunks[ring.me].clone())
        unit.gradients.clear() if unit.spec.zero == 1 else unit.gradients.pop(task.microbatch)

    def _same_experts(self, task: Task) -> None:
        """Rings of the places of each expert, one expert after another."""
        unit = self.rank.unit(self.rank.chunk_of(task.layer), task.layer, expert=True)
        table = unit.final_gradient()
        for expert, places in self.rank.repeated_experts(task):
            if self.rank.place in places:
                ring = Ring.simple([self.rank.place_rank(task, place) for place in places], self.rank.number)
                row = table[unit.spec.experts.index(expert)]
                ring.all_reduce(self.wires["shard"], list(row.tensor_split(len(places))))

    def optimizer(self, task: Task) -> None:
        """AdamW on what this rank owns."""
        assert self.optimizer_of is not None
        if self.keeps_gradients:
            self.final = [unit.final_gradient().clone() for unit in self.rank.units]
        self.optimizer_of.update()

    def tensor_gradients(self, task: Task) -> None:
        """Of weights that tensor ranks hold whole each has the gradient of its own tokens, or heads; where columns are
        another replica's there stands 0.
        """
        whole = [(unit, *columns) for unit in self.rank.units for columns in unit.spec.whole_ranges()]
        ring, sizes = self.rank.ring(task), [stop - start for _, start, stop in whole]
        flat = torch.zeros(sum(sizes), dtype=whole[0][0].gradient_dtype, device=self.rank.device)
        pairs = [_owned(*place, part) for place, part in zip(whole, flat.split(sizes), strict=True)]
        for gradient, part in pairs:
            part.copy_(gradient)
        ring.all_reduce(self.wires["tensor"], list(flat.tensor_split(len(ring.ranks))))
        for gradient, part in pairs:
            gradient.copy_(part)


def _owned(unit: Unit, start: int, stop: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """Of columns that `part` is for: the gradient of those that this rank owns, and their places in `part`."""
    own = unit.spec.own
    low = max(start, own.start)
    high = max(low, min(stop, own.stop))
    return unit.final_gradient()[0, low - own.start : high - own.start], part[low - start : high - start]


def _instance(task: Task) -> tuple[int, ...]:
    passes = Pass(task.passes)
    return (int(passes), task.chunk, task.microbatch, task.layer)
