"""Every GPU sends to every other, each pair another size: batched max-min sharing on ports and leaf pipes, compiled.

A flow from i to j crosses the out-port of i and the in-port of j and, where their leaves differ, the pipe up from i's
leaf and the one down to j's. Its rate is the least of their levels. A step solves the levels and drains the matrix in
one sweep. What will end within the next step takes its last bytes out of that step's capacity, so that none is wasted
or used twice; the rest share what is left. The last flows are left to the exact engine.

Axes: G GPU (row: sender; column: receiver), B leaf. GPUs are in the order of their leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.program import Floats, Ints
from moeplan.jit import compiled, inlined
from moeplan.network.fluid import FlowSet, finish_times

Floats32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
_Ends = tuple[Floats, Floats, Floats, Floats]
"""Of the out-ports, the in-ports, the pipes up and the pipes down."""
_CHUNK = 32
"""Columns that are looked at one by one when one of them ends."""
_FEW_PER_GPU = 4
"""When only so many flows are left for each GPU, the exact engine is fast enough for them."""
_NEVER = np.float32(3e38)
"""Remaining bytes of what is not there, or not there any more."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PortTraffic:
    """All flows start together. Pairs without bytes are left out. GPUs of a leaf are neighbours, leaf by leaf.

    Within a leaf only ports count; without leaves (`first_B1` of one leaf) only ports exist.
    """

    bytes_GG: Floats
    out_bytes_per_s_G: Floats
    in_bytes_per_s_G: Floats
    first_B1: Ints
    """Leaf b is GPUs first_B1[b] to first_B1[b + 1] - 1."""
    up_bytes_per_s_B: Floats
    down_bytes_per_s_B: Floats

    @property
    def ends(self) -> _Ends:
        """The capacities of the four sides; a pipe that never binds is infinite."""
        return self.out_bytes_per_s_G, self.in_bytes_per_s_G, self.up_bytes_per_s_B, self.down_bytes_per_s_B

    @property
    def leaf_G(self) -> Ints:
        """The leaf of each GPU."""
        return np.repeat(np.arange(len(self.first_B1) - 1), np.diff(self.first_B1))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MatrixFinishes:
    """When each pair's flow ends (0 without bytes), and in how many steps."""

    finish_s_GG: Floats
    steps: int


_Counts = tuple[Ints, Ints, Ints]
"""Active flows by sender, by receiver, and between leaves."""


class _Side(NamedTuple):
    """The ports of one side, or pipes of one direction: capacity left, flows not held yet, level when full."""

    left: Floats
    free: Floats
    level: Floats
    before: Floats
    """The level of the step before."""
    is_full: Bytes
    share: Floats
    """The level at which a link would be full now; infinite if it is, or has no flows to hold."""
    share_bits: Ints
    """The same memory as whole numbers, which have the same order, and whose least is found faster."""


class _Levels(NamedTuple):
    out: _Side
    into: _Side
    up: _Side
    down: _Side
    near: Floats32
    far: Floats32
    """What an in-port allows to senders under its leaf, and to others."""


def matrix_finish_times(traffic: PortTraffic, *, tolerance: float) -> MatrixFinishes:
    """Ends of all flows: rates change no more often than each `tolerance` of the elapsed time, each end is its own.

    benchmarks/network.py shows how far off this is.
    """
    size_GG = traffic.bytes_GG
    left_GG = np.where(size_GG > 0, size_GG, _NEVER).astype(np.float32)
    active_GG = (size_GG > 0).astype(np.uint8)
    finish_GG = np.zeros(size_GG.shape)
    few = int(_FEW_PER_GPU * len(size_GG))
    now_s, steps, levels = _run(
        left_GG, active_GG, np.ascontiguousarray(active_GG.T), finish_GG,
        traffic.ends, traffic.first_B1, traffic.leaf_G, tolerance, few,
    )  # fmt: skip
    _finish_exactly(traffic, left_GG, active_GG, finish_GG, levels, now_s)
    return MatrixFinishes(finish_s_GG=finish_GG, steps=steps)


def _finish_exactly(
    traffic: PortTraffic, left_GG: Floats32, active_GG: Bytes, finish_GG: Floats, levels: _Ends, now_s: float
) -> None:
    """Hands what is left to the exact engine, and what would end within the next step."""
    i, j = np.nonzero((active_GG > 0) | (finish_GG > now_s))
    a, b = traffic.leaf_G[i], traffic.leaf_G[j]
    rate_F = np.minimum(levels[0][i], levels[1][j])
    rate_F = np.where(a == b, rate_F, np.minimum(rate_F, np.minimum(levels[2][a], levels[3][b])))
    rest_F = np.where(active_GG[i, j] > 0, left_GG[i, j], (finish_GG[i, j] - now_s) * rate_F)
    gpus, leaves = len(left_GG), len(traffic.first_B1) - 1
    capacity_K = np.concatenate(traffic.ends)
    path_F4 = np.stack([i, gpus + j, 2 * gpus + a, 2 * gpus + leaves + b], axis=1)
    binds_F4 = np.isfinite(capacity_K)[path_F4]
    binds_F4[:, 2:] &= (a != b)[:, None]
    flows = FlowSet(
        capacity_bytes_per_s_K=np.where(np.isfinite(capacity_K), capacity_K, 1.0),
        link_I=path_F4[binds_F4].astype(np.int32),
        first_F1=np.concatenate([[0], np.cumsum(binds_F4.sum(axis=1))]),
        size_bytes_F=np.maximum(rest_F, 0.0),
    )
    finish_GG[i, j] = now_s + finish_times(flows).finish_s_F


@compiled
def _run(
    left_GG: Floats32,
    active_GG: Bytes,
    active_TGG: Bytes,
    finish_GG: Floats,
    capacities: _Ends,
    first_B1: Ints,
    leaf_G: Ints,
    tolerance: float,
    few: int,
) -> tuple[float, int, _Ends]:
    gpus, leaves = len(left_GG), len(first_B1) - 1
    counts = (np.zeros(gpus, np.int64), np.zeros(gpus, np.int64), np.zeros((leaves, leaves), np.int64))
    chunks = np.zeros((gpus, (gpus + _CHUNK - 1) // _CHUNK), np.int64)
    takes = (np.zeros(gpus), np.zeros(gpus), np.zeros(leaves), np.zeros(leaves))
    _count(active_GG, leaf_G, counts, chunks)
    row = np.empty(gpus, np.float32)
    levels = _Levels(_side(gpus), _side(gpus), _side(leaves), _side(leaves), row.copy(), row.copy())
    now, step, remaining, steps = 0.0, 0.0, counts[0].sum(), 0
    while remaining > few:
        _reset(levels, capacities, counts, takes, step)
        _solve(levels, active_GG, active_TGG, first_B1, leaf_G)
        _set_rates(levels, leaf_G)
        if steps == 0:
            step = _first_end(left_GG, levels, first_B1, leaf_G, row)
        now += step
        # How long this step has lasted, how long the next one will, and that with what rates may grow within it.
        spans = (np.float32(step), np.float32(tolerance * now), np.float32(tolerance * now * (1.0 + 4.0 * tolerance)))
        remaining -= _drain(
            left_GG, active_GG, active_TGG, finish_GG, levels, first_B1, leaf_G, row, counts, chunks, takes, now, spans
        )
        step = tolerance * now
        steps += 1
    return now, steps, (levels.out.level, levels.into.level, levels.up.level, levels.down.level)


@compiled
def _side(size: int) -> _Side:
    share = np.zeros(size)
    none = np.zeros(size, np.uint8)
    return _Side(np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size), none, share, share.view(np.int64))


@inlined
def _count(active_GG: Bytes, leaf_G: Ints, counts: _Counts, chunks: Ints) -> None:
    for s in range(len(active_GG)):
        for d in range(len(active_GG)):
            if active_GG[s, d]:
                counts[0][s] += 1
                counts[1][d] += 1
                counts[2][leaf_G[s], leaf_G[d]] += 1
                chunks[s, d // _CHUNK] += 1


# ---- levels


@inlined
def _reset(levels: _Levels, capacities: _Ends, counts: _Counts, takes: _Ends, step: float) -> None:
    """All links empty, but for the last bytes of what ends within the step."""
    per_s = 1.0 / step if step > 0 else 0.0
    for g in range(len(counts[0])):
        levels.out.free[g], levels.into.free[g] = counts[0][g], counts[1][g]
        levels.out.left[g] = capacities[0][g] - takes[0][g] * per_s
        levels.into.left[g] = capacities[1][g] - takes[1][g] * per_s
    for b in range(len(counts[2])):
        levels.up.free[b] = counts[2][b].sum() - counts[2][b, b]
        levels.down.free[b] = counts[2][:, b].sum() - counts[2][b, b]
        levels.up.left[b] = capacities[2][b] - takes[2][b] * per_s
        levels.down.left[b] = capacities[3][b] - takes[3][b] * per_s
    for side in (levels.out, levels.into, levels.up, levels.down):
        side.is_full[:] = 0
        for link in range(len(side.level)):
            side.before[link] = side.level[link]
        side.level[:] = np.inf
    for take in takes:
        take[:] = 0.0


@inlined
def _solve(levels: _Levels, active_GG: Bytes, active_TGG: Bytes, first_B1: Ints, leaf_G: Ints) -> None:
    """Progressive filling, many links at a time: links of one side share no flow."""
    out, into, up, down = levels.out, levels.into, levels.up, levels.down
    while True:
        low = (_least(out), _least(into), _least(up), _least(down))
        least = min(min(low[0], low[1]), min(low[2], low[3]))
        if least == np.inf:
            return
        if low[0] == least:
            _fill_ports(min(low[1], min(low[2], low[3])), out, into, up, down, active_GG, first_B1, leaf_G)
        elif low[1] == least:
            _fill_ports(min(low[0], min(low[2], low[3])), into, out, down, up, active_TGG, first_B1, leaf_G)
        elif low[2] == least:
            _fill_pipes(min(low[3], min(low[0], low[1])), up, out, into, down, active_GG, first_B1)
        else:
            _fill_pipes(min(low[2], min(low[0], low[1])), down, into, out, up, active_TGG, first_B1)


@inlined
def _least(side: _Side) -> float:
    """The lowest share of a side, whose shares it works out."""
    share, bits = side.share, side.share_bits
    for link in range(np.uint64(len(share))):
        level = max(side.left[link], 1e-30) / side.free[link]
        share[link] = np.inf if side.is_full[link] or side.free[link] < 0.5 else level
    least = bits[0]
    for link in range(np.uint64(len(bits))):
        least = min(least, bits[link])
    for link in range(len(bits)):
        if bits[link] == least:
            return float(share[link])
    return np.inf


@inlined
def _fill_ports(
    limit: float, own: _Side, far: _Side, pipe: _Side, far_pipe: _Side, active: Bytes, first_B1: Ints, leaf_G: Ints
) -> None:
    """Ports that are full before any link of another side: what they hold is taken out of the other links."""
    for port in range(np.uint64(len(own.left))):
        level = own.share[port]
        if level > limit * (1.0 + 1e-12) or level == np.inf:
            continue
        own.level[port], own.is_full[port] = level, 1
        leaf = leaf_G[port]
        for b in range(len(first_B1) - 1):
            if b != leaf and (pipe.is_full[leaf] or far_pipe.is_full[b]):
                continue
            if len(first_B1) > 2 and b != leaf:
                held = _held(active[port], far.is_full, first_B1[b], first_B1[b + 1])
                pipe.left[leaf] -= level * held
                pipe.free[leaf] -= held
                far_pipe.left[b] -= level * held
                far_pipe.free[b] -= held
            _take_row(active[port], far.left, far.free, level, first_B1[b], first_B1[b + 1])


@inlined
def _fill_pipes(
    limit: float, own: _Side, near: _Side, far: _Side, far_pipe: _Side, active: Bytes, first_B1: Ints
) -> None:
    """Pipes that are full before any link of another side hold all flows over them that are not held yet."""
    for leaf in range(len(own.left)):
        level = own.share[leaf]
        if level > limit * (1.0 + 1e-12) or level == np.inf:
            continue
        own.level[leaf], own.is_full[leaf] = level, 1
        for port in range(first_B1[leaf], first_B1[leaf + 1]):
            if near.is_full[port]:
                continue
            for b in range(len(first_B1) - 1):
                if b == leaf or far_pipe.is_full[b]:
                    continue
                held = _held(active[port], far.is_full, first_B1[b], first_B1[b + 1])
                near.left[port] -= level * held
                near.free[port] -= held
                far_pipe.left[b] -= level * held
                far_pipe.free[b] -= held
                _take_row(active[port], far.left, far.free, level, first_B1[b], first_B1[b + 1])


@inlined
def _take_row(row: Bytes, left: Floats, free: Floats, level: float, start: int, end: int) -> None:
    """Takes a row's flows out of their far ports; those that are full already do not care."""
    for g in range(np.uint64(start), np.uint64(end)):
        here = np.float64(row[g])
        left[g] -= level * here
        free[g] -= here


@inlined
def _held(row: Bytes, is_full: Bytes, start: int, end: int) -> int:
    """Flows of a row that are not held yet."""
    held = np.int64(0)
    for g in range(np.uint64(start), np.uint64(end)):
        held += row[g] & (1 - is_full[g])
    return int(held)


# ---- time


@inlined
def _set_rates(levels: _Levels, leaf_G: Ints) -> None:
    """What the receivers allow to senders under their leaf, and to others."""
    for d in range(np.uint64(len(leaf_G))):
        levels.near[d] = np.float32(levels.into.level[d])
        levels.far[d] = np.float32(min(levels.into.level[d], levels.down.level[leaf_G[d]]))


@inlined
def _row_rates(s: int, levels: _Levels, first_B1: Ints, leaf_G: Ints, row: Floats32, start: int, end: int) -> None:
    """What some flows of a sender get: the least level on their ways."""
    leaf, own, far, near = leaf_G[s], np.float32(levels.out.level[s]), levels.far, levels.near
    cap = min(own, np.float32(levels.up.level[leaf]))
    for d in range(np.uint64(start), np.uint64(end)):
        row[d] = min(cap, far[d])
    for d in range(np.uint64(max(first_B1[leaf], start)), np.uint64(min(first_B1[leaf + 1], end))):
        row[d] = min(own, near[d])


@inlined
def _first_end(left_GG: Floats32, levels: _Levels, first_B1: Ints, leaf_G: Ints, row: Floats32) -> float:
    first = np.inf
    for s in range(len(left_GG)):
        _row_rates(s, levels, first_B1, leaf_G, row, 0, len(row))
        for d in range(len(row)):
            if left_GG[s, d] < _NEVER:
                first = min(first, left_GG[s, d] / row[d])
    return first


@inlined
def _drain(
    left_GG: Floats32,
    active_GG: Bytes,
    active_TGG: Bytes,
    finish_GG: Floats,
    levels: _Levels,
    first_B1: Ints,
    leaf_G: Ints,
    row: Floats32,
    counts: _Counts,
    chunks: Ints,
    takes: _Ends,
    now: float,
    spans: tuple[np.float32, np.float32, np.float32],
) -> int:
    """Moves what flowed until now, and takes out what will end within the next step. How many those are."""
    ended = 0
    for s in range(np.uint64(len(left_GG))):
        if counts[0][s] == 0:
            continue
        for chunk in range(chunks.shape[1]):
            if chunks[s, chunk] == 0:
                continue
            start, end = chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(row))
            _row_rates(s, levels, first_B1, leaf_G, row, start, end)
            if not _drain_chunk(left_GG[s], row, spans[0], spans[2], start, end):
                continue
            for d in range(np.uint64(start), np.uint64(end)):
                if left_GG[s, d] > spans[2] * row[d] or active_GG[s, d] == 0:
                    continue
                last_s = _last_s(s, d, left_GG[s, d], row[d], levels, leaf_G, spans[1])
                if last_s <= spans[1]:
                    _end(s, d, left_GG, active_GG, active_TGG, leaf_G, counts, takes)
                    finish_GG[s, d] = now + last_s
                    left_GG[s, d] = _NEVER
                    chunks[s, chunk] -= 1
                    ended += 1
    return ended


@inlined
def _drain_chunk(left: Floats32, row: Floats32, step: np.float32, next_step: np.float32, start: int, end: int) -> bool:
    """Whether one of the chunk may end within the next step."""
    found = False
    for d in range(np.uint64(start), np.uint64(end)):
        rest = left[d] - step * row[d]
        left[d] = rest
        found |= rest <= next_step * row[d]
    return found


@inlined
def _last_s(
    s: int, d: int, rest: np.float32, rate: np.float32, levels: _Levels, leaf_G: Ints, step: np.float32
) -> float:
    """How long the rest takes when its rate goes on changing as it did from the step before to this one."""
    before = min(levels.out.before[s], levels.into.before[d])
    if leaf_G[s] != leaf_G[d]:
        before = min(before, min(levels.up.before[leaf_G[s]], levels.down.before[leaf_G[d]]))
    change = float(rate) - before if before < np.inf else 0.0
    slope = min(max(change, -0.5 * rate), 0.5 * rate)
    last_s = float(rest) / float(rate)
    if rest <= 0:
        return last_s
    return float(rest / (rate + slope * (0.5 + 0.5 * last_s / step)))


@inlined
def _end(
    s: int, d: int, left_GG: Floats32, active_GG: Bytes, active_TGG: Bytes, leaf_G: Ints, counts: _Counts, takes: _Ends
) -> None:
    a, b, rest = leaf_G[s], leaf_G[d], max(left_GG[s, d], np.float32(0.0))
    active_GG[s, d] = active_TGG[d, s] = 0
    counts[0][s] -= 1
    counts[1][d] -= 1
    counts[2][a, b] -= 1
    takes[0][s] += rest
    takes[1][d] += rest
    if a != b:
        takes[2][a] += rest
        takes[3][b] += rest
