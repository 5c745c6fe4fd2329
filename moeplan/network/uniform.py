"""An even all-to-all among all GPUs of a regular cluster, from a few pairs: nobody lists what is all alike.

Where nodes are alike and pods are full, swapping two nodes of a pod, or two pods, changes nothing. So the pairs of GPU
a of one node and GPU b of the same, a neighbouring or a far node stand for all such pairs.
Axes: C class of pairs, I place in the list of all classes' links, K link of the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.fabric import Leaves
from moeplan.domain.program import Floats, Ints
from moeplan.network.fluid import FlowSet


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pairs:
    """One pair of each class, how many there are, their paths over classes of links, and the class of each link."""

    source_C: Ints
    target_C: Ints
    count_C: Ints
    first_C1: Ints
    link_I: Ints
    times_I: Floats
    class_K: Ints
    first_link: Ints
    """One link of each class."""


def is_regular(cluster: Cluster) -> bool:
    """Whether all nodes are alike and all pods full."""
    fabric = cluster.fabric
    return (
        isinstance(fabric, Leaves)
        and cluster.ways is None
        and cluster.place_N is None
        and not cluster.spec.speeds
        and not cluster.spec.faults
        and fabric.num_spines == 0
        and cluster.num_nodes % min(fabric.nodes_per_leaf, cluster.num_nodes) == 0
    )


def pairs_of(cluster: Cluster) -> Pairs:
    """The classes of pairs of different GPUs of a regular cluster."""
    fabric = cluster.fabric
    assert isinstance(fabric, Leaves)
    nodes, gpus = cluster.num_nodes, cluster.gpus_per_node
    pod = min(fabric.nodes_per_leaf, nodes)
    others = [(0, nodes), (1, nodes * (pod - 1)), (pod, nodes * (nodes - pod))]
    a, b = (axis.ravel() for axis in np.meshgrid(np.arange(gpus), np.arange(gpus), indexing="ij"))
    parts = [(a, b + node * gpus, count) for node, count in others if count > 0 and node < nodes]
    source = np.concatenate([each[0] for each in parts])
    target = np.concatenate([each[1] for each in parts])
    count = np.repeat([each[2] for each in parts], gpus * gpus)
    kept = source != target
    source, target, count = source[kept], target[kept], count[kept]
    class_K = _link_classes(cluster, fabric)
    num_links = np.bincount(class_K)
    paths_CH = cluster.paths(source, target)
    row, hop = np.nonzero((paths_CH >= 0) & cluster.can_bind_K[paths_CH])
    width = len(num_links)
    key, occurrences = np.unique(row * width + class_K[paths_CH[row, hop]], return_counts=True)
    first_C1 = np.searchsorted(key // width, np.arange(len(source) + 1))
    return Pairs(
        source_C=source, target_C=target, count_C=count, first_C1=first_C1,
        link_I=key % width, times_I=count[key // width] * occurrences / num_links[key % width], class_K=class_K,
        first_link=np.unique(class_K, return_index=True)[1],
    )  # fmt: skip


def _link_classes(cluster: Cluster, fabric: Leaves) -> Ints:
    """Links in the same place of their node are alike; so are pipes of one rail and direction."""
    assert cluster.wiring is not None
    local = len(cluster.wiring.ends_B)
    inside = np.tile(np.arange(local), cluster.num_nodes)
    pipe = np.arange(fabric.num_links)
    rail = pipe // 2 % fabric.num_nics if fabric.by_rail else pipe * 0
    return np.concatenate([inside, local + 2 * rail + pipe % 2]).astype(np.int64)


def flows_of(pairs: Pairs, cluster: Cluster, size_bytes_C: Floats) -> FlowSet:
    """The classes as flows, each of so many bytes."""
    return FlowSet(
        capacity_bytes_per_s_K=cluster.bandwidth_bytes_per_s_K[pairs.first_link],
        link_I=pairs.link_I.astype(np.int32), first_F1=pairs.first_C1, size_bytes_F=size_bytes_C, times_I=pairs.times_I,
    )  # fmt: skip
