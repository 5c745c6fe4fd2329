"""The least time of a slot of two passes: both blocks merged as the compiler merges them, every stream in its order.

The longest path from the first computation of the slot to its last, on wires that nothing else uses, for all rows at
once. Between a computation that exchanges wait for and one that waits for them, all of what lies there of both has to
fit, each slowing the other down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moeplan.compiler.blocks import NO_LAYER, Block, Writer
from moeplan.compiler.layout import merged
from moeplan.compiler.parts import Parts
from moeplan.compiler.passes import PartBlocks
from moeplan.cost.cost_model import Shares
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Ints, Stream
from moeplan.jit import compiled
from moeplan.partition.stages import pipeline
from moeplan.planners._chains import beside_s
from moeplan.planners._passes import Chains
from moeplan.planners._space import Branch

if TYPE_CHECKING:
    from moeplan.planners._bounds import Bounds

Name = tuple[int, str, int]
"""Kind of layer (-1: an end of the model), work or exchange, pass."""
_NOTHING = (NO_LAYER, "", 0)
Needs = tuple[Ints, Ints, Floats]
"""Which steps open and close windows, those that close first before others, and [windows, rows] the least seconds
between."""
_NONE: Needs = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 1)))
"""No windows."""
_LONGEST_RUN = 6
"""Exchanges in a window: those of a layer and a half."""


class Window(NamedTuple):
    """Exchanges `first` to `last` of a stream lie between two computing steps."""

    opens: int
    closes: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """The steps of a merged slot in order: what each is, which steps it follows, and where its blocks begin and end.

    A block begins and ends with its first and last computing step.
    """

    names: tuple[Name, ...]
    streams: tuple[int, ...]
    follows: tuple[Ints, Ints]
    """Where those that each step follows begin in the second array."""
    windows: tuple[Window, ...]
    between: Mapping[int, tuple[float, float]]
    """Of each exchange the last computing step that it follows and the first one that follows it; else infinite."""
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
            names=tuple(names), streams=tuple(columns.stream.tolist()),
            follows=(np.cumsum([0, *map(len, follows)]), np.array([x for each in follows for x in sorted(each)])),
            windows=_windows(columns.stream.tolist(), follows),
            between=_between(columns.stream.tolist(), follows),
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
) -> tuple[Floats, Floats]:
    """[rows]: from the beginning of step `start` to the end of the last computing step of each block; 0 if it is not
    behind.
    """
    x = chains.exchanges[0]
    seconds, shares = _of_steps(slot.names, chains.seconds, rows), x.shares
    flow = _of_steps(slot.names, chains.flow_s, rows)
    needs = _needs(slot, seconds, flow, shares)
    found = np.maximum(_ends(seconds, slot.follows, needs, start)[list(slot.last)], 0.0)
    for block, last in enumerate(slot.last):
        if shares[:2] != (1.0, 1.0) and start <= last and x.is_certain[rows].any():
            beside = _beside_idle_s(slot, seconds, flow, shares, start, last)
            found[block] = np.maximum(found[block], np.where(x.is_certain[rows], beside, 0.0))
    return found[0], found[1]


@compiled
def _ends(seconds: Floats, follows: tuple[Ints, Ints], needs: Needs, start: int) -> Floats:
    """[steps, rows]: the longest path from the beginning of step `start` to the end of each; -inf: not behind it.

    Step x follows `before[first[x]:first[x + 1]]`, and begins at least `need` behind the end of what opens a window
    that it closes.
    """
    (first, before), (opens, closes, need) = follows, needs
    ends = np.full(seconds.shape, -np.inf)
    ends[start] = seconds[start]
    window = 0
    for at in range(start + 1, len(seconds)):
        while window < len(closes) and closes[window] < at:
            window += 1
        for row in range(seconds.shape[1]):
            begin_s = -np.inf
            for x in before[first[at] : first[at + 1]]:
                begin_s = max(begin_s, ends[x, row])
            x = window
            while x < len(closes) and closes[x] == at:
                begin_s = max(begin_s, ends[opens[x], row] + need[x, row])
                x += 1
            ends[at, row] = begin_s + seconds[at, row]
    return ends


def _beside_idle_s(slot: Slot, seconds: Floats, flow: Floats, shares: Shares, start: int, last: int) -> Floats:
    """[rows]: from the beginning of one computing step to the end of another, all kernels beside those exchanges of a
    stream that come behind the one and before the other.

    Where kernels are as slow as exchanges can make them, the longest path is longer than all kernels: then at least,
    and so with faster kernels too, the GPU is idle for the rest of it. Only what does not move meanwhile slows down.
    That asks for the very seconds of all kernels, not for bounds of them.
    """
    computes = (np.array(slot.streams) == Stream.COMPUTE)[:, None]
    slowed = np.where(computes, seconds / shares.compute, seconds)
    work = np.where(computes, seconds, 0.0)[start : last + 1].sum(axis=0)
    idle = np.maximum(_ends(slowed, slot.follows, _NONE, start)[last] - work / shares.compute, 0.0)
    found: Floats = idle + work
    for stream in set(slot.streams) - {Stream.COMPUTE}:
        own = [at for at, each in enumerate(slot.streams) if each == stream]
        behind = [n for n, at in enumerate(own) if start <= slot.between[at][0] < inf]
        before = [n for n, at in enumerate(own) if slot.between[at][1] <= last]
        if behind and before and behind[0] <= before[-1]:
            run = own[behind[0] : before[-1] + 1]
            sent, moved = seconds[run].sum(axis=0), flow[run].sum(axis=0)
            found = np.maximum(found, beside_s(work, sent, moved, shares, idle))
    return found


def _of_steps(
    names: tuple[Name, ...], known: Callable[[int, str, int], Floats | None], rows: np.ndarray[tuple[int], Any]
) -> Floats:
    """[steps, rows] seconds, 0 where nothing is known."""
    nothing = np.zeros(len(rows))
    found = {name: known(*name) for name in set(names)}
    here = {name: nothing if seconds is None else seconds[rows] for name, seconds in found.items()}
    return np.array([here[name] for name in names])


def _needs(slot: Slot, seconds: Floats, flow: Floats, shares: Shares) -> Needs:
    """All kernels and exchanges of a window, each slowing the other down."""
    if not slot.windows or shares[:2] == (1.0, 1.0):
        return _NONE
    opens, closes, first, last = np.array(slot.windows).T.copy()
    streams = np.array(slot.streams)
    upto, flows = np.zeros_like(seconds), np.zeros_like(seconds)
    for stream in set(slot.streams):
        upto[streams == stream] = np.cumsum(seconds[streams == stream], axis=0)
        flows[streams == stream] = np.cumsum(flow[streams == stream], axis=0)
    work = upto[closes] - seconds[closes] - upto[opens]
    sent = upto[last] - upto[first] + seconds[first]
    return opens, closes, beside_s(work, sent, flows[last] - flows[first] + flow[first], shares)


def _between(streams: list[int], follows: list[set[int]]) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {
        at: (max((f for f in follows[at] if streams[f] == Stream.COMPUTE), default=inf), inf)
        for at, stream in enumerate(streams)
        if stream != Stream.COMPUTE
    }
    for at in reversed(range(len(streams))):
        for exchange in follows[at] & found.keys() if streams[at] == Stream.COMPUTE else ():
            found[exchange] = found[exchange][0], at
    return found


def _windows(streams: list[int], follows: list[set[int]]) -> tuple[Window, ...]:
    """Runs of one to `_LONGEST_RUN` exchanges of a stream, and the longest one, by the step that closes them."""
    found = set()
    for stream in set(streams) - {Stream.COMPUTE}:
        own = [at for at, each in enumerate(streams) if each == stream]
        opens = {x: [f for f in follows[x] if streams[f] == Stream.COMPUTE] for x in own}
        closes = {x: at for at in reversed(range(len(streams))) if streams[at] == Stream.COMPUTE for x in follows[at]}
        firsts = [n for n, x in enumerate(own) if opens[x]]
        lasts = [n for n, x in enumerate(own) if x in closes]
        for a in firsts:
            for b in (b for b in lasts if a <= b and (b - a < _LONGEST_RUN or (a, b) == (firsts[0], lasts[-1]))):
                window = Window(max(opens[own[a]]), closes[own[b]], own[a], own[b])
                if window.opens < window.closes:
                    found.add(window)
    return tuple(sorted(found, key=lambda window: (window.closes, window)))
