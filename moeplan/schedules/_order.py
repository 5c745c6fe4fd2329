"""What a schedule is made of, and what can be said about one without a simulator: memory held, and a bound of its time.

An *order* is the tuple of slots that one stage works through; a schedule is one order per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from moeplan.domain.program import Floats, Ints
from moeplan.errors import SimulationError
from moeplan.jit import compiled

Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
_W, _NOBODY = KINDS.index("W"), -1


class Action(NamedTuple):
    """One pass of one micro-batch through one chunk of a stage.

    F is the forward pass, B the whole backward pass, I and W its halves: the gradient of the input, which the stage
    before waits for, and the gradient of the weights, which nobody waits for.
    """

    kind: Kind
    chunk: int
    microbatch: int


Slot = tuple[Action, ...]
"""One action, or two that run together, the compute of one hiding the communication of the other."""
Order = tuple[Slot, ...]
"""What one stage does, first to last."""


@lru_cache(maxsize=256)
def slots(kind: Kind, chunk: int, num_microbatches: int) -> Order:
    """One slot of one action for each micro-batch 0, 1, ...: the material that orders are cut from."""
    return tuple((Action(kind, chunk, microbatch),) for microbatch in range(num_microbatches))


def alternate(forwards: Order, backwards: Order, warm_up: int) -> Order:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    turns = len(forwards) - warm_up
    pairs = tuple(slot for pair in zip(forwards[warm_up:], backwards[:turns], strict=True) for slot in pair)
    return forwards[:warm_up] + pairs + backwards[turns:]


def peak_held(order: Sequence[Slot], *, activation: Sequence[float], weight_input: Sequence[float]) -> float:
    """The most that a stage holds at once, in the units of the arguments, which are per micro-batch, by chunk.

    F takes `activation[chunk]`; B frees it; I frees it but keeps `weight_input[chunk]`, what the weight gradient still
    needs, until W. A slot of two actions takes before it frees. One pass over the order.
    """
    held = peak = 0.0
    for slot in order:
        freed = 0.0
        for kind, chunk, _ in slot:
            if kind == "F":
                held += activation[chunk]
            elif kind == "B":
                freed += activation[chunk]
            elif kind == "I":
                freed += activation[chunk] - weight_input[chunk]
            else:
                freed += weight_input[chunk]
        peak = max(peak, held, held - freed)
        held -= freed
    return peak


def in_flight(order: Sequence[Slot], chunk: int | None = None) -> int:
    """The most micro-batches between F and the end of their backward (B, or W where split), of `chunk` or of all.

    A micro-batch counts once for each chunk it is held by.
    """
    weights = _weights(order, chunk)
    return int(peak_held(order, activation=weights, weight_input=weights))


def awaiting_weight_gradient(order: Sequence[Slot], chunk: int | None = None) -> int:
    """The most micro-batches between I and W, of `chunk` or of all chunks together; 0 where no backward is split."""
    weights = _weights(order, chunk)
    return int(peak_held(order, activation=[0.0] * len(weights), weight_input=weights))


def _weights(order: Sequence[Slot], chunk: int | None) -> list[float]:
    num_chunks = 1 + max((action.chunk for slot in order for action in slot), default=0)
    return [1.0 if chunk in (None, each) else 0.0 for each in range(num_chunks)]


class Times(NamedTuple):
    """Start and finish of every slot, `[stage][slot]`, in seconds; the actions of one slot share both."""

    start_s: list[list[float]]
    finish_s: list[list[float]]

    @property
    def step_s(self) -> float:
        """When the last stage to finish finishes, counted from the start of the first."""
        return max((stage[-1] for stage in self.finish_s if stage), default=0.0)


Paths = Sequence[Sequence[float]]
"""Seconds from the beginning of one action of a slot to the end of another (or its own)."""


def finish_times(
    orders: Sequence[Sequence[Slot]],
    *,
    virtual_stages: Sequence[Sequence[int]],
    durations_s: Sequence[Sequence[Mapping[str, float]]],
    hop_s: float = 0.0,
    before_s: Mapping[str, Sequence[float]] = MappingProxyType({}),
    pair_s: Callable[[int, Slot], Paths] | None = None,
) -> Times:
    """When every slot starts and finishes if each stage works in order and starts as soon as it may.

    F waits for F of the virtual stage before; B and I for B or I of the one after and for their own F; W for its own
    I; a dependency on another stage arrives `hop_s` after it finished, and what F, B or I of virtual stage v needs of
    its neighbour `before_s[kind][v]` later still. `virtual_stages[stage][chunk]` is the position
    in model order, `durations_s[stage][chunk][kind]` the seconds of an action, `pair_s(stage, slot)[i][j]` the least
    from the beginning of action i to the end of action j in a slot of two, whatever its micro-batches (None: nothing
    is hidden, both end after the sum).

    Sends cost no time of the stage and wires are never shared, so with costs that are lower bounds this is a lower
    bound. Raises SimulationError that names the stuck actions if the orders wait for one another.
    """
    listed = _listed(tuple(tuple(order) for order in orders))
    num_chunks = max(map(len, virtual_stages), default=0)
    board = _Board(1 + max((v for held in virtual_stages for v in held), default=0), listed.num_microbatches)
    needs_SCKN = np.zeros((len(orders), num_chunks, len(KINDS), 3), np.int64)
    seconds_SCKT = np.zeros((len(orders), num_chunks, len(KINDS), 2))
    for stage, (held, costs_s) in enumerate(zip(virtual_stages, durations_s, strict=True)):
        for chunk, (own, cost_s) in enumerate(zip(held, costs_s, strict=True)):
            needs_SCKN[stage, chunk] = board.rows(own)
            for kind, seconds in cost_s.items():
                later_s = before_s[kind][own] if kind in before_s else 0.0
                seconds_SCKT[stage, chunk, KINDS.index(kind)] = seconds, later_s
    paths_T22 = np.zeros((len(listed.pairs), 2, 2))
    if pair_s is not None and listed.pairs:
        paths_T22 = np.array([pair_s(stage, slot) for stage, slot in listed.pairs], np.float64)
    done_s, done_by = board.empty()
    start_s, finish_s = np.zeros(len(listed.kind_XA)), np.zeros(len(listed.kind_XA))
    at_S = _run(
        listed.first_S, listed.kind_XA, listed.chunk_XA, listed.microbatch_XA, listed.pair_X, needs_SCKN, seconds_SCKT,
        paths_T22, pair_s is not None, hop_s, done_s, done_by, start_s, finish_s,
    )  # fmt: skip
    stuck = [stage for stage, at in enumerate(at_S) if at < listed.first_S[stage + 1]]
    if stuck:
        waiting = [(stage, orders[stage][at_S[stage] - listed.first_S[stage]]) for stage in stuck[:4]]
        waits = "; ".join(f"stage {stage} at {_show(slot)}" for stage, slot in waiting)
        raise SimulationError(f"schedule: deadlock: {waits}; each waits for what never comes; reorder them")
    spans = [slice(*span) for span in pairwise(listed.first_S.tolist())]
    return Times([start_s[span].tolist() for span in spans], [finish_s[span].tolist() for span in spans])


class _Listed(NamedTuple):
    """Orders as arrays, all stages behind one another; an action that a slot does not have is -1.

    Axes: S stage, X slot, A action of a slot, T kind of pair.
    """

    first_S: Ints
    """Of each stage its first slot; the last element is their number."""
    kind_XA: Ints
    chunk_XA: Ints
    microbatch_XA: Ints
    pair_X: Ints
    """Which of `pairs` a slot of two is like."""
    pairs: tuple[tuple[int, Slot], ...]
    """A stage and a slot of each kind: stage, kinds and chunks."""
    num_microbatches: int


@lru_cache(maxsize=32)
def _listed(orders: tuple[Order, ...]) -> _Listed:
    first_S = np.cumsum([0, *map(len, orders)])
    columns = np.full((3, first_S[-1], 2), _NOBODY)
    pair_X = np.full(first_S[-1], _NOBODY)
    pairs: dict[tuple[object, ...], tuple[int, int, Slot]] = {}
    every = ((stage, slot) for stage, order in enumerate(orders) for slot in order)
    for at, (stage, slot) in enumerate(every):
        for place, (kind, chunk, microbatch) in enumerate(slot):
            columns[:, at, place] = KINDS.index(kind), chunk, microbatch
        if len(slot) > 1:
            alike = (stage, *((kind, chunk) for kind, chunk, _ in slot))
            pair_X[at] = pairs.setdefault(alike, (len(pairs), stage, slot))[0]
    kind_XA, chunk_XA, microbatch_XA = columns
    return _Listed(
        first_S, kind_XA, chunk_XA, microbatch_XA, pair_X, tuple((stage, slot) for _, stage, slot in pairs.values()),
        num_microbatches=1 + int(microbatch_XA.max(initial=0)),
    )  # fmt: skip


class _Board(NamedTuple):
    """What is done. F of virtual stage v and micro-batch m stands at v * M + m, B or I of it one block of V * M
    further, and behind them M places that are always done, for what need not wait.
    """

    num_virtual: int
    num_microbatches: int

    def rows(self, own: int) -> list[tuple[int, int, int]]:
        """By kind: where the two needs of a virtual stage and its own result begin."""
        always, last, size = 2 * self.num_virtual, self.num_virtual - 1, self.num_microbatches
        back = self.num_virtual + own
        before, after = (own - 1 if own else always), (back + 1 if own < last else always)
        backward = (after * size, own * size, back * size)
        needs = {"F": (before * size, always * size, own * size), "B": backward, "I": backward}
        return [needs.get(kind, (back * size, always * size, _NOBODY)) for kind in KINDS]

    def empty(self) -> tuple[Floats, Ints]:
        """When each place is done, nan: not yet; and by whom."""
        done_s = np.full((2 * self.num_virtual + 1) * self.num_microbatches, np.nan)
        done_s[2 * self.num_virtual * self.num_microbatches :] = 0.0
        return done_s, np.full(len(done_s), _NOBODY)


@compiled
def _run(
    first_S: Ints, kind_XA: Ints, chunk_XA: Ints, microbatch_XA: Ints, pair_X: Ints, needs_SCKN: Ints,
    seconds_SCKT: Floats, paths_T22: Floats, hides: bool, hop_s: float, done_s: Floats, done_by: Ints, start_s: Floats,
    finish_s: Floats,
) -> Ints:  # fmt: skip
    """Runs each stage until it must wait, in turn, until all wait or are through: the slots they then stand at."""
    at_S = first_S[:-1].copy()
    begins_s, ends_s, own_s = np.zeros(2), np.zeros(2), np.zeros(2)
    moved = True
    while moved:
        moved = False
        for stage in range(len(at_S)):
            while at_S[stage] < first_S[stage + 1]:
                x = at_S[stage]
                clock_s = finish_s[x - 1] if x > first_S[stage] else 0.0
                count = 1 if kind_XA[x, 1] == _NOBODY else 2
                for a in range(count):
                    needs_N = needs_SCKN[stage, chunk_XA[x, a], kind_XA[x, a]] + microbatch_XA[x, a]
                    own_s[a], later_s = seconds_SCKT[stage, chunk_XA[x, a], kind_XA[x, a]]
                    begins_s[a] = _begin_s(stage, clock_s, needs_N, later_s, hop_s, done_s, done_by)
                if np.isnan(begins_s[:count]).any():
                    break
                for a in range(count):
                    if count == 1 or not hides:
                        ends_s[a] = begins_s[:count].max() + own_s[:count].sum()
                    else:
                        ends_s[a] = (begins_s + paths_T22[pair_X[x], :, a]).max()
                    if kind_XA[x, a] != _W:
                        own = needs_SCKN[stage, chunk_XA[x, a], kind_XA[x, a], 2] + microbatch_XA[x, a]
                        done_s[own], done_by[own] = ends_s[a], stage
                start_s[x], finish_s[x] = begins_s[:count].min(), ends_s[:count].max()
                at_S[stage] += 1
                moved = True
    return at_S


@compiled
def _begin_s(
    stage: int, clock_s: float, needs_N: Ints, later_s: float, hop_s: float, done_s: Floats, done_by: Ints
) -> float:
    """When an action may begin on a stage that is free at `clock_s`; nan if what it needs is not done."""
    for n in range(2):
        there_s, by = float(done_s[needs_N[n]]), done_by[needs_N[n]]
        if n == 0:
            there_s += later_s
        if by != stage and by != _NOBODY:
            there_s += hop_s
        if np.isnan(there_s):
            return there_s
        clock_s = max(clock_s, there_s)
    return clock_s


def _show(slot: Slot) -> str:
    return " and ".join(f"{kind} of chunk {chunk}, micro-batch {microbatch}" for kind, chunk, microbatch in slot)
