"""The cheapest sharding of every operator of a graph: exactly, by eliminating one operator after another.

An operator has shardings, each with seconds and bytes; an edge has the seconds of resharding between each two. Without
a memory limit the least sum is found by dynamic programming over the graph. With one, bytes get a price: for any price
min(seconds + price * bytes) - price * limit  is a bound, and where it leaves a doubt, the ILP decides.
References: Zheng et al., "Alpa" (OSDI 2022), section 4.2, for the problem; Bertele and Brioschi, "Nonserial dynamic
programming" (1972), for elimination; Everett, Operations Research 11 (1963), for prices.

Axes: S sharding of an operator (two in a row: of the tail and of the head of an edge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np

from moeplan.domain.program import Floats, Ints
from moeplan.errors import PlanError

Table = tuple[tuple[int, ...], Floats]
"""Seconds by the shardings of some operators: their numbers, rising, and an array with an axis for each."""
ROUNDING = 1e-9
_PRICES = 60
_LAST_STOP_S = 30.0
"""An ILP that takes longer leaves what is known, with its own bound."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardingProblem:
    """Operators by number, with what each sharding costs and holds, and what edges (tail, head) cost."""

    seconds_S: tuple[Floats, ...]
    bytes_S: tuple[Floats, ...]
    edges_SS: Mapping[tuple[int, int], Floats]
    memory_bytes: float = inf

    def seconds(self, choice: tuple[int, ...]) -> float:
        """What a choice takes: its operators and its edges."""
        operators = sum(float(s[at]) for s, at in zip(self.seconds_S, choice, strict=True))
        return operators + sum(float(r[choice[v], choice[w]]) for (v, w), r in self.edges_SS.items())

    def size_bytes(self, choice: tuple[int, ...]) -> float:
        """What a choice holds."""
        return sum(float(m[at]) for m, at in zip(self.bytes_S, choice, strict=True))

    def only(self, kept: Sequence[Ints]) -> ShardingProblem:
        """The same with these shardings of each operator alone."""
        return ShardingProblem(
            seconds_S=tuple(s[at] for s, at in zip(self.seconds_S, kept, strict=True)),
            bytes_S=tuple(m[at] for m, at in zip(self.bytes_S, kept, strict=True)),
            edges_SS={(v, w): table[np.ix_(kept[v], kept[w])] for (v, w), table in self.edges_SS.items()},
            memory_bytes=self.memory_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """A sharding of each operator, and a bound of what any that fits takes; `proof` says where the bound is from."""

    choice: tuple[int, ...]
    seconds: float
    size_bytes: float
    lower_bound_s: float
    proof: str


def cheapest_sharding(problem: ShardingProblem) -> Sharding | None:
    """The best choice that fits, with its bound: its own seconds, unless a last stop cut in. None if none fits."""
    free = eliminate(problem)
    if problem.size_bytes(free) <= problem.memory_bytes:
        return answer(problem, free, bound_s=problem.seconds(free), proof="elimination")
    found = by_price(problem)
    if found is None or found[0].seconds <= found[0].lower_bound_s * (1 + ROUNDING):
        return found and found[0]
    return _by_ilp(problem, *found)


def answer(problem: ShardingProblem, choice: tuple[int, ...], *, bound_s: float, proof: str) -> Sharding:
    """A choice with what it takes and holds."""
    seconds = problem.seconds(choice)
    return Sharding(
        choice=choice, seconds=seconds, size_bytes=problem.size_bytes(choice),
        lower_bound_s=min(bound_s, seconds), proof=proof,
    )  # fmt: skip


def by_price(problem: ShardingProblem) -> tuple[Sharding, float] | None:
    """The best choice that fits among those that some price of bytes makes cheapest, its bound, and the best price.

    Proof of the bound: what fits has  price * (bytes - limit) <= 0, so its seconds are no less than the least of
    seconds + price * (bytes - limit)  over all choices. Each next price makes the cheapest choices known on both sides
    of the limit equally cheap, so that a new choice beats both, or the price is the best there is.
    """
    limit, over, under = problem.memory_bytes, eliminate(problem), _smallest(problem)
    if problem.size_bytes(under) > limit:
        return None
    best, bound_s, best_price = under, -inf, 0.0
    for _ in range(_PRICES):
        saved = problem.size_bytes(over) - problem.size_bytes(under)
        price = (problem.seconds(under) - problem.seconds(over)) / saved
        found = eliminate(problem, price_s_per_byte=price)
        value = problem.seconds(found) + price * problem.size_bytes(found)
        if value - price * limit > bound_s:
            bound_s, best_price = value - price * limit, price
        fits = problem.size_bytes(found) <= limit
        if fits and problem.seconds(found) < problem.seconds(best):
            best = found
        if value >= (problem.seconds(over) + price * problem.size_bytes(over)) * (1 - ROUNDING):
            break
        over, under = (over, found) if fits else (found, under)
    return answer(problem, best, bound_s=bound_s, proof="price of memory"), best_price


def undominated(problem: ShardingProblem) -> list[Ints]:
    """The shardings of each operator without those that another of it can always replace at no more seconds and bytes.

    Sharding k replaces i if  seconds[k] + sum over edges of max over j of (edge[k, j] - edge[i, j]) <= seconds[i] and
    bytes[k] <= bytes[i]; one that stands behind must be faster by more than rounding, so that of equals one stays.
    Reference: Desmet et al., "The dead-end elimination theorem", Nature 356, 1992.
    """
    slower_SS = [s[None] - s[:, None] for s in problem.seconds_S]
    for (v, w), table in problem.edges_SS.items():
        slower_SS[v] = slower_SS[v] + (table[None] - table[:, None]).max(axis=2)
        slower_SS[w] = slower_SS[w] + (table.T[None] - table.T[:, None]).max(axis=2)
    kept = []
    for slower, m in zip(slower_SS, problem.bytes_S, strict=True):
        is_before = np.arange(len(m))[None] < np.arange(len(m))[:, None]
        is_faster = np.where(is_before, slower <= 0, slower < -ROUNDING * np.abs(slower).max())
        replaces = is_faster & (m[None] <= m[:, None])
        kept.append(np.flatnonzero(~replaces.any(axis=1)))
    return kept


def _smallest(problem: ShardingProblem) -> tuple[int, ...]:
    """The choice with the fewest bytes and, of these, the fewest seconds."""
    seconds_S = tuple(np.where(m <= m.min(), s, inf) for s, m in zip(problem.seconds_S, problem.bytes_S, strict=True))
    return eliminate(ShardingProblem(seconds_S=seconds_S, bytes_S=problem.bytes_S, edges_SS=problem.edges_SS))


def _by_ilp(problem: ShardingProblem, known: Sharding, price: float) -> Sharding:
    """The best of all, from an ILP over the shardings that can beat what is known.

    A sharding is left out if the least  seconds + price * (bytes - limit)  with it is above the known seconds.
    """
    from moeplan.planners._sharding_ilp import solve_ilp

    most = known.seconds * (1 + ROUNDING) + price * problem.memory_bytes
    kept = [np.flatnonzero(least_S <= most) for least_S in least_with(problem, price_s_per_byte=price)]
    try:
        found = solve_ilp(problem.only(kept), time_limit_s=_LAST_STOP_S)
    except PlanError:
        return known
    assert found is not None, "what is known fits, and its shardings are kept"
    choice = tuple(int(at[i]) for at, i in zip(kept, found.choice, strict=True))
    bound_s = max(known.lower_bound_s, min(found.lower_bound_s, known.seconds))
    best = min(choice, known.choice, key=problem.seconds)
    return answer(problem, best, bound_s=bound_s, proof=f"{found.proof}, price of memory")


# ---- elimination


class Bucket(NamedTuple):
    """An operator that was minimised over: its neighbours then, and the sums by their shardings and its own (last)."""

    others: tuple[int, ...]
    total: Floats


def eliminate(problem: ShardingProblem, *, price_s_per_byte: float = 0.0) -> tuple[int, ...]:
    """The choice with the least  seconds + price * bytes, whatever the limit."""
    _, taken = reduced(tables_of(problem, price_s_per_byte=price_s_per_byte), keep=())
    return tuple(int(at) for at in chosen(taken, {}))


def tables_of(problem: ShardingProblem, *, price_s_per_byte: float = 0.0) -> list[Table]:
    """What is summed: a table for each operator and each edge."""
    operators: list[Table] = [
        ((v,), s + price_s_per_byte * m)
        for v, (s, m) in enumerate(zip(problem.seconds_S, problem.bytes_S, strict=True))
    ]
    return operators + [((v, w), r) if v < w else ((w, v), r.T) for (v, w), r in problem.edges_SS.items()]


def chosen(taken: dict[int, Bucket], kept: Mapping[int, Ints]) -> tuple[Ints, ...]:
    """The shardings of all operators, in order, for each of the given ones of the kept."""
    choice = dict(kept)
    for v, (others, total) in reversed(taken.items()):
        choice[v] = total[tuple(choice[w] for w in others)].argmin(axis=-1)
    return tuple(choice[v] for v in sorted(choice))


def reduced(tables: list[Table], *, keep: tuple[int, ...]) -> tuple[Floats, dict[int, Bucket]]:
    """The least sum by the shardings of the kept operators, and each other operator's bucket, in the order taken.

    Minimising over one operator joins its neighbours by one table; those with the fewest neighbours go first.
    """
    left, near = list(tables), _neighbours(tables)
    taken: dict[int, Bucket] = {}
    while gone := near.keys() - keep:
        v = min(gone, key=lambda each: (len(near[each]), each))
        others = tuple(sorted(near.pop(v)))
        total = _summed([table for table in left if v in table[0]], (*others, v))
        taken[v] = Bucket(others, total)
        left = [table for table in left if v not in table[0]] + [(others, total.min(axis=-1))]
        for w in others:
            near[w] = (near[w] | {*others}) - {v, w}
    return _summed(left, keep), taken


def _neighbours(tables: list[Table]) -> dict[int, set[int]]:
    near: dict[int, set[int]] = {}
    for of, _ in tables:
        for v in of:
            near.setdefault(v, set()).update({*of} - {v})
    return near


def _summed(tables: list[Table], axes: tuple[int, ...]) -> Floats:
    """The sum of tables, laid out by `axes`."""
    total: Floats = np.zeros((1,) * len(axes))
    for of, table in tables:
        size = dict(zip(of, table.shape, strict=True))
        order = sorted(range(len(of)), key=lambda at: axes.index(of[at]))
        total = total + table.transpose(order).reshape([size.get(v, 1) for v in axes])
    return total


def least_with(problem: ShardingProblem, *, price_s_per_byte: float) -> list[Floats]:
    """For each operator and sharding the least  seconds + price * bytes  of all choices that have it.

    Backwards through the elimination: what is least outside a bucket comes from the bucket that took its message.
    """
    least_s, taken = reduced(tables_of(problem, price_s_per_byte=price_s_per_byte), keep=())
    order = {v: at for at, v in enumerate(taken)}
    found: dict[int, Floats] = {}
    sums: dict[int, Floats] = {}
    for v, (others, total) in reversed(taken.items()):
        if others:
            after = min(others, key=order.__getitem__)
            axes = (*taken[after].others, after)
            rest = tuple(at for at, w in enumerate(axes) if w not in others)
            outside = sums[after].min(axis=rest).transpose(_sorting([w for w in axes if w in others]))
        else:
            outside = np.asarray(least_s)
        sums[v] = total + (outside - total.min(axis=-1))[..., None]
        found[v] = sums[v].min(axis=tuple(range(len(others))))
    return [found[v] for v in sorted(found)]


def _sorting(numbers: list[int]) -> list[int]:
    return sorted(range(len(numbers)), key=numbers.__getitem__)
