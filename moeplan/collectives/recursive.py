"""Halving and doubling: log2 G steps, in each of which members whose numbers differ in one bit exchange.

A reduce-scatter halves what is exchanged in each step, an all-gather doubles it; an all-reduce is both, a broadcast a
scatter along the same tree and an all-gather. Near members exchange the large parts. Reference: Thakur, Rabenseifner,
Gropp, "Optimization of collective communication operations in MPICH" (2005), sections 4.1, 4.2, 4.4 and 4.5.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._waves import nothing, pairs
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where the number of members is a power of two."""
    size = groups_NG.shape[1]
    return bool(size & (size - 1) == 0)


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """One wave for each step; step k exchanges 1 / 2^(k + 1) with the member 2^k away."""
    size = exchange.groups_NG.shape[1]
    ordered_NG = np.sort(exchange.groups_NG, axis=1)
    if exchange.operation == "broadcast":
        ordered_NG = _first_in_front(ordered_NG, exchange.groups_NG[:, 0])
    member, steps = np.arange(size), range(size.bit_length() - 1)
    halving = [_step(ordered_NG, member, k) for k in steps]
    if exchange.operation == "broadcast":
        scatter = [_step(ordered_NG, member[: 1 << k] + (1 << k), k) for k in steps]
        found = [*scatter, *(_step(ordered_NG, member[1 << k :], k) for k in reversed(steps))]
    else:
        before = [] if exchange.operation == "all_gather" else halving
        found = [*before, *([] if exchange.operation == "reduce_scatter" else halving[::-1])]
    return found or [nothing(ordered_NG)]


def _step(ordered_NG: Ints, receiver: Ints, k: int) -> Wave:
    """Half of the half of ... to each receiver, from the member that differs in bit k.

    In a broadcast who is before the first receiver has given away what it would get, and kept it.
    """
    return pairs(ordered_NG, receiver ^ (1 << k), receiver, np.full(len(receiver), 0.5 ** (k + 1)))


def _first_in_front(ordered_NG: Ints, first_N: Ints) -> Ints:
    """The members such that `first_N` comes first, and near ones stay near: numbers are exchanged bit by bit."""
    at_N1 = (ordered_NG == first_N[:, None]).argmax(axis=1)[:, None]
    return np.take_along_axis(ordered_NG, np.arange(ordered_NG.shape[1]) ^ at_N1, axis=1)
