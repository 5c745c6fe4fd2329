"""The most valuable sets of replicas that fit on one GPU: a knapsack with few items, of distinct experts.

Axes of arrays: O option (an expert with a number of replicas), K options worth a look, C items of a configuration.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Floats, Ints
from moeplan.jit import compiled

WORK = 200_000
"""Steps of the search for each first item, after which its upper bound is taken. Three slots never need as many."""


@compiled
def best_sets(
    size_O: Floats, expert_O: Ints, value_O: Floats, limit: float, most: int, floor: float
) -> tuple[Floats, Ints]:
    """For each option, the value of the best set in which it is the largest item, and that set, padded with -1.

    Options come sorted by size. Sets that are not above `floor` are not looked for and have value 0. A value is exact,
    or, where the search was given up, an upper bound with an empty set: no set is ever worth more than the greatest.
    """
    kept_K, top_KC, sum_KC = _worth_a_look(expert_O, value_O, most)
    size_K, expert_K, gain_K = size_O[kept_K], expert_O[kept_K], value_O[kept_K]
    best_O, set_OC = np.zeros(size_O.size), -np.ones((size_O.size, most), np.int64)
    chosen_C = np.empty(most, np.int64)
    for first in range(kept_K.size):
        if size_K[first] > limit:
            break
        start = min(first, np.searchsorted(size_K, limit - size_K[first], side="right"))
        bound = gain_K[first] + sum_KC[start, most - 1]
        if bound > floor:
            out_C = set_OC[kept_K[first]]
            found = _search(size_K, expert_K, gain_K, top_KC, sum_KC, limit, first, floor, chosen_C, out_C)
            best_O[kept_K[first]] = found if found >= 0 else bound
            for item in range(most):
                out_C[item] = kept_K[out_C[item]] if out_C[item] >= 0 and found >= 0 else -1
    return best_O, set_OC


@compiled
def _worth_a_look(expert_O: Ints, value_O: Floats, most: int) -> tuple[Ints, Ints, Floats]:
    """Options that are among the `most` best of distinct experts that are no larger; for each prefix of them the best.

    Any other is worth no more than `most` options of distinct experts that are no larger, of which one is always free.
    The second array lists the best of the prefix, the third sums them.
    """
    kept_K, number = np.empty(expert_O.size, np.int64), 0
    top_KC, sum_KC = -np.ones((expert_O.size + 1, most), np.int64), np.zeros((expert_O.size + 1, most + 1))
    for option in range(expert_O.size):
        top_C, worst = top_KC[number], most - 1
        for place in range(most):
            if top_C[place] >= 0 and expert_O[kept_K[top_C[place]]] == expert_O[option]:
                worst = place
                break
        least = value_O[kept_K[top_C[worst]]] if top_C[worst] >= 0 else 0.0
        if value_O[option] <= least:
            continue
        kept_K[number] = option
        top_KC[number + 1] = top_C
        place = worst
        while place > 0 and (top_C[place - 1] < 0 or value_O[kept_K[top_C[place - 1]]] < value_O[option]):
            top_KC[number + 1, place] = top_C[place - 1]
            place -= 1
        top_KC[number + 1, place] = number
        number += 1
        for place in range(most):
            item = top_KC[number, place]
            sum_KC[number, place + 1] = sum_KC[number, place] + (value_O[kept_K[item]] if item >= 0 else 0.0)
    return kept_K[:number], top_KC[: number + 1], sum_KC[: number + 1]


@compiled
def _search(
    size_K: Floats, expert_K: Ints, gain_K: Floats, top_KC: Ints, sum_KC: Floats,
    limit: float, first: int, floor: float, chosen_C: Ints, out_C: Ints,
) -> float:  # fmt: skip
    """Value of the best set above `floor` with largest item `first`, written to `out_C`; 0 if none, -1 if given up."""
    most = out_C.size
    rest_C, value_C, next_C = np.empty(most + 1), np.empty(most + 1), np.empty(most + 1, np.int64)
    chosen_C[0], depth, best, found, work = first, 1, floor, 0.0, 0
    rest_C[1], value_C[1] = limit - size_K[first], gain_K[first]
    next_C[1] = min(first, np.searchsorted(size_K, rest_C[1], side="right"))
    while depth > 0:
        work += 1
        if work > WORK:
            return -1.0
        if value_C[depth] > best:
            best = found = value_C[depth]
            out_C[:depth], out_C[depth:] = chosen_C[:depth], -1
        left = most - depth
        if left == 0 or next_C[depth] == 0 or value_C[depth] + sum_KC[next_C[depth], left] <= best:
            depth -= 1
            continue
        if left == 1:
            item, next_C[depth] = _best_free(expert_K, top_KC[next_C[depth]], chosen_C, depth), 0
        else:
            next_C[depth] -= 1
            item = next_C[depth]
            if _has(expert_K, chosen_C, depth, expert_K[item]):
                item = -1
        if item < 0:
            continue
        rest = rest_C[depth] - size_K[item]
        after = min(item, np.searchsorted(size_K, rest, side="right"))
        if value_C[depth] + gain_K[item] + sum_KC[after, left - 1] > best:
            chosen_C[depth] = item
            depth += 1
            rest_C[depth], value_C[depth], next_C[depth] = rest, value_C[depth - 1] + gain_K[item], after
    return found


@compiled
def _best_free(expert_K: Ints, top_C: Ints, chosen_C: Ints, depth: int) -> int:
    """The best option of a prefix whose expert is not chosen yet, or -1."""
    for item in top_C:
        if item >= 0 and not _has(expert_K, chosen_C, depth, expert_K[item]):
            return int(item)
    return -1


@compiled
def _has(expert_K: Ints, chosen_C: Ints, depth: int, expert: int) -> bool:
    """Whether the expert is among the items chosen so far."""
    for place in range(depth):  # noqa: SIM110 (compiled: a generator is not)
        if expert_K[chosen_C[place]] == expert:
            return True
    return False
