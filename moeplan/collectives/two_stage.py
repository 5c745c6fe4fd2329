"""First inside each node, so that everything for local index l is on the rank with index l; then between nodes, index
by index.

Messages between nodes are as many times larger as the group has members in a node, and never cross rails; the bytes
inside a node are those of both stages. Reference: Rajbhandari et al., "DeepSpeed-MoE" (ICML 2022), section 5.2.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Floats, Ints, Wave

OPERATIONS = ("all_to_all",)


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has the same number of members, more than one, in each of several nodes, side by side."""
    nodes_NG = groups_NG // cluster.gpus_per_node
    local = int((nodes_NG[0] == nodes_NG[0, 0]).sum())
    if local == 1 or local == groups_NG.shape[1] or groups_NG.shape[1] % local:
        return False
    blocks = nodes_NG.reshape(len(nodes_NG), -1, local)
    distinct = np.sort(blocks[:, :, 0], axis=1)
    return bool((blocks == blocks[:, :, :1]).all() and (distinct[:, 1:] != distinct[:, :-1]).all())


def waves(operation: str, groups_NG: Ints, share_GG: Floats | None, cluster: Cluster) -> list[Wave]:
    """Two waves: (n, l) to (n, l') with all that is for any (*, l'), then (n, l') to (n', l') with all that is for
    it.
    """
    size = groups_NG.shape[1]
    nodes_NG = groups_NG // cluster.gpus_per_node
    local = int((nodes_NG[0] == nodes_NG[0, 0]).sum())
    share = np.full((size, size), 1.0 / size) if share_GG is None else share_GG
    share_NLNL = share.reshape(size // local, local, size // local, local)
    inside_NLL = share_NLNL.sum(axis=2)
    between_NNL = share_NLNL.sum(axis=1)
    n, a, b = np.nonzero(inside_NLL * (1.0 - np.eye(local)))
    first = _wave(groups_NG, n * local + a, n * local + b, inside_NLL[n, a, b])
    n, m, b = np.nonzero(between_NNL * (1.0 - np.eye(size // local))[:, :, None])
    return [first, _wave(groups_NG, n * local + b, m * local + b, between_NNL[n, m, b])]


def _wave(groups_NG: Ints, i: Ints, j: Ints, share: Floats) -> Wave:
    num_groups = len(groups_NG)
    return Wave(
        source_F=groups_NG[:, i].ravel(),
        target_F=groups_NG[:, j].ravel(),
        share_F=np.tile(share, num_groups),
        group_F=np.repeat(np.arange(num_groups), len(i)),
        bundle_F=np.arange(num_groups * len(i)),
    )
