"""Nodes on a ring: first inside each node, then with the node that is 1 away, 2 away, and so on, one after another.

A step sends to the node j ahead and receives from the node j behind, so that no card gets from two nodes at once.
Reference: He et al., "FasterMoE" (PPoPP 2022), section 4.2: groups of workers that are near each other, in its smart
schedule, which also computes on what one step brought while the next is on its way; here all steps are one exchange.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._places import places
from moeplan.collectives._waves import shares, wave
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_to_all",)


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has more than two members, in two nodes or more."""
    return groups_NG.shape[1] > 2 and bool(((places(groups_NG, cluster).size_NB > 0).sum(axis=1) > 1).all())


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """As many waves as the group has nodes; the first stays in the node."""
    where, share_GG = places(exchange.groups_NG, cluster), shares(exchange)
    ahead_NGG = where.node_NG[:, None, :] - where.node_NG[:, :, None]
    step_NGG = ahead_NGG % (where.size_NB > 0).sum(axis=1)[:, None, None]
    return [wave(exchange.groups_NG, np.where(step_NGG == step, share_GG, 0.0)) for step in range(where.num_nodes)]
