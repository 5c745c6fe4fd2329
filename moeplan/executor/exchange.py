"""Exchanges over torch.distributed: rings, all-to-alls in the waves of the `collectives` menu, sends.

Everything is made of messages between two ranks, since then each transfer of the program is one message whose bytes
are counted, and receives can be posted before sends: gloo's own all-to-all takes twice the time of the wire between
two ranks, and its reduce-scatter moves as much as an all-reduce.

Axes: G members of a group, N groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeplan import menu
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave
from moeplan.executor.conditions import exchanging

_CLOSE = 1e-9


class Wire:
    """The messages of one stream of one rank, which come and go in the order of its tasks; counts bytes by receiver."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.sent_bytes: dict[int, int] = defaultdict(int)

    def swap(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """Sends and receives at once, receives first; a message without a byte is not sent, as both sides know."""
        ops = [dist.P2POp(dist.irecv, each, source, self.group) for source, each in receives if each.numel()]
        for target, each in sends:
            if each.numel():
                self.sent_bytes[target] += each.numel() * each.element_size()
                ops.append(dist.P2POp(dist.isend, each.contiguous(), target, self.group))
        with exchanging():
            for work in dist.batch_isend_irecv(ops) if ops else ():
                work.wait()

    def taken_bytes(self) -> dict[int, int]:
        """What has been sent to whom since the last time."""
        found, self.sent_bytes = dict(self.sent_bytes), defaultdict(int)
        return found


# ---- rings


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """The rings of one group, each in the order of the ring, as numbers of members; and which member this is."""

    ranks: tuple[int, ...]
    me: int
    orders: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(exchange: Exchange, cluster: Cluster, rank: int) -> Ring:
        """The rings that the dish says, in the group of `rank`."""
        one = mine(exchange, rank)
        ranks = tuple(one.groups_NG[0].tolist())
        (wave,) = menu.load("collectives", exchange.algorithm, "waves")(one, cluster)
        orders = [_in_order(wave.source_F[wave.bundle_F == ring].tolist(), ranks) for ring in np.unique(wave.bundle_F)]
        return Ring(ranks=ranks, me=ranks.index(rank), orders=tuple(orders))

    @staticmethod
    def simple(ranks: Sequence[int], rank: int) -> Ring:
        """One ring in the given order."""
        return Ring(ranks=tuple(ranks), me=tuple(ranks).index(rank), orders=(tuple(range(len(ranks))),))

    def gather(self, wire: Wire, chunks: Sequence[Tensor]) -> None:
        """Fills the chunk of every member in place, in G - 1 steps."""
        self._go_round(wire, chunks, first=0)

    def reduce_scatter(self, wire: Wire, chunks: Sequence[Tensor]) -> None:
        """Sums this member's chunk over all members in place, in G - 1 steps; the other chunks are used up."""
        self._go_round(wire, chunks, first=1)

    def all_reduce(self, wire: Wire, chunks: Sequence[Tensor]) -> None:
        """Sums all chunks over all members in place."""
        self.reduce_scatter(wire, chunks)
        self.gather(wire, chunks)

    def _go_round(self, wire: Wire, chunks: Sequence[Tensor], *, first: int) -> None:
        """Step t passes on what set out t members behind (`first` 0: as it is) or t + 1 behind (1: added up)."""
        size, pieces = len(self.ranks), [_pieces(chunk, len(self.orders)) for chunk in chunks]
        for step in range(size - 1):
            sends, receives, sums = [], [], []
            for ring, order in enumerate(self.orders):
                at = order.index(self.me)
                here, coming = (order[(at - step - first - more) % size] for more in (0, 1))
                target = pieces[coming][ring]
                buffer = torch.empty_like(target) if first else target
                sends.append((self.ranks[order[(at + 1) % size]], pieces[here][ring]))
                receives.append((self.ranks[order[(at - 1) % size]], buffer))
                sums.append((target, buffer))
            wire.swap(sends, receives)
            if first:
                for target, buffer in sums:
                    target.add_(buffer)


def _in_order(sources: list[int], ranks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(ranks.index(source) for source in sources)


def _pieces(chunk: Tensor, count: int) -> list[Tensor]:
    flat, size = chunk.view(-1), chunk.numel()
    return [flat[ring * size // count : (ring + 1) * size // count] for ring in range(count)]


def mine(exchange: Exchange, rank: int) -> Exchange:
    """The exchange of the group of `rank` alone."""
    row = np.flatnonzero((exchange.groups_NG == rank).any(axis=1))[:1]
    return replace(exchange, groups_NG=exchange.groups_NG[row])


# ---- all-to-alls


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """A piece of what member `start` has for member `end`, from `low` to `high` of it, goes from one to the next."""

    source: int
    target: int
    start: int
    end: int
    low: float
    high: float

    def rows(self, count: int) -> slice:
        """Which of the `count` rows that `start` has for `end` the piece holds."""
        return slice(round(self.low * count), round(self.high * count))


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """The hops of an all-to-all in one group, wave by wave."""

    ranks: tuple[int, ...]
    me: int
    waves: tuple[tuple[Hop, ...], ...]

    @staticmethod
    def of(exchange: Exchange, cluster: Cluster, rank: int) -> Route:
        """The hops that the dish says.

        A dish tells how much goes where, and not what. Where each pair's bytes go straight, what is told for a pair is
        a part of its rows; elsewhere the dish is asked for one pair at a time, which its law makes the same.
        """
        one = mine(exchange, rank)
        ranks = tuple(one.groups_NG[0].tolist())
        dish = menu.module("collectives", exchange.algorithm)
        waves: list[Wave] = dish.waves(one, cluster)
        wanted_GG = _shares(one)
        if np.allclose(_sums(waves, ranks), wanted_GG, atol=_CLOSE):
            hops = _straight(waves, ranks, wanted_GG)
        else:
            pairs = [(int(i), int(j)) for i, j in np.argwhere(wanted_GG > 0)]
            hops = [each for pair in pairs for each in _followed(dish.waves(_only(one, pair), cluster), ranks, pair)]
        return Route(ranks=ranks, me=ranks.index(rank), waves=_by_wave(hops))

    def run(self, wire: Wire, parcels: Sequence[Tensor], counts_GG: Ints) -> list[Tensor]:
        """What every member has for this one, by member; `parcels[j]` are the rows for member j."""
        held: dict[Hop, Tensor] = {}
        like, me = parcels[self.me], self.me
        for wave in self.waves:
            first = [hop for hop in wave if hop.source == hop.start == me]
            held |= {hop: parcels[hop.end][hop.rows(int(counts_GG[me, hop.end]))] for hop in first}
        for wave in self.waves:
            out, into = self._messages(wave, counts_GG)
            sends = [(self.ranks[j], _together([_found(held, hop) for hop in hops])) for j, hops in out.items()]
            sizes = {i: [_length(hop, counts_GG) for hop in hops] for i, hops in into.items()}
            receives = [(self.ranks[i], like.new_empty(sum(sizes[i]), *like.shape[1:])) for i in into]
            wire.swap(sends, receives)
            for (i, hops), (_, rows) in zip(into.items(), receives, strict=True):
                held |= dict(zip(hops, rows.split(sizes[i]), strict=True))
        return [parcels[me] if start == me else self._arrived(held, start, like) for start in range(len(self.ranks))]

    def _messages(self, wave: tuple[Hop, ...], counts_GG: Ints) -> tuple[dict[int, list[Hop]], dict[int, list[Hop]]]:
        """What this member sends in a wave by receiver, and gets by sender; rows in one order on both sides."""
        out: dict[int, list[Hop]] = defaultdict(list)
        into: dict[int, list[Hop]] = defaultdict(list)
        for hop in wave:
            if hop.source == self.me:
                out[hop.target].append(hop)
            elif hop.target == self.me:
                into[hop.source].append(hop)
        return out, into

    def _arrived(self, held: dict[Hop, Tensor], start: int, like: Tensor) -> Tensor:
        last = [hop for wave in self.waves for hop in wave if hop.start == start and hop.end == self.me == hop.target]
        parts = [held[hop] for hop in sorted(last, key=lambda hop: hop.low)]
        return _together(parts) if parts else like.new_empty(0, *like.shape[1:])


def _together(parts: list[Tensor]) -> Tensor:
    """One after another; of one part no copy."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _found(held: dict[Hop, Tensor], hop: Hop) -> Tensor:
    """The rows of a piece, as they came with the hop before or were here from the start."""
    if hop in held:
        return held[hop]
    same = (hop.start, hop.end, hop.low, hop.high)
    return next(
        rows
        for before, rows in held.items()
        if before.target == hop.source and (before.start, before.end, before.low, before.high) == same
    )


def _length(hop: Hop, counts_GG: Ints) -> int:
    rows = hop.rows(int(counts_GG[hop.start, hop.end]))
    return int(rows.stop - rows.start)


def _shares(one: Exchange) -> np.ndarray:
    size = one.groups_NG.shape[1]
    share_GG = np.full((size, size), 1.0 / size) if one.share_GG is None else one.share_GG
    return np.asarray(share_GG * (1.0 - np.eye(size)))


def _only(one: Exchange, pair: tuple[int, int]) -> Exchange:
    """The exchange in which one member has something for one other."""
    share_GG = np.zeros((one.groups_NG.shape[1],) * 2)
    share_GG[pair] = 1.0
    return replace(one, share_GG=share_GG)


def _transfers(waves: Sequence[Wave], ranks: tuple[int, ...]) -> Iterator[tuple[int, int, int, float]]:
    """Wave, sender, receiver and share of each transfer, as numbers of members."""
    for number, wave in enumerate(waves):
        columns = (wave.source_F.tolist(), wave.target_F.tolist(), wave.share_F.tolist())
        for source, target, share in zip(*columns, strict=True):
            yield number, ranks.index(source), ranks.index(target), share


def _sums(waves: Sequence[Wave], ranks: tuple[int, ...]) -> np.ndarray:
    found_GG = np.zeros((len(ranks),) * 2)
    for _, i, j, share in _transfers(waves, ranks):
        found_GG[i, j] += share
    return found_GG


def _straight(waves: Sequence[Wave], ranks: tuple[int, ...], wanted_GG: np.ndarray) -> list[tuple[int, Hop]]:
    """Each transfer takes the next part of the pair's rows."""
    gone_GG, found = np.zeros_like(wanted_GG), []
    for number, i, j, share in _transfers(waves, ranks):
        low = gone_GG[i, j]
        gone_GG[i, j] += share / wanted_GG[i, j]
        high = 1.0 if gone_GG[i, j] > 1 - _CLOSE else float(gone_GG[i, j])
        found.append((number, Hop(source=i, target=j, start=i, end=j, low=float(low), high=high)))
    return found


def _followed(waves: Sequence[Wave], ranks: tuple[int, ...], pair: tuple[int, int]) -> list[tuple[int, Hop]]:
    """The hops of one pair's rows: each transfer out of the sender is a piece, which is followed to the receiver."""
    start, end = pair
    left = list(_transfers(waves, ranks))
    found, low = [], 0.0
    for first in [each for each in left if each[1] == start]:
        high = low + first[3]
        high = 1.0 if high > 1 - _CLOSE else high
        step: tuple[int, int, int, float] | None = first
        while step is not None:
            left.remove(step)
            number, i, j, share = step
            found.append((number, Hop(source=i, target=j, start=start, end=end, low=low, high=high)))
            onward = [each for each in left if each[0] > number and each[1] == j and abs(each[3] - share) < _CLOSE]
            step = onward[0] if j != end else None
        low = high
    return found


def _by_wave(hops: list[tuple[int, Hop]]) -> tuple[tuple[Hop, ...], ...]:
    count = 1 + max((number for number, _ in hops), default=-1)
    waves: list[list[Hop]] = [[] for _ in range(count)]
    for number, hop in hops:
        waves[number].append(hop)
    order = [sorted(wave, key=lambda hop: (hop.source, hop.target, hop.start, hop.end, hop.low)) for wave in waves]
    return tuple(tuple(wave) for wave in order)
