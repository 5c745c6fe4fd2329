"""One copy of a token to each node that it has experts in, over the sender's own rail, and from there over NVLink.

Dispatch: to the member with the sender's index in every other node what has a choice there, once, while what stays in
the node goes straight; then that member passes on a copy for each choice. Combine is the same backwards: a node adds
up what belongs to one token, and one sum goes home. Pieces are passed on as they come, so that both kinds of wires are
busy at once. What the sums take is left out. References: DeepSeek-AI, "DeepSeek-V3 technical report" (arXiv 2412.19437,
2024), section 3.2.2; DeepEP, whose kernels forward piece by piece.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._copies import both_ways, once_for_each_node
from moeplan.collectives._places import places
from moeplan.collectives._waves import added_up, wave
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Floats, Ints, Wave

OPERATIONS = ("all_to_all",)
IS_USUAL = True
COUNTS_COPIES = True


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has several nodes, and several members in one of them."""
    sizes_NB = places(groups_NG, cluster).size_NB
    return bool(((sizes_NB > 0).sum(axis=1) > 1).all() and (sizes_NB.max(axis=1) > 1).all())


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Between nodes (and straight to the own node's members), then inside them; a combine the other way."""
    return both_ways(exchange, cluster, _dispatch)


def _dispatch(exchange: Exchange, cluster: Cluster, share_GG: Floats) -> list[Wave]:
    groups_NG, where = exchange.groups_NG, places(exchange.groups_NG, cluster)
    is_near_NGG = where.is_near_NGG()
    relay_NGG = np.take_along_axis(where.peer_NGB(), where.node_NG[:, None, :].repeat(len(share_GG), axis=1), axis=2)
    first_NGG = once_for_each_node(exchange, where, share_GG) + np.where(is_near_NGG, share_GG, 0.0)
    member_NGG = np.arange(len(share_GG))[None, None, :]
    onward_NGG = added_up(relay_NGG, member_NGG, np.where(is_near_NGG, 0.0, share_GG))
    return [wave(groups_NG, first_NGG), wave(groups_NG, onward_NGG, follows=True)]
