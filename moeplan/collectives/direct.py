"""Gathers and reductions without a ring: every member sends each other one its part at once, all in one or two steps.

An all-reduce is a reduce-scatter (each member gets its part of everybody's buffer, and adds up) and an all-gather.
`linear` is the same for an all-to-all. Reference: Thakur, Rabenseifner, Gropp, "Optimization of collective
communication operations in MPICH" (2005), section 4; "direct" is what ASTRA-sim calls it.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._waves import wave
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Always."""
    return True


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Parts of 1 / G between all pairs, for an all-reduce twice; a broadcast sends all to each."""
    size = exchange.groups_NG.shape[1]
    if exchange.operation == "broadcast":
        from_first_GG = np.zeros((size, size))
        from_first_GG[0] = 1.0
        return [wave(exchange.groups_NG, from_first_GG)]
    once = wave(exchange.groups_NG, np.full((size, size), 1.0 / size))
    return [once, once] if exchange.operation == "all_reduce" else [once]
