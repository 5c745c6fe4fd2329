"""Rings, as many as a group has members in each node, so that each member's network card carries its part.

Every member sends (G - 1) / G of the buffer to the next for a gather or a reduce-scatter, twice that for an all-reduce,
in G - 1 (twice as many) dependent steps. Reference: Thakur, Rabenseifner, Gropp, "Optimization of collective
communication operations in MPICH" (2005), sections 4.1 and 4.5; several rings: NCCL's channels.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Floats, Ints, Wave

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce")


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Always."""
    return True


def waves(operation: str, groups_NG: Ints, share_GG: Floats | None, cluster: Cluster) -> list[Wave]:
    """One wave: the steps of a ring are alike, so their bytes are one flow and their latencies add up before it."""
    num_groups, size = groups_NG.shape
    rounds = (2 if operation == "all_reduce" else 1) * (size - 1)
    ordered_NG = np.sort(groups_NG, axis=1)
    local = _members_per_node(ordered_NG, cluster)
    rings = [_rotated(ordered_NG, local, turn) for turn in range(local)] if local < size else [ordered_NG]
    source = np.concatenate([ring.ravel() for ring in rings])
    target = np.concatenate([np.roll(ring, -1, axis=1).ravel() for ring in rings])
    share = np.full(len(source), rounds / size / len(rings))
    ring = np.repeat(np.arange(num_groups * len(rings)), size)
    group = ring % num_groups
    return [Wave(source_F=source, target_F=target, share_F=share, group_F=group, bundle_F=ring, steps=float(rounds))]


def _members_per_node(ordered_NG: Ints, cluster: Cluster) -> int:
    """Members of each group in each of its nodes if that is one number, else 1 (then a single ring has to do)."""
    nodes_NG = ordered_NG // cluster.gpus_per_node
    local = int((nodes_NG[0] == nodes_NG[0, 0]).sum())
    if ordered_NG.shape[1] % local:
        return 1
    blocks = nodes_NG.reshape(len(nodes_NG), -1, local)
    return local if bool((blocks == blocks[:, :, :1]).all()) else 1


def _rotated(ordered_NG: Ints, local: int, turn: int) -> Ints:
    """The ring that enters each node at another member: the members of a node, turned by `turn`."""
    blocks = ordered_NG.reshape(len(ordered_NG), -1, local)
    return np.roll(blocks, -turn, axis=2).reshape(ordered_NG.shape)
