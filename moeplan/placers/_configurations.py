"""The configuration LP: which GPU contents, in fractions, hold all experts with every number of replicas allowed.

A configuration is a set of options (expert e with k replicas) of distinct experts that fits on a GPU; each of its items
serves 1/k of expert e. For a limit T on the tokens of a GPU:

    minimise    sum_C z[C]                                         GPUs in use
    subject to  sum_C z[C] * sum over (e, k) in C of 1/k = 1       each expert e is served as a whole
                sum_C z[C] * |C| = slots                           every slot is used

A placement within T is a solution with at most G = GPUs: z counts the GPUs of each content. So T is refuted by prices,
`price_E` of each expert and `slot_price`, whose sum over the rows is more than G times what any configuration is worth
(Farley, "A note on bounding a class of linear programming problems", Operations Research 38, 1990). The refutation asks
nothing of the LP solver: the worth of the best configuration comes from the pricing search, which is exact or above.

highspy is called directly: columns are added a hundred times to a solved LP, which PuLP cannot.
Axes of arrays: E expert, O option, J configuration, C item of a configuration, padded with -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers._balance import slots_of
from moeplan.placers._counts import ROUNDING, Options, Range, any_counts, options
from moeplan.placers._highs import solver_of
from moeplan.placers._pricing import best_sets

_WORTH = 1 + 1e-7
"""A configuration is priced at 1; only those worth more are new columns."""
_REFUTED = 1 + 1e-7
"""Refutations by less than this are taken for rounding."""
_COLUMNS = 30
"""New columns of one pricing: 30 and 100 take the same time, 10 and 300 more."""
_ROUNDS = 3000
_STRETCHES = 6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prices:
    """What serving an expert and using a slot are worth in a refutation."""

    price_E: Floats
    slot_price: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fractions:
    """Replicas of each expert in a fractional solution: `weight_O` of expert `expert_O` has `count_O` replicas."""

    expert_O: Ints
    count_O: Ints
    weight_O: Floats


def refutes(problem: PlacementProblem, prices: Prices, *, limit: float) -> bool:
    """Whether the prices prove that no placement has at most `limit` tokens on every GPU."""
    found = options(problem, limit=limit, within=any_counts(problem))
    return found is None or _worth(problem, found, prices, limit=limit)[0] > _REFUTED


def _worth(problem: PlacementProblem, found: Options, prices: Prices, *, limit: float) -> tuple[float, Floats, Ints]:
    """Farley's bound over the GPUs, and for each option its best configuration's worth and items.

    Of prices that are worth less than 0 in all, nothing is proven, and the bound is 0.
    """
    value_O = prices.price_E[found.expert_O] / found.count_O + prices.slot_price
    within = limit * (1 + ROUNDING)
    worth_O, item_OC = best_sets(found.size_O, found.expert_O, value_O, within, problem.slots_per_gpu, _WORTH)
    total = float(prices.price_E.sum() + prices.slot_price * problem.slots)
    return max(0.0, total) / max(_WORTH, float(worth_O.max())) / problem.num_gpus, worth_O, item_OC


class ConfigurationLP:
    """The LP of one layer, with the columns found so far: what one limit needs, the next mostly needs too."""

    def __init__(self, problem: PlacementProblem) -> None:
        self._problem = problem
        self._expert_JC = np.zeros((0, problem.slots_per_gpu), np.int64)
        self._count_JC = np.ones((0, problem.slots_per_gpu), np.int64)
        self._known: set[bytes] = set()
        # The primal simplex goes on from the last basis when columns come in; the dual one took three times as long.
        self._solver = solver_of(presolve="off", simplex_strategy=4)
        self._add_rows()

    def solve(self, *, limit: float, within: Range, stop_s: float) -> Prices | Fractions | None:
        """Prices that refute the limit for counts in the range, or a fractional solution; None where time is up."""
        found = options(self._problem, limit=limit, within=within)
        if found is None:
            return Prices(price_E=np.zeros(self._problem.num_experts), slot_price=0.0)
        self._allow(found, limit=limit)
        for _ in range(_ROUNDS):
            if clock_s() > stop_s:
                return None
            self._solver.run()
            if self._solver.getInfo().objective_function_value <= self._problem.num_gpus * (1 + 1e-9):
                return self._fractions()
            dual = np.array(self._solver.getSolution().row_dual)
            prices = Prices(price_E=dual[:-1], slot_price=float(dual[-1]))
            bound, worth_O, item_OC = _worth(self._problem, found, prices, limit=limit)
            if bound > _REFUTED:
                return prices
            if not self._add_best(found, worth_O, item_OC):
                return None
        return None

    def add_contents(self, placement: LayerPlacement) -> None:
        """The contents of a placement's GPUs are columns from the start: that saves a third of a first solution."""
        problem, none = self._problem, self._problem.num_experts
        at_GC = slots_of(placement, gpus=problem.num_gpus, per_gpu=problem.slots_per_gpu, num_experts=none)
        count_E = np.bincount(placement.expert_R, minlength=none + 1)
        self.add(np.where(at_GC < none, at_GC, -1), np.maximum(1, count_E)[at_GC])

    def add(self, expert_JC: Ints, count_JC: Ints) -> int:
        """How many of the configurations are new; those are now columns."""
        new = []
        for number, key in enumerate(_keys(expert_JC, count_JC)):
            if key not in self._known:
                self._known.add(key)
                new.append(number)
        expert_JC, count_JC = expert_JC[new], count_JC[new]
        row_J, item_J = np.nonzero(expert_JC >= 0)
        held_J = (expert_JC >= 0).sum(axis=1)
        share = 1.0 / count_JC[row_J, item_J]
        # Of each column, the experts' rows come first and the row of slots last.
        at = np.arange(row_J.size) + row_J
        index, value = np.full(row_J.size + len(new), self._problem.num_experts), np.zeros(row_J.size + len(new))
        index[at], value[at] = expert_JC[row_J, item_J], share
        ends = np.cumsum(held_J + 1)
        value[ends - 1] = held_J
        ones, zeros = np.ones(len(new)), np.zeros(len(new))
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
        if new:
            self._solver.addCols(
                len(new), ones, zeros, np.full(len(new), highspy.kHighsInf), index.size, starts,
                index.astype(np.int32), value,
            )  # fmt: skip
        self._expert_JC = np.concatenate([self._expert_JC, expert_JC])
        self._count_JC = np.concatenate([self._count_JC, count_JC])
        return len(new)

    def _add_rows(self) -> None:
        """The rows, each with two columns that let it be missed at a cost above any sensible price."""
        experts = self._problem.num_experts
        for row in range(experts + 1):
            right = 1.0 if row < experts else float(self._problem.slots)
            self._solver.addRow(right, right, 0, [], [])
        for row in range(experts + 1):
            for sign in (1.0, -1.0):
                self._solver.addCol(2.0 * self._problem.num_gpus, 0.0, highspy.kHighsInf, 1, [row], [sign])
        self._missing = 2 * (experts + 1)

    def _allow(self, found: Options, *, limit: float) -> None:
        """Only columns whose items are options and fit the limit may be used."""
        number = self._expert_JC.shape[0]
        if number == 0:
            return
        held_JC = self._expert_JC >= 0
        size_JC = self._problem.tokens_E[self._expert_JC] / self._count_JC * held_JC
        is_option_EK = np.zeros((self._problem.num_experts, self._problem.num_gpus + 1), np.bool_)
        is_option_EK[found.expert_O, found.count_O] = True
        fits_J = size_JC.sum(axis=1) <= limit * (1 + ROUNDING)
        allowed_J = fits_J & (is_option_EK[self._expert_JC, self._count_JC] | ~held_JC).all(axis=1)
        index = np.arange(self._missing, self._missing + number, dtype=np.int32)
        high_J = np.where(allowed_J, highspy.kHighsInf, 0.0)
        self._solver.changeColsBounds(number, index, np.zeros(number), high_J)

    def _add_best(self, found: Options, worth_O: Floats, item_OC: Ints) -> int:
        """How many columns came in, of the best configurations by largest item."""
        best = np.argsort(-worth_O, kind="stable")[:_COLUMNS]
        item_JC = item_OC[best[(worth_O[best] > _WORTH) & (item_OC[best, 0] >= 0)]]
        expert_JC = np.where(item_JC >= 0, found.expert_O[item_JC], -1)
        return self.add(expert_JC, np.where(item_JC >= 0, found.count_O[item_JC], 1))

    def _fractions(self) -> Fractions:
        """The weight of each option in the LP's solution."""
        weight_J = np.array(self._solver.getSolution().col_value)[self._missing :]
        used = (weight_J[:, None] > 1e-9) & (self._expert_JC >= 0)
        stride = self._problem.num_gpus + 1
        key, place = np.unique(self._expert_JC[used] * stride + self._count_JC[used], return_inverse=True)
        share = (weight_J[:, None] / self._count_JC)[used]
        return Fractions(
            expert_O=key // stride, count_O=key % stride, weight_O=np.bincount(place, weights=share).astype(np.float64)
        )


def stretched(problem: PlacementProblem, prices: Prices, *, limit: float, high: float) -> float:
    """The greatest limit below `high` that a few halvings find refuted by the same prices; at least `limit`."""
    for _ in range(_STRETCHES):
        middle = (limit + high) / 2
        limit, high = (middle, high) if refutes(problem, prices, limit=middle) else (limit, middle)
    return limit


def _keys(expert_JC: Ints, count_JC: Ints) -> list[bytes]:
    """What tells configurations apart: their items in the order of experts."""
    order = np.argsort(expert_JC, axis=1, kind="stable")
    both = np.concatenate([np.take_along_axis(array, order, axis=1) for array in (expert_JC, count_JC)], axis=1)
    return [row.tobytes() for row in both]
