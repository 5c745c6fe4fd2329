"""Each rank sends what a node needs, once, to its peer there, and the node's members gather all of it.

DeepSpeed: among tensor-parallel ranks that hold the same tokens only ranks of the same index exchange, each its 1/L of
them, and an all-gather gives every rank of the node all. Here each token is on one rank from the start (sequence
parallelism), so that the same exchange with peers is followed by the same all-gather, which also brings members what
they have no use for. A combine is the same backwards: sums are scattered in the node and go home. Reference:
Rajbhandari et al., "DeepSpeed-MoE" (ICML 2022), section 5.3.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._copies import both_ways, once_for_each_node, reach_NGB
from moeplan.collectives._places import places
from moeplan.collectives._waves import wave
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Floats, Ints, Wave

OPERATIONS = ("all_to_all",)
COUNTS_COPIES = True


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has the same number of members in each of its nodes, and more than one."""
    return places(groups_NG, cluster).local > 1


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Between peers, then an all-gather inside the nodes; a combine the other way."""
    return both_ways(exchange, cluster, _dispatch)


def _dispatch(exchange: Exchange, cluster: Cluster, share_GG: Floats) -> list[Wave]:
    groups_NG, where = exchange.groups_NG, places(exchange.groups_NG, cluster)
    first_NGG = once_for_each_node(exchange, where, share_GG)
    own_NG = np.take_along_axis(reach_NGB(exchange, where, share_GG), where.node_NG[:, :, None], axis=2)[:, :, 0]
    held_NG = first_NGG.sum(axis=1) + own_NG
    return [wave(groups_NG, first_NGG), wave(groups_NG, np.where(where.is_near_NGG(), held_NG[:, :, None], 0.0))]
