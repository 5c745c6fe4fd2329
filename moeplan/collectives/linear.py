"""Every member sends to every other at once, one message each: what NCCL's grouped send and receive does."""

from __future__ import annotations

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Floats, Ints, Wave

OPERATIONS = ("all_to_all",)


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Always."""
    return True


def waves(operation: str, groups_NG: Ints, share_GG: Floats | None, cluster: Cluster) -> list[Wave]:
    """One wave of G (G - 1) transfers in each group; pairs without bytes are left out."""
    num_groups, size = groups_NG.shape
    share = np.full((size, size), 1.0 / size) if share_GG is None else share_GG
    i, j = np.nonzero(share * (1.0 - np.eye(size)))
    return [
        Wave(
            source_F=groups_NG[:, i].ravel(),
            target_F=groups_NG[:, j].ravel(),
            share_F=np.tile(share[i, j], num_groups),
            group_F=np.repeat(np.arange(num_groups), len(i)),
            bundle_F=np.arange(num_groups * len(i)),
        )
    ]
