"""Blocks laid end to end: every pass of every micro-batch becomes a stretch of the task table, tied to the passes it
waits for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moeplan.compiler.blocks import ENTRY, Block
from moeplan.compiler.step import StepBlock
from moeplan.domain.plan import Plan
from moeplan.domain.program import Ints, Lane, Stream, Tasks
from moeplan.partition.ranks import ranks_of_stage
from moeplan.partition.stages import Pipeline
from moeplan.schedules import Action

_Key = tuple[int, str, int, int]
"""Lane, kind, chunk and micro-batch of a pass."""
_LAST = (Stream.TENSOR, Stream.COMPUTE)
"""Of what closes a step: sums over tensor ranks, and the optimizer."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All that one lane does: what opens the step, slots of one or two blocks, what closes the step."""

    opening: StepBlock | None
    slots: tuple[tuple[tuple[Block, Action], ...], ...]
    closing: StepBlock | None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A slot's steps as arrays; `place[i]` is where step s of its i-th block went."""

    stream: Ints
    unit: Ints
    layer: Ints
    passes: Ints
    member: Ints
    before: Ints
    after: Ints
    place: tuple[Ints, ...]


@dataclass
class _Instance:
    """Where a pass of a micro-batch stands in the task table."""

    block: Block
    task_of_step: Ints


@dataclass
class Layout:
    """The task table under construction."""

    plan: Plan
    pipeline: Pipeline
    lane_R: Ints
    size: int = 0
    columns: list[tuple[Columns, int, tuple[Action, ...]]] = field(default_factory=list)
    before: list[Ints] = field(default_factory=list)
    after: list[Ints] = field(default_factory=list)
    instances: dict[_Key, _Instance] = field(default_factory=dict)
    lanes: list[Lane] = field(default_factory=list)
    cache: dict[tuple[int, ...], Columns] = field(default_factory=dict)

    def add(self, number: int, lane: Lane, listing: Listing) -> None:
        """Appends the tasks of a lane, and ties what opens and closes its step to its passes."""
        assert number == len(self.lanes)
        self.lanes.append(lane)
        opening = self._append(number, (listing.opening.block,), ()) if listing.opening else None
        for slot in listing.slots:
            actions = tuple(action for _, action in slot)
            tasks = self._append(number, tuple(block for block, _ in slot), actions)
            for (block, action), task_of_step in zip(slot, tasks, strict=True):
                key = (number, "B" if action.kind == "I" else action.kind, action.chunk, action.microbatch)
                self.instances[key] = _Instance(block, task_of_step)
        if listing.opening and opening:
            self._tie_opening(number, listing.opening, opening[0], listing)
        if listing.closing:
            self._close(number, listing)

    def _append(self, lane: int, blocks: tuple[Block, ...], actions: tuple[Action, ...]) -> tuple[Ints, ...]:
        key = tuple(id(block) for block in blocks)
        if key not in self.cache:
            self.cache[key] = merged(blocks)
        columns = self.cache[key]
        self.columns.append((columns, lane, actions))
        self.before.append(columns.before + self.size)
        self.after.append(columns.after + self.size)
        places = tuple(place + self.size for place in columns.place)
        self.size += len(columns.stream)
        return places

    def _tie(self, before: Ints | list[int], after: Ints | list[int]) -> None:
        """Every task of `after` waits for every task of `before`."""
        first, second = np.asarray(before, np.int64), np.asarray(after, np.int64)
        self.before.append(np.repeat(first, len(second)))
        self.after.append(np.tile(second, len(first)))

    def _tie_opening(self, lane: int, step: StepBlock, task_of_step: Ints, listing: Listing) -> None:
        """The first forward pass of each chunk waits, layer by layer, for the weights."""
        first = {action.chunk: action for slot in reversed(listing.slots) for _, action in slot if action.kind == "F"}
        for number, (chunk, layer) in step.for_layer.items():
            found = self.instances[lane, "F", chunk, first[chunk].microbatch]
            needs = found.task_of_step[found.block.opening.get(layer, [])]
            self._tie(task_of_step[[number]], needs[:1])

    def _close(self, lane: int, listing: Listing) -> None:
        """Gradients wait for the last backward pass of their chunk; the sum over tensor ranks for all of these, and for
        all reductions before it, as does the optimizer.
        """
        step = listing.closing
        assert step is not None
        reduced, computed = self._last(lane, Stream.SHARD), self._last(lane, Stream.COMPUTE)
        task_of_step = self._append(lane, (step.block,), ())[0]
        final = {action.chunk: action for slot in listing.slots for _, action in slot if action.kind in "BW"}
        overlap = self.plan.overlap_gradients
        for number, (chunk, layer) in step.for_layer.items():
            action = final[chunk]
            found = self.instances[lane, action.kind, chunk, action.microbatch]
            steps = found.block.gradients.get(layer, []) if overlap else []
            steps = steps or [at for at in range(len(found.block.stream)) if found.block.stream[at] == Stream.COMPUTE]
            self._tie(found.task_of_step[steps], task_of_step[[number]])
        sums, update = ([at for at, each in enumerate(step.block.stream) if each == kind] for kind in _LAST)
        self._tie(reduced, task_of_step[sums + update])
        self._tie(computed, task_of_step[sums])

    def _last(self, lane: int, stream: Stream) -> list[int]:
        """The last task so far of a lane on a stream."""
        at = self.size
        for columns, owner, _ in reversed(self.columns):
            if owner != lane:
                return []
            at -= len(columns.stream)
            found = np.flatnonzero(columns.stream == stream)
            if len(found):
                return [at + int(found[-1])]
        return []

    def tasks(self, meeting_EL: Ints) -> tuple[Tasks, Ints, Ints]:
        """The finished table, and (before, after) of every dependency. `meeting_EL`: exchange and lane to meeting."""
        self._tie_passes()
        sizes = [len(columns.stream) for columns, _, _ in self.columns]
        stream = np.concatenate([columns.stream for columns, _, _ in self.columns])
        unit = np.concatenate([columns.unit for columns, _, _ in self.columns])
        lane = np.repeat([owner for _, owner, _ in self.columns], sizes)
        away = stream != Stream.COMPUTE
        unit[away] = meeting_EL[unit[away], lane[away]]
        assert (unit >= 0).all()
        tasks = Tasks(
            lane_T=lane,
            stream_T=stream,
            unit_T=unit,
            pass_T=np.concatenate([columns.passes for columns, _, _ in self.columns]),
            layer_T=np.concatenate([columns.layer for columns, _, _ in self.columns]),
            microbatch_T=np.concatenate([_of_member(c, [a.microbatch for a in acts]) for c, _, acts in self.columns]),
            chunk_T=np.concatenate([_of_member(c, [a.chunk for a in acts]) for c, _, acts in self.columns]),
        )
        return tasks, np.concatenate(self.before), np.concatenate(self.after)

    # ---- between lanes

    def _tie_passes(self) -> None:
        for key, found in self.instances.items():
            if found.block.entry:
                self._tie(self._ends_before(key), found.task_of_step[found.block.entry])
            if found.block.behind_inputs:
                ends = self._ends_of((key[0], "B", *key[2:]))
                self._tie(ends, found.task_of_step[found.block.behind_inputs])

    def _ends_before(self, key: _Key) -> list[int]:
        """The tasks that a pass waits for."""
        source = self._source(*key)
        return [] if source is None else self._ends_of(source)

    def _ends_of(self, source: _Key) -> list[int]:
        """The last tasks of a pass; one with nothing to do hands on what it waits for itself."""
        found = self.instances[source]
        ends: list[int] = found.task_of_step[[step for step in found.block.last if step != ENTRY]].tolist()
        return ends + (self._ends_before(source) if ENTRY in found.block.last else [])

    def _source(self, lane: int, kind: str, chunk: int, microbatch: int) -> _Key | None:
        """The pass that a pass waits for: the same one of the neighbouring virtual stage, or its own forward pass."""
        rank = self.lanes[lane].stage
        number = self.pipeline.virtual[rank][chunk]
        target = number + (-1 if kind == "F" else 1)
        if kind == "W" or target < 0:
            return None
        if target == len(self.pipeline.stages):
            return lane, "F", chunk, microbatch
        neighbour = self.pipeline.neighbour(rank, number, target)
        which = self.pipeline.virtual[neighbour].index(target)
        return self._lane_at(lane, neighbour), kind, which, microbatch

    def _lane_at(self, lane: int, stage: int) -> int:
        """The lane at another pipeline rank with the positions of this one."""
        if self.lanes[lane].stage == stage:
            return lane
        if (lane, stage) not in self._neighbours:
            here = ranks_of_stage(self.plan, self.lanes[lane].stage)
            position = int(np.flatnonzero(here == self.lanes[lane].ranks_R[0])[0])
            self._neighbours[lane, stage] = int(self.lane_R[ranks_of_stage(self.plan, stage)[position]])
        return self._neighbours[lane, stage]

    _neighbours: dict[tuple[int, int], int] = field(default_factory=dict)


def _of_member(columns: Columns, values: list[int]) -> Ints:
    return np.array(values, np.int64)[columns.member] if values else np.full(len(columns.stream), -1, np.int64)


def merged(blocks: tuple[Block, ...]) -> Columns:
    """One block, or two in turn: steps in the order of the share of their block that stands before them.

    So the exchanges of one run while the other computes. Both blocks keep their own order.
    """
    sizes = [len(block.stream) for block in blocks]
    share = np.concatenate([np.arange(size) / max(size, 1) for size in sizes])
    member = np.repeat(np.arange(len(blocks)), sizes)
    order = np.lexsort((member, share))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    places = tuple(np.split(rank, np.cumsum(sizes)[:-1]))
    ties = [
        (place[np.array(b.before, np.int64)], place[np.array(b.after, np.int64)])
        for b, place in zip(blocks, places, strict=True)
    ]

    def column(name: str) -> Ints:
        return np.concatenate([np.array(getattr(block, name), np.int64) for block in blocks])[order]

    return Columns(
        stream=column("stream"),
        unit=column("unit"),
        layer=column("layer"),
        passes=np.concatenate([np.full(len(b.stream), int(b.passes), np.int64) for b in blocks])[order],
        member=member[order],
        before=np.concatenate([first for first, _ in ties]),
        after=np.concatenate([second for _, second in ties]),
        place=places,
    )
