"""The least time of a slot of two passes: both blocks merged as the compiler merges them, every stream in its order.

The longest path from the first computation of the slot to its last, on wires that nothing else uses, for all rows at
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeplan.compiler.blocks import NO_LAYER, Block, Writer
from moeplan.compiler.layout import merged
from moeplan.compiler.parts import Parts
from moeplan.compiler.passes import PartBlocks
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Stream
from moeplan.partition.stages import pipeline
from moeplan.planners._space import Branch

if TYPE_CHECKING:
    from moeplan.planners._bounds import Bounds, Chains

Name = tuple[int, str, int]
"""Kind of layer (-1: an end of the model), work or exchange, pass."""
_NOTHING = (NO_LAYER, "", 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """The steps of a merged slot in order: what each is, which steps it follows, and where its blocks begin and end.

    A block begins and ends with its first and last computing step.
    """

    names: tuple[Name, ...]
    follows: tuple[tuple[int, ...], ...]
    first: tuple[int, int]
    last: tuple[int, int]


class Pairs:
    """Slots of two by rank and chunks, cached by what they are made of."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._slots: dict[tuple[object, ...], Slot] = {}
        self._spans: dict[tuple[object, ...], Floats] = {}

    def paths_s(self, branch: Branch, rank: int, forward: int, backward: int, *, begin: int) -> Floats:
        """[2, U]: least seconds from the beginning of F of chunk `forward` (`begin` 0) or of B of `backward` (1) to
        the end of each.
        """
        chains = self.bounds.chains(branch)
        shape = self.bounds.shape(branch.layout)
        virtual = shape.virtual[rank][forward], shape.virtual[rank][backward]
        last = len(branch.layout.stages) - 1
        content = tuple((shape.kinds_V[v], v == 0, v == last) for v in virtual)
        key = (id(chains), content, begin)
        if key not in self._spans:
            found = np.zeros((2, chains.ends.shape[-1]))
            rows = np.arange(found.shape[-1]).reshape([len(values) for values in branch.lists[:4]])
            for r, recompute in enumerate(branch.recompute):
                for o, parts in enumerate(branch.overlap_degree):
                    at = rows[:, r, :, o].ravel()
                    slot = self._slot(branch, rank, forward, backward, (recompute == "full", parts), content)
                    found[0, at], found[1, at] = _longest(slot, chains, at, slot.first[begin])
            self._spans[key] = found
        return self._spans[key]

    def _slot(
        self, branch: Branch, rank: int, forward: int, backward: int, how: tuple[bool, int], content: tuple[object, ...]
    ) -> Slot:
        layout = branch.layout
        split = tuple(degree > 1 for degree in (layout.tp, layout.cp, layout.ep, layout.etp))
        key = (content, split, how)
        if key not in self._slots:
            plan = Plan(
                dp=layout.dp, tp=layout.tp, cp=layout.cp, pp=layout.pp, ep=layout.ep, etp=layout.etp, vpp=layout.vpp,
                rank_order=layout.rank_order, schedule=layout.schedule, stages=layout.stages, zero_dense=0,
                zero_expert=0,
                recompute="full" if how[0] else "none", overlap_degree=how[1],
                precision=self.bounds.scenario.choices.precision,
            )  # fmt: skip
            self._slots[key] = self._written(plan, branch, rank, forward, backward)
        return self._slots[key]

    def _written(self, plan: Plan, branch: Branch, rank: int, forward: int, backward: int) -> Slot:
        scenario = self.bounds.scenario
        load = self.bounds.prices.load(plan.ep, plan.etp, plan.tp, plan.cp, branch.micro_batch[0])[1]
        parts = Parts(model=scenario.model, plan=plan, workload=scenario.workload, load=load)
        lanes = pipeline(scenario.model, plan, scenario.workload)
        blocks = PartBlocks(Writer(parts=parts, stage=rank, place=0), lanes)
        pair = (blocks.block("F", forward), blocks.block("B", backward))
        columns = merged(pair)
        names = [_NOTHING] * len(columns.stream)
        for block, place in zip(pair, columns.place, strict=True):
            for step, at in enumerate(place.tolist()):
                names[at] = self._name(parts, block, step)
        follows: list[set[int]] = [set() for _ in names]
        for before, after in zip(columns.before.tolist(), columns.after.tolist(), strict=True):
            follows[after].add(before)
        last: dict[int, int] = {}
        for at, stream in enumerate(columns.stream.tolist()):
            if stream in last:
                follows[at].add(last[stream])
            last[stream] = at
        computing = [
            place[np.flatnonzero(np.array(b.stream) == Stream.COMPUTE)]
            for b, place in zip(pair, columns.place, strict=True)
        ]
        return Slot(
            names=tuple(names), follows=tuple(tuple(sorted(each)) for each in follows),
            first=(int(computing[0][0]), int(computing[1][0])), last=(int(computing[0][-1]), int(computing[1][-1])),
        )  # fmt: skip

    def _name(self, parts: Parts, block: Block, step: int) -> Name:
        """What a step is, in the words of the prices."""
        layer, unit = block.layer[step], block.unit[step]
        _, of_layer, extra = self.bounds.prices.kinds
        kind = of_layer[layer] if layer != NO_LAYER else (extra[0] if extra else NO_LAYER)
        if block.stream[step] != Stream.COMPUTE:
            return kind, parts.exchanges[unit].kind, 0
        key = parts.work_key(unit)
        name, passes = str(key[0]), int(key[-1])  # type: ignore[call-overload]
        if name in ("embedding", "head", "mtp"):
            return NO_LAYER, name, passes
        return kind, name, passes


def _longest(
    slot: Slot, chains: Chains, rows: np.ndarray[tuple[int], np.dtype[np.int64]], start: int
) -> tuple[Floats | float, Floats | float]:
    """[rows]: from the beginning of step `start` to the end of the last computing step of each block; 0 if it is not
    behind.
    """
    alone = len(rows) == 1
    known: dict[Name, Floats | float] = {}
    for name in set(slot.names):
        seconds = chains.seconds(*name)
        known[name] = 0.0 if seconds is None else float(seconds[rows[0]]) if alone else seconds[rows]
    largest = max if alone else np.maximum
    ends: dict[int, Floats | float] = {}
    for at in range(start, len(slot.names)):
        begin: Floats | float | None = 0.0 if at == start else None
        for each in slot.follows[at]:
            if each in ends:
                begin = ends[each] if begin is None else largest(begin, ends[each])
        if begin is not None:
            ends[at] = begin + known[slot.names[at]]
    first, second = (ends.get(last, 0.0) for last in slot.last)
    return first, second
