"""Rounds in which each member sends to one and gets from one: to i XOR r where G is a power of two, else to i + r.

With XOR two members exchange; messages are those of `linear`, one after another. Reference: Thakur, Rabenseifner,
Gropp, "Optimization of collective communication operations in MPICH" (2005), section 4.4, for long messages.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._waves import nothing, pairs, shares
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_to_all",)


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """For three members or more."""
    return bool(groups_NG.shape[1] > 2)


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """G - 1 waves of G transfers in each group; pairs without bytes are left out."""
    share_GG = shares(exchange)
    size = len(share_GG)
    member, found = np.arange(size), []
    for turn in range(1, size):
        partner = member ^ turn if size & (size - 1) == 0 else (member + turn) % size
        i = member[share_GG[member, partner] > 0]
        found.append(pairs(exchange.groups_NG, i, partner[i], share_GG[i, partner[i]]))
    return found or [nothing(exchange.groups_NG)]
