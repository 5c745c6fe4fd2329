"""Two binary trees, each for half of the bytes, such that no node is an inner one in both.

Chunks follow one another, so that all edges of a tree are busy at once and only its depth is paid as latency: once for
a broadcast, and once more for the sums on their way up in an all-reduce. Nodes are the places of the trees, as many
pairs of trees as a node has members, each entering it at another one and going on as a chain; a group in one node, or
unevenly spread, has a pair of trees of its members. References: Sanders, Speck, Traeff, "Two-tree algorithms for full
bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009; NVIDIA, NCCL 2.4, double binary trees.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._places import has_rails, ranks_by_node
from moeplan.collectives._waves import mirrored
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_reduce", "broadcast")


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Always."""
    return True


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Down from the root, for an all-reduce after the same way up."""
    is_rooted = exchange.operation == "broadcast"
    chains_NCBL = _chains(exchange, cluster, is_rooted=is_rooted)
    down = _down(chains_NCBL, is_rooted=is_rooted)
    return [down] if is_rooted else [*mirrored([down]), down]


def parents(size: int) -> tuple[Ints, Ints]:
    """The parent of each of `size` places in either tree; place 0 is the root of both (-1), with one child in each.

    In the first tree odd places are leaves; the second is the first with places mirrored, or moved on by one.
    """
    place = np.arange(1, size)
    low = place & -place
    parent = (place - low) | (low << 1)
    parent = np.where(parent >= size, place - low, parent)
    last = size - 1
    there = size - place if last % 2 == 0 else place % max(last, 1) + 1
    back = np.zeros(size, np.int64)
    back[there] = place
    return np.append(-1, parent), np.append(-1, back[parent[there - 1]])


def _chains(exchange: Exchange, cluster: Cluster, *, is_rooted: bool) -> Ints:
    """(N, C, B, L) ranks for each of C pairs of trees over B places of L ranks; if rooted, member 0 is the first."""
    groups_NG = exchange.groups_NG
    blocks_NBL = np.sort(groups_NG, axis=1)[:, :, None]
    if has_rails(groups_NG, cluster):
        blocks_NBL = ranks_by_node(groups_NG, cluster)
    local = blocks_NBL.shape[2]
    if not is_rooted:
        return np.stack([np.roll(blocks_NBL, -turn, axis=2) for turn in range(local)], axis=1)
    is_root_NBL = blocks_NBL == groups_NG[:, :1, None]
    home_N1 = is_root_NBL.any(axis=2).argmax(axis=1)[:, None]
    order_NB = (home_N1 + np.arange(blocks_NBL.shape[1])) % blocks_NBL.shape[1]
    blocks_NBL = np.take_along_axis(blocks_NBL, order_NB[:, :, None], axis=1)
    chains_NCBL = np.stack([np.roll(blocks_NBL, -turn, axis=2) for turn in range(local)], axis=1)
    is_other_NCL = chains_NCBL[:, :, 0] != groups_NG[:, :1, None]
    order_NCL = np.argsort(is_other_NCL, axis=2, kind="stable")
    chains_NCBL[:, :, 0] = np.take_along_axis(chains_NCBL[:, :, 0], order_NCL, axis=2)
    return chains_NCBL


def _down(chains_NCBL: Ints, *, is_rooted: bool) -> Wave:
    """All edges of all trees, from the root to the leaves; one bundle for each tree."""
    num_groups, channels, size, local = chains_NCBL.shape
    b, k = (each.ravel() for each in np.meshgrid(np.arange(size), np.arange(local - 1), indexing="ij"))
    child = np.arange(1, size)
    source, target = [], []
    for channel in range(channels):
        exit_at = int(is_rooted and local > 1 and channel > 0)
        for parent in parents(size):
            above = parent[1:]
            ranks = chains_NCBL[:, channel]
            way_out = np.where(above == 0, exit_at, 0)
            source.append(np.concatenate([ranks[:, above, way_out], ranks[:, b, k]], axis=1))
            target.append(np.concatenate([ranks[:, child, 0 * child], ranks[:, b, k + 1]], axis=1))
    edges = source[0].shape[1]
    bundle = np.repeat(np.arange(len(source) * num_groups), edges)
    return Wave(
        source_F=np.concatenate([each.ravel() for each in source]),
        target_F=np.concatenate([each.ravel() for each in target]),
        share_F=np.full(len(bundle), 0.5 / channels),
        group_F=bundle % num_groups,
        bundle_F=bundle,
        steps=float(_depth(size) + local - 1 + (is_rooted and local > 1)),
    )


def _depth(size: int) -> int:
    """Edges from the root to the deepest leaf."""
    depth = 0
    for parent in parents(size):
        at, steps = np.arange(size), 0
        while (at > 0).any():
            at, steps = np.maximum(parent[at], 0), steps + 1
        depth = max(depth, steps)
    return depth
