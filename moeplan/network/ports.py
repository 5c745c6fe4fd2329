"""A matrix of traffic on a cluster, as what `matrix` needs: a port out and in for each GPU, and leaves between.

Axes: G GPU that takes part, B leaf, H link of a path.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.fabric import Leaves
from moeplan.domain.program import Floats, Ints
from moeplan.domain.wiring import IntArray
from moeplan.network.fluid import FlowSet, finish_times
from moeplan.network.matrix import PortTraffic, matrix_finish_times


def port_finish_times(cluster: Cluster, ranks: Ints, bytes_GG: Floats, *, tolerance: float) -> Floats | None:
    """(G, G) ends of all pairs' flows; None where GPUs share ports, or where paths do not go out, up, down and in.

    What stays in a node is worked out exactly, and apart: it crosses none of the ports.
    """
    if not _has_ports(cluster):
        return None
    fabric, wiring = cluster.fabric, cluster.wiring
    assert isinstance(fabric, Leaves)
    assert wiring is not None
    node_G, gpu_G = np.divmod(ranks.astype(np.int32), np.int32(cluster.gpus_per_node))
    leaf_G = fabric.of(node_G, wiring.nic_G[gpu_G])
    order = np.lexsort((-bytes_GG.sum(axis=0), leaf_G))  # what fills last side by side, so that the rest is done early
    far_GG = np.where(node_G[:, None] == node_G, 0.0, bytes_GG)[np.ix_(order, order)]
    leaves, size_B = np.unique(leaf_G[order], return_counts=True)
    up_B, down_B = _pipes(cluster, fabric, leaves)
    if not np.isfinite(up_B).any():  # nothing above the ports can be full, so leaves make no difference
        size_B, up_B, down_B = np.array([len(ranks)]), np.array([np.inf]), np.array([np.inf])
    traffic = PortTraffic(
        bytes_GG=far_GG, out_bytes_per_s_G=_narrowest(cluster, wiring.up_GH, node_G, gpu_G)[order],
        in_bytes_per_s_G=_narrowest(cluster, wiring.down_GH, node_G, gpu_G)[order],
        first_B1=np.concatenate([[0], np.cumsum(size_B)]), up_bytes_per_s_B=up_B, down_bytes_per_s_B=down_B,
    )  # fmt: skip
    finish_GG = np.zeros_like(bytes_GG)
    finish_GG[np.ix_(order, order)] = matrix_finish_times(traffic, tolerance=tolerance).finish_s_GG
    _add_near(cluster, ranks, bytes_GG, node_G, finish_GG)
    return finish_GG


def _has_ports(cluster: Cluster) -> bool:
    """Whether each GPU has its own way out of its node, on links that nothing inside the node uses."""
    wiring, fabric = cluster.wiring, cluster.fabric
    if wiring is None or not isinstance(fabric, Leaves) or cluster.ways is not None or fabric.num_spines:
        return False
    if cluster.place_N is not None or not wiring.up_GH.size:
        return False
    up, down = wiring.up_GH[wiring.up_GH >= 0], wiring.down_GH[wiring.down_GH >= 0]
    inside = wiring.local_GGH[wiring.local_GGH >= 0]
    own = len(np.unique(up)) == len(up) and len(np.unique(down)) == len(down)
    return own and not np.isin(inside, np.concatenate([up, down])).any()


def _narrowest(cluster: Cluster, local_GH: IntArray, node_G: IntArray, gpu_G: IntArray) -> Floats:
    assert cluster.wiring is not None
    link_GH = local_GH[gpu_G] + node_G[:, None] * len(cluster.wiring.ends_B)
    narrowest: Floats = np.where(local_GH[gpu_G] >= 0, cluster.bandwidth_bytes_per_s_K[link_GH], np.inf).min(axis=1)
    return narrowest


def _pipes(cluster: Cluster, fabric: Leaves, leaves: IntArray) -> tuple[Floats, Floats]:
    """Up and down of each leaf; infinite where it cannot be full."""
    if not fabric.num_links:
        return np.full(len(leaves), np.inf), np.full(len(leaves), np.inf)
    first = fabric.first_link
    binds = cluster.can_bind_K[first:].reshape(-1, 2)[leaves]
    width = cluster.bandwidth_bytes_per_s_K[first:].reshape(-1, 2)[leaves]
    both = np.where(binds, width, np.inf)
    return both[:, 0], both[:, 1]


def _add_near(cluster: Cluster, ranks: Ints, bytes_GG: Floats, node_G: IntArray, finish_GG: Floats) -> None:
    """The ends of flows inside the nodes."""
    order = np.argsort(node_G, kind="stable")
    bounds = np.flatnonzero(np.diff(node_G[order], prepend=-1, append=-1))
    i, j = _pairs(np.split(order, bounds[1:-1]))
    moving = (bytes_GG[i, j] > 0) & (i != j)
    i, j = i[moving], j[moving]
    if not len(i):
        return
    path_FH = cluster.paths(ranks[i], ranks[j])
    here_FH = path_FH >= 0
    flows = FlowSet(
        capacity_bytes_per_s_K=cluster.bandwidth_bytes_per_s_K, link_I=path_FH[here_FH].astype(np.int32),
        first_F1=np.concatenate([[0], np.cumsum(here_FH.sum(axis=1))]), size_bytes_F=bytes_GG[i, j],
    )  # fmt: skip
    finish_GG[i, j] = finish_times(flows).finish_s_F


def _pairs(groups: list[Ints]) -> tuple[Ints, Ints]:
    """All pairs inside each group."""
    tables = [np.meshgrid(group, group, indexing="ij") for group in groups]
    first, second = (np.concatenate([table[side].ravel() for table in tables]) for side in (0, 1))
    return first, second
