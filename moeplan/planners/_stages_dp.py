"""The best cut of a chain of layers into stages, each on a submesh: Alpa's inter-operator dynamic programme, exactly.

A step of B micro-batches takes  sum of stages' seconds + (B - 1) * the slowest stage's.  For a ceiling on the slowest
stage the programme finds the least sum; the ceiling falls from one answer to the next until no lower one can win.
Alpa raises the ceiling through all stage times instead and keeps the number of stages in the state. Here a state keeps
only the tails that are not beaten in both seconds and number of stages: fewer stages never break the memory rule, so
nothing is lost. Reference: Zheng et al., "Alpa" (OSDI 2022), section 5.2, equations 2 to 6, and appendix on memory.

Axes: I first layer of a stage, J layer behind its last, U submesh, C configuration of a submesh, D GPUs used,
P stage on a submesh (i, j, u), X configuration of one that is not beaten by another, Y tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moeplan.domain.program import Floats, Ints
from moeplan.errors import InfeasibleError
from moeplan.jit import compiled

MANY = 1 << 30
"""Stages behind one another: as many as there may be."""
_CLOSE = 1.01
"""The least ceiling that can be kept is looked for this closely; the rest is left to the descent."""
_START_LABELS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageProblem:
    """What every stage would take: layers i to j - 1 on submesh u, configured in way c.

    `most_IJUC`: how many stages, itself included, may follow until the end. Under 1F1B a stage holds the activations
    of so many micro-batches, so that is where Alpa's memory rule goes: weights + s * activations <= memory.
    """

    seconds_IJUC: Floats
    """inf where there is no such stage."""
    most_IJUC: Ints
    gpus_U: Ints
    num_gpus: int
    num_microbatches: int


class Stage(NamedTuple):
    """Layers `first` to `end` - 1."""

    first: int
    end: int
    submesh: int
    configuration: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """The best cut, its latency, and in how many runs of the programme it was found."""

    stages: tuple[Stage, ...]
    step_s: float
    runs: int


class _Front(NamedTuple):
    """For each (i, j, u) the configurations that no other beats, from `first_P[p]` on, faster and leaner ones."""

    first_P: Ints
    seconds_X: Floats
    most_X: Ints
    of_X: Ints
    """Flat index into `seconds_IJUC`."""


def _asked(problem: StageProblem, front: _Front) -> tuple[int, int, Ints, Floats, Ints, Ints]:
    """What compiled functions ask for."""
    layers, gpus = _sizes(problem)
    return layers, gpus, front.first_P, front.seconds_X, front.most_X, problem.gpus_U


def cut_into_stages(problem: StageProblem) -> Stages:
    """The cut with the least  sum t_i + (B - 1) max t_i  that uses all GPUs. Raises InfeasibleError if none fits.

    Proof of the descent: under a ceiling the answer has the least sum, F, and a slowest stage of m. Any other whose
    slowest is m or above costs F + (B - 1) m or more; so the ceiling may drop below m. It ends when F, which only
    grows, and the least ceiling that any cut keeps make no better sum.
    """
    front = _front(problem)
    times_X = np.unique(front.seconds_X)
    least, kept, runs = _least_ceiling(problem, front, times_X)
    again, best = problem.num_microbatches - 1, _traced_counts(problem, front, kept)
    ceiling_s, behind_s = np.inf, _heads(*_asked(problem, front), np.inf)[-1, -1]
    while True:
        if again:
            ceiling_s = min(ceiling_s, (_step_s(best, again) - behind_s) / again)
        found = _under(problem, front, ceiling_s, limit_s=_step_s(best, again) - again * least)
        runs += 1
        if not found:
            return Stages(stages=best, step_s=_step_s(best, again), runs=runs)
        best = min(best, found, key=lambda each: _step_s(each, again))
        behind_s = sum(stage.seconds for stage in found)
        ceiling_s = float(np.nextafter(max(stage.seconds for stage in found), 0.0))


def _step_s(stages: tuple[Stage, ...], again: int) -> float:
    return sum(stage.seconds for stage in stages) + again * max(stage.seconds for stage in stages)


def _sizes(problem: StageProblem) -> tuple[int, int]:
    return len(problem.seconds_IJUC), problem.num_gpus


def _front(problem: StageProblem) -> _Front:
    """Sorted by seconds; kept are those that allow more stages than all faster ones."""
    shape = problem.seconds_IJUC.shape
    seconds_PC, most_PC = problem.seconds_IJUC.reshape(-1, shape[3]), problem.most_IJUC.reshape(-1, shape[3])
    order_PC = np.lexsort((-most_PC, seconds_PC), axis=1)
    seconds_PC = np.take_along_axis(seconds_PC, order_PC, axis=1)
    most_PC = np.take_along_axis(most_PC, order_PC, axis=1)
    before_PC = np.maximum.accumulate(np.pad(most_PC, ((0, 0), (1, 0)))[:, :-1], axis=1)
    kept_PC = np.isfinite(seconds_PC) & (most_PC > before_PC)
    first_P = np.concatenate([[0], np.cumsum(kept_PC.sum(axis=1))])
    index_PC = np.arange(len(order_PC))[:, None] * shape[3] + order_PC
    return _Front(first_P, seconds_PC[kept_PC], most_PC[kept_PC].astype(np.int64), index_PC[kept_PC])


def _least_ceiling(problem: StageProblem, front: _Front, times_X: Floats) -> tuple[float, float, int]:
    """A bound of the least ceiling under which there is a cut, one under which there is, and the runs it took."""
    low, high, runs = -1, len(times_X) - 1, 1
    if not len(times_X) or not _has_cut(problem, front, np.inf):
        layers, gpus = _sizes(problem)
        raise InfeasibleError(f"no cut of {layers} layers into stages on all {gpus} GPUs fits their memory; use more")
    while high - low > 1 and (low < 0 or times_X[high] > _CLOSE * times_X[low]):
        middle, runs = (low + high) // 2, runs + 1
        low, high = (low, middle) if _has_cut(problem, front, times_X[middle]) else (middle, high)
    return float(times_X[low + 1]), float(times_X[high]), runs


def _has_cut(problem: StageProblem, front: _Front, ceiling_s: float) -> bool:
    return bool(_counts(*_asked(problem, front), ceiling_s)[0, -1] < MANY)


def _traced_counts(problem: StageProblem, front: _Front, ceiling_s: float) -> tuple[Stage, ...]:
    """A cut with the fewest stages under a ceiling."""
    count_ID = _counts(*_asked(problem, front), ceiling_s)
    at, left, found = 0, problem.num_gpus, []
    layers, submeshes = len(count_ID) - 1, len(problem.gpus_U)
    while at < layers:
        for p in range(at * (layers + 1) * submeshes, (at + 1) * (layers + 1) * submeshes):
            end, submesh = divmod(p % ((layers + 1) * submeshes), submeshes)
            rest = left - int(problem.gpus_U[submesh])
            x = _allowed(front, p, ceiling_s, int(count_ID[at, left])) if rest >= 0 else -1
            if x >= 0 and count_ID[end, rest] == count_ID[at, left] - 1:
                found.append(_stage(problem, front, x))
                at, left = end, rest
                break
    return tuple(found)


def _allowed(front: _Front, p: int, ceiling_s: float, count: int) -> int:
    chosen = range(front.first_P[p], front.first_P[p + 1])
    return next((x for x in chosen if front.seconds_X[x] <= ceiling_s and front.most_X[x] >= count), -1)


def _stage(problem: StageProblem, front: _Front, x: int) -> Stage:
    first, end, submesh, way = np.unravel_index(front.of_X[x], problem.seconds_IJUC.shape)
    return Stage(int(first), int(end), int(submesh), int(way), float(front.seconds_X[x]))


def _under(problem: StageProblem, front: _Front, ceiling_s: float, *, limit_s: float) -> tuple[Stage, ...]:
    """The cut with the least sum of seconds under a ceiling; none if that is not below `limit_s`."""
    head_JD = _heads(*_asked(problem, front), ceiling_s)
    if not head_JD[-1, -1] < limit_s:
        return ()
    room = _START_LABELS
    while True:
        y, stage_Y, behind_Y = _tails(head_JD, *_asked(problem, front)[2:], ceiling_s, limit_s, room)
        if y != -2:
            break
        room *= 4
    found = []
    while y >= 0 and stage_Y[y] >= 0:
        found.append(_stage(problem, front, int(stage_Y[y])))
        y = int(behind_Y[y])
    return tuple(found)


# ---- compiled


@compiled
def _counts(
    layers: int, gpus: int, first_P: Ints, seconds_X: Floats, most_X: Ints, gpus_U: Ints, ceiling_s: float
) -> Ints:
    """[I, D]: fewest stages for layers i to the end on exactly d GPUs, no stage above the ceiling."""
    count_ID = np.full((layers + 1, gpus + 1), MANY, np.int64)
    count_ID[layers, 0] = 0
    for i in range(layers - 1, -1, -1):
        for j in range(i + 1, layers + 1):
            for u in range(len(gpus_U)):
                p, most = (i * (layers + 1) + j) * len(gpus_U) + u, 0
                for x in range(first_P[p], first_P[p + 1]):
                    if seconds_X[x] <= ceiling_s:
                        most = most_X[x]
                if most > 0:
                    size = gpus_U[u]
                    here, there = count_ID[i, size:], count_ID[j, : gpus + 1 - size]
                    for d in range(len(here)):
                        count = there[d] + 1
                        here[d] = min(here[d], count if count <= most else MANY)
    return count_ID


@compiled
def _heads(
    layers: int, gpus: int, first_P: Ints, seconds_X: Floats, most_X: Ints, gpus_U: Ints, ceiling_s: float
) -> Floats:
    """[J, D]: the least sum for layers 0 to j - 1 on exactly d GPUs, whatever follows: a bound of every head."""
    head_JD = np.full((layers + 1, gpus + 1), np.inf)
    head_JD[0, 0] = 0.0
    for j in range(1, layers + 1):
        for i in range(j):
            for u in range(len(gpus_U)):
                p = (i * (layers + 1) + j) * len(gpus_U) + u
                if first_P[p] < first_P[p + 1] and seconds_X[first_P[p]] <= ceiling_s:
                    seconds, size = seconds_X[first_P[p]], gpus_U[u]
                    here, there = head_JD[j, size:], head_JD[i, : gpus + 1 - size]
                    for d in range(len(here)):
                        here[d] = min(here[d], there[d] + seconds)
    return head_JD


@compiled
def _tails(
    head_JD: Floats, first_P: Ints, seconds_X: Floats, most_X: Ints, gpus_U: Ints, ceiling_s: float, limit_s: float,
    room: int,
) -> tuple[int, Ints, Ints]:  # fmt: skip
    """The best tail of all layers, and of each tail its first stage and the tail behind it. -1: none, -2: no room.

    Tails of layers i to the end on d GPUs hang in a list, none beaten in both seconds and number of stages by another.
    """
    layers, gpus = head_JD.shape[0] - 1, head_JD.shape[1] - 1
    top_ID = np.full((layers + 1, gpus + 1), -1, np.int64)
    seconds_Y, count_Y = np.zeros(room), np.zeros(room, np.int64)
    next_Y, stage_Y, behind_Y = np.full(room, -1), np.full(room, -1), np.full(room, -1)
    top_ID[layers, 0], used = 0, 1
    for j in range(layers, 0, -1):
        for d in range(gpus + 1):
            y = top_ID[j, d]
            while y >= 0:
                for i in range(j - 1, -1, -1):
                    for u in range(len(gpus_U)):
                        p, to = (i * (layers + 1) + j) * len(gpus_U) + u, d + gpus_U[u]
                        if to > gpus:
                            continue
                        for x in range(first_P[p], first_P[p + 1]):
                            seconds = seconds_Y[y] + seconds_X[x]
                            if seconds_X[x] > ceiling_s or seconds + head_JD[i, gpus - to] >= limit_s:
                                break
                            if count_Y[y] + 1 > most_X[x]:
                                continue
                            if used == room:
                                return -2, stage_Y, behind_Y
                            seconds_Y[used], count_Y[used] = seconds, count_Y[y] + 1
                            stage_Y[used], behind_Y[used] = x, y
                            used += _hang(top_ID[i], to, used, seconds_Y, count_Y, next_Y)
                            break
                y = next_Y[y]
    best = top_ID[0, gpus]
    y = best
    while y >= 0:
        if seconds_Y[y] < seconds_Y[best]:
            best = y
        y = next_Y[y]
    return best, stage_Y, behind_Y


@compiled
def _hang(top_D: Ints, d: int, new: int, seconds_Y: Floats, count_Y: Ints, next_Y: Ints) -> int:
    """1 if tail `new` was hung into the list at d; the tails that it beats are taken off."""
    before, y = -1, top_D[d]
    while y >= 0:
        after = next_Y[y]
        if seconds_Y[y] <= seconds_Y[new] and count_Y[y] <= count_Y[new]:
            return 0
        if seconds_Y[new] <= seconds_Y[y] and count_Y[new] <= count_Y[y]:
            if before < 0:
                top_D[d] = after
            else:
                next_Y[before] = after
        else:
            before = y
        y = after
    next_Y[new] = top_D[d]
    top_D[d] = new
    return 1
