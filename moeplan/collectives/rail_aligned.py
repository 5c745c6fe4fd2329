"""To the GPU of the own node that is on the receiver's rail, over NVLink, and from there over that rail.

No traffic goes through the spine from rail to rail. Nothing is laid out or put together: each pair's parcel stays a
message of its own, and what several members of a node get is sent as often. Reference: NVIDIA, "Doubling all2all
performance with NCCL 2.12" (2022), PXN; there a large message is forwarded piece by piece, here whole.
"""

from __future__ import annotations

from moeplan.collectives._places import has_rails, places, ranks_by_node
from moeplan.collectives._stages import in_two_stages
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_to_all",)
IS_USUAL = True


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has members on the same rails, more than one, in each of several nodes."""
    if not has_rails(groups_NG, cluster):
        return False
    rail_NBL = ranks_by_node(groups_NG, cluster) % cluster.gpus_per_node
    return bool((rail_NBL == rail_NBL[:, :1]).all())


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Inside each node a message for each receiving node, then between nodes a message for each sender of the node."""
    where = places(exchange.groups_NG, cluster)
    inside, between = in_two_stages(exchange, where)
    return [inside.wave(messages=float(where.num_nodes)), between.wave(messages=float(where.local))]
