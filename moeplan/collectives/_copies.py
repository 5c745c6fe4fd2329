"""What algorithms share that send one copy of a token to a node. Axes: N groups, G members, B nodes of a group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeplan.collectives._places import Places
from moeplan.collectives._waves import added_up, mirrored, shares
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Floats, Wave

Dispatch = Callable[[Exchange, Cluster, Floats], list[Wave]]


def both_ways(exchange: Exchange, cluster: Cluster, dispatch: Dispatch) -> list[Wave]:
    """The waves of a dispatch; of a combine those of the dispatch that it answers, the other way.

    `reach_GB` of a combine is that of its dispatch: for each member the sums that it gets from each node. Without it an
    exchange has no other one that it answers.
    """
    if exchange.kind != "combine" or exchange.reach_GB is None:
        return dispatch(exchange, cluster, shares(exchange))
    return mirrored(dispatch(exchange, cluster, np.ascontiguousarray(shares(exchange).T)))


def reach_NGB(exchange: Exchange, where: Places, share_GG: Floats) -> Floats:
    """What each member has for each node; if the exchange does not say, all that it has for the node's members."""
    if exchange.reach_GB is not None:
        return np.broadcast_to(exchange.reach_GB, (len(where.node_NG), *exchange.reach_GB.shape))
    is_there_NGB = where.node_NG[:, :, None] == np.arange(where.num_nodes)
    return np.asarray(share_GG @ is_there_NGB)


def once_for_each_node(exchange: Exchange, where: Places, share_GG: Floats) -> Floats:
    """(N, G, G): to each other node what has a choice there, to the member with the sender's index."""
    away_NGB = where.node_NG[:, :, None] != np.arange(where.num_nodes)
    member_NGB = np.arange(len(share_GG))[None, :, None]
    moved_NGB = np.where(away_NGB & (where.size_NB > 0)[:, None, :], reach_NGB(exchange, where, share_GG), 0.0)
    return added_up(member_NGB, where.peer_NGB(), moved_NGB)
