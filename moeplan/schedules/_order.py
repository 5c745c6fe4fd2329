"""What a schedule is made of, and what can be said about one without a simulator: memory held, and a bound of its time.

An *order* is the tuple of slots that one stage works through; a schedule is one order per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

from moeplan.errors import SimulationError

Kind = Literal["F", "B", "I", "W"]


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
    from the beginning of action i to the end of action j in a slot of two (None: nothing is hidden, both end after
    the sum).

    Sends cost no time of the stage and wires are never shared, so with costs that are lower bounds this is a lower
    bound. Raises SimulationError that names the stuck actions if the orders wait for one another.
    """
    run = _Run(orders, virtual_stages, hop_s, before_s, pair_s)
    tables = [run.table(stage, costs_s) for stage, costs_s in enumerate(durations_s)]
    awake = list(range(len(orders)))
    while awake:
        stage = awake.pop()
        awake += run.advance(stage, tables[stage])
    stuck = [stage for stage, order in enumerate(orders) if len(run.times.start_s[stage]) < len(order)]
    if stuck:
        waits = "; ".join(f"stage {stage} at {_show(run.next_slot(stage))}" for stage in stuck[:4])
        raise SimulationError(f"schedule: deadlock: {waits}; each waits for what never comes; reorder them")
    return run.times


_Row = tuple[int, int, int, float, float]
_NOBODY = -1


class _Run:
    """What is done, when and by whom, and which stages wait for it.

    F of virtual stage v and micro-batch m stands at v * M + m, B or I of it one block of V * M further, and behind
    them M places that are always done, for what need not wait.
    """

    def __init__(
        self,
        orders: Sequence[Sequence[Slot]],
        virtual_stages: Sequence[Sequence[int]],
        hop_s: float,
        before_s: Mapping[str, Sequence[float]],
        pair_s: Callable[[int, Slot], Paths] | None,
    ) -> None:
        microbatches = {action.microbatch for order in orders for slot in order for action in slot}
        self.orders, self.virtual_stages = orders, virtual_stages
        self.hop_s, self.before_s, self.pair_s = hop_s, before_s, pair_s
        self.num_virtual = 1 + max((position for stage in virtual_stages for position in stage), default=0)
        self.num_microbatches = 1 + max(microbatches, default=0)
        pending = 2 * self.num_virtual * self.num_microbatches
        self.done_s: list[float | None] = [None] * pending + [0.0] * self.num_microbatches
        self.done_by = [_NOBODY] * len(self.done_s)
        self.waiting: dict[int, list[int]] = {}
        self.times = Times([[] for _ in orders], [[] for _ in orders])

    def table(self, stage: int, costs_s: Sequence[Mapping[str, float]]) -> list[dict[str, _Row]]:
        """By chunk and kind: where on the board its two needs and its own result begin, and its seconds."""
        always, last = 2 * self.num_virtual, self.num_virtual - 1
        table = []
        for own, cost_s in zip(self.virtual_stages[stage], costs_s, strict=True):
            back = self.num_virtual + own
            before, after = (own - 1 if own else always), (back + 1 if own < last else always)
            backward = (after, own, back)
            needs = {"F": (before, always, own), "B": backward, "I": backward, "W": (back, always, _NOBODY)}
            later_s = {kind: self.before_s[kind][own] if kind in self.before_s else 0.0 for kind in cost_s}
            table.append({kind: self._row(*needs[kind], seconds, later_s[kind]) for kind, seconds in cost_s.items()})
        return table

    def _row(self, first: int, second: int, own: int, seconds: float, later_s: float) -> _Row:
        size = self.num_microbatches
        return first * size, second * size, own * size if own != _NOBODY else _NOBODY, seconds, later_s

    def next_slot(self, stage: int) -> Slot:
        """The first slot that a stage has not run."""
        return self.orders[stage][len(self.times.start_s[stage])]

    def advance(self, stage: int, table: list[dict[str, _Row]]) -> list[int]:
        """Runs one stage until it must wait; returns the stages that waited for what it did."""
        order, done_s, done_by, hop_s = self.orders[stage], self.done_s, self.done_by, self.hop_s
        start_s, finish_s = self.times.start_s[stage], self.times.finish_s[stage]
        clock_s = finish_s[-1] if finish_s else 0.0
        woken: list[int] = []
        for place in range(len(start_s), len(order)):
            slot = order[place]
            begins_s = []
            for kind, chunk, microbatch in slot:
                row, begin_s = table[chunk][kind], clock_s
                for need, later_s in ((row[0] + microbatch, row[4]), (row[1] + microbatch, 0.0)):
                    there_s = done_s[need]
                    if there_s is None:
                        self.waiting.setdefault(need, []).append(stage)
                        return woken
                    there_s += later_s
                    if done_by[need] != stage and done_by[need] != _NOBODY:
                        there_s += hop_s
                    if there_s > begin_s:
                        begin_s = there_s
                begins_s.append(begin_s)
            if len(slot) == 1:
                clock_s = begins_s[0] + table[slot[0].chunk][slot[0].kind][3]
                ends_s = [clock_s]
            else:
                clock_s, ends_s = self._pair(stage, slot, begins_s, table)
            start_s.append(min(begins_s))
            finish_s.append(clock_s)
            for (kind, chunk, microbatch), end_s in zip(slot, ends_s, strict=True):
                own = table[chunk][kind][2]
                if own != _NOBODY:
                    done_s[own + microbatch], done_by[own + microbatch] = end_s, stage
                    if own + microbatch in self.waiting:
                        woken += self.waiting.pop(own + microbatch)
        return woken

    def _pair(
        self, stage: int, slot: Slot, begins_s: list[float], table: list[dict[str, _Row]]
    ) -> tuple[float, list[float]]:
        """When a slot of two ends, and its actions: both at the end, or each by the paths through the slot."""
        if self.pair_s is None:
            end_s = max(begins_s) + sum(table[chunk][kind][3] for kind, chunk, _ in slot)
            return end_s, [end_s] * len(slot)
        paths_s = self.pair_s(stage, slot)
        ends_s = [max(begin_s + paths_s[i][j] for i, begin_s in enumerate(begins_s)) for j in range(len(slot))]
        return max(ends_s), ends_s


def _show(slot: Slot) -> str:
    return " and ".join(f"{kind} of chunk {chunk}, micro-batch {microbatch}" for kind, chunk, microbatch in slot)
