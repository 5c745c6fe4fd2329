"""All to the first member of the node, between these leaders, and from them to the members.

Messages between nodes are few and large, but a leader's wires and card carry what its whole node sends, and its memory
lays it out twice. Reference: Nie et al., "HetuMoE" (arXiv 2203.14685, 2022), section 3.2.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._places import places
from moeplan.collectives._waves import added_up, shares, wave
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_to_all",)


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has several nodes, and several members in one of them."""
    sizes_NB = places(groups_NG, cluster).size_NB
    return bool(((sizes_NB > 0).sum(axis=1) > 1).all() and (sizes_NB.max(axis=1) > 1).all())


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Members to leaders, leaders to leaders, leaders to members; what a member has for itself stays."""
    groups_NG, share_GG = exchange.groups_NG, shares(exchange)
    leader_NG = places(groups_NG, cluster).leader_NG
    itself_NG = np.broadcast_to(np.arange(len(share_GG)), leader_NG.shape)
    away_GG = share_GG * (1.0 - np.eye(len(share_GG)))
    up_NGG = added_up(itself_NG[:, :, None], leader_NG[:, :, None], away_GG)
    across_NGG = added_up(leader_NG[:, :, None], leader_NG[:, None, :], away_GG)
    down_NGG = added_up(leader_NG[:, None, :], itself_NG[:, None, :], away_GG)
    copies = [float(laid_out.sum(axis=2).max()) for laid_out in (across_NGG, down_NGG)]
    return [
        wave(groups_NG, up_NGG),
        wave(groups_NG, across_NGG, copy_share=copies[0]),
        wave(groups_NG, down_NGG, copy_share=copies[1]),
    ]
