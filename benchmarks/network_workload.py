"""The exchanges that the network is measured on: who sends how much to whom over which links, as arrays.

The cluster: nodes of 8 GPUs; each GPU has a port to a switch within its node (450 GB/s out, 450 in) and its own NIC
(50 GB/s out, 50 in). The NICs r of a pod's nodes are on one leaf switch, with one pipe up and one down that carry all
its NICs' bandwidth / `oversub`. No latency. The links of a flow:

    in a node        port out of the source, port into the target
    under a leaf     NIC out of the source, NIC into the target
    otherwise        NIC out of the source, up from its leaf, down to the leaf of the target, NIC into the target

The traffic is made of whole numbers, and of floating point operations in one order, so that another program can
have the same bytes. Chance is a hash (splitmix64) of the seed and the pair of GPUs:

    uniform  every pair carries `mean_bytes`
    zipf     a pair carries mean_bytes * GPUs * w * (0.5 + u) bytes: w is Zipf's law over the targets in shuffled
             order, u a hash in [0, 1). Every flow has its own size, so that no two need end together
    sparse   each GPU sends to the 32 others (all, if there are fewer) with the least hash; a pair carries
             mean_bytes * (0.5 + u) bytes and starts at a whole nanosecond of the first half of the time that the
             busiest link needs for all its bytes. Few flows start together

Reference: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
Axes: G GPUs, H the others of each, K links, F flows, I the links of all flows, flow by flow; F1 where the links of each
flow begin, and their end. Flows come by source, then by target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simgrid_runs import Job

Array = NDArray[Any]
NODE_GPUS = 8
PORT_BYTES_PER_S, NIC_BYTES_PER_S = 450e9, 50e9
FAN_OUT = 32
"""To how many others a GPU sends in the sparse exchange."""
TARGETS, SIZES, STARTS = 1 << 61, 1 << 62, 1 << 63
"""Set in what is hashed for the sparse exchange, so that its three draws are not the same."""
MOST_SEEDS = 1 << 21


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Flows on links. `start_s_F` is None where all start at 0."""

    capacity_bytes_per_s_K: Array
    link_I: Array
    first_F1: Array
    size_bytes_F: Array
    start_s_F: Array | None
    source_F: Array
    target_F: Array


def workload(
    gpus: int,
    pattern: str,
    *,
    seed: int = 1,
    oversub: float = 1.0,
    pod_nodes: int = 8,
    mean_bytes: float = 1048576.0,
    zipf_s: float = 0.5,
) -> Workload:
    """The exchange of a pattern (`uniform`, `zipf`, `sparse`) on a cluster of so many GPUs."""
    if gpus < NODE_GPUS or gpus % NODE_GPUS:
        raise ValueError(f"gpus: {gpus} is not a number of whole nodes; use a multiple of {NODE_GPUS}")
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: {pattern!r} is not one; use {', '.join(PATTERNS)}")
    if not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"seed: {seed} would meet another draw's hash; use 0 to {MOST_SEEDS - 1}")
    source_F, target_F, size_bytes_F = PATTERNS[pattern](gpus, seed=seed, mean_bytes=mean_bytes, zipf_s=zipf_s)
    link_I, first_F1 = paths(source_F, target_F, gpus=gpus, pod_nodes=pod_nodes)
    together = Workload(
        capacity_bytes_per_s_K=capacities(gpus, oversub=oversub, pod_nodes=pod_nodes),
        link_I=link_I, first_F1=first_F1, size_bytes_F=size_bytes_F, start_s_F=None,
        source_F=source_F, target_F=target_F,
    )  # fmt: skip
    return replace(together, start_s_F=starts_s(together, gpus, seed=seed)) if pattern == "sparse" else together


def as_job(flows: Workload) -> Job:
    """The same, for SimGrid."""
    return Job(
        capacity_bytes_per_s_K=flows.capacity_bytes_per_s_K.tolist(),
        latency_s_K=[0.0] * len(flows.capacity_bytes_per_s_K),
        link_I=flows.link_I.tolist(), first_F1=flows.first_F1.tolist(),
        size_bytes_F=flows.size_bytes_F.astype(np.int64).tolist(),
        start_s_F=[0.0] * len(flows.size_bytes_F) if flows.start_s_F is None else flows.start_s_F.tolist(),
        source_F=flows.source_F.tolist(), target_F=flows.target_F.tolist(),
    )  # fmt: skip


def port_bound_s(flows: Workload) -> float:
    """Seconds before which the busiest link cannot have carried all its bytes."""
    size_bytes_I = np.repeat(flows.size_bytes_F, np.diff(flows.first_F1))
    load_bytes_K = np.bincount(flows.link_I, weights=size_bytes_I, minlength=len(flows.capacity_bytes_per_s_K))
    return float((load_bytes_K / flows.capacity_bytes_per_s_K).max())


# ---- who sends how much to whom


def uniform(gpus: int, *, seed: int, mean_bytes: float, zipf_s: float) -> tuple[Array, Array, Array]:
    """The same to all others; neither the seed nor Zipf's law has a say."""
    source_F, target_F = all_pairs(gpus)
    return source_F, target_F, np.full(len(source_F), float(int(mean_bytes)))


def zipf(gpus: int, *, seed: int, mean_bytes: float, zipf_s: float) -> tuple[Array, Array, Array]:
    """More to some targets than to others, and no two alike."""
    source_F, target_F = all_pairs(gpus)
    size_bytes_GH = np.empty((gpus, gpus - 1))
    for source, size_bytes_H in enumerate(zipf_rows(gpus, seed=seed, mean_bytes=mean_bytes, zipf_s=zipf_s)):
        size_bytes_GH[source] = size_bytes_H
    return source_F, target_F, size_bytes_GH.ravel()


def zipf_rows(gpus: int, *, seed: int, mean_bytes: float, zipf_s: float) -> Iterator[Array]:
    """What each source sends to the others, source by source, to need no memory for what is not asked for.

    The powers are Python's, and the sum goes from target to target: numpy's own might differ in the last place.
    """
    order = np.argsort(splitmix64(seed * 1000003 + np.arange(gpus, dtype=np.uint64)), kind="stable")
    law_G = np.zeros(gpus)
    law_G[order] = [(rank + 1.0) ** -zipf_s for rank in range(gpus)]
    mean_bytes_G = mean_bytes * gpus * (law_G / np.cumsum(law_G)[-1])
    for source in range(gpus):
        target_H = np.delete(np.arange(gpus, dtype=np.uint64), source)
        noise_H = 0.5 + share((seed << 40) ^ (source * gpus + target_H))
        yield whole_bytes(mean_bytes_G[target_H] * noise_H)


def sparse(gpus: int, *, seed: int, mean_bytes: float, zipf_s: float) -> tuple[Array, Array, Array]:
    """A few hashed targets for each GPU; Zipf's law has no say."""
    fan_out = min(FAN_OUT, gpus - 1)
    source_F = np.repeat(np.arange(gpus, dtype=np.int32), fan_out)
    target_F = np.concatenate([hashed_targets(source, gpus, fan_out, seed=seed) for source in range(gpus)])
    noise_F = 0.5 + share(((seed << 40) | SIZES) ^ pairs(source_F, target_F, gpus))
    return source_F, target_F, whole_bytes(mean_bytes * noise_F)


PATTERNS: dict[str, Callable[..., tuple[Array, Array, Array]]] = {"uniform": uniform, "zipf": zipf, "sparse": sparse}


def hashed_targets(source: int, gpus: int, fan_out: int, *, seed: int) -> Array:
    """The others whose pair with the source has the least hash, in order."""
    draw_G = splitmix64(((seed << 40) | TARGETS) ^ (source * gpus + np.arange(gpus, dtype=np.uint64)))
    draw_G[source] = np.iinfo(np.uint64).max
    return np.sort(np.argpartition(draw_G, fan_out - 1)[:fan_out]).astype(np.int32)


def starts_s(flows: Workload, gpus: int, *, seed: int) -> Array:
    """Whole nanoseconds, hashed over the first half of the time that the busiest link needs."""
    last_ns = int(port_bound_s(flows) / 2 * 1e9)
    draw_F = share(((seed << 40) | STARTS) ^ pairs(flows.source_F, flows.target_F, gpus))
    start_s_F: Array = np.floor(draw_F * (last_ns + 1)) / 1e9
    return start_s_F


def all_pairs(gpus: int) -> tuple[Array, Array]:
    """Everyone with everyone else."""
    source_G1 = np.arange(gpus, dtype=np.int32)[:, None]
    target_H = np.arange(gpus - 1, dtype=np.int32)
    return np.repeat(source_G1.ravel(), gpus - 1), (target_H + (target_H >= source_G1)).ravel()


def pairs(source_F: Array, target_F: Array, gpus: int) -> Array:
    """One number for each pair."""
    pair_F: Array = source_F.astype(np.uint64) * np.uint64(gpus) + target_F.astype(np.uint64)
    return pair_F


def whole_bytes(size_F: Array) -> Array:
    """Rounded, and at least one."""
    return np.maximum(1.0, np.floor(size_F + 0.5))


def splitmix64(number: Array) -> Array:
    """A 64-bit hash of 64-bit numbers; what overflows is lost, as it should."""
    x = number + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashed: Array = x ^ (x >> np.uint64(31))
    return hashed


def share(number: Array) -> Array:
    """A hash in [0, 1): its first 53 bits, all that a float can hold."""
    draw: Array = (splitmix64(number) >> np.uint64(11)) * 2.0**-53
    return draw


# ---- over which links


def capacities(gpus: int, *, oversub: float, pod_nodes: int) -> Array:
    """The links, in this order: ports out, ports in, NICs out, NICs in, leaves up, leaves down."""
    nodes = gpus // NODE_GPUS
    members = [min(pod_nodes, nodes - first) for first in range(0, nodes, pod_nodes)]
    leaf_K = np.repeat(members, NODE_GPUS) * NIC_BYTES_PER_S / oversub
    return np.concatenate([np.full(2 * gpus, PORT_BYTES_PER_S), np.full(2 * gpus, NIC_BYTES_PER_S), leaf_K, leaf_K])


def paths(source_F: Array, target_F: Array, *, gpus: int, pod_nodes: int) -> tuple[Array, Array]:
    """The links of all flows, and where those of each begin."""
    same_node_F = source_F // NODE_GPUS == target_F // NODE_GPUS
    up_F, down_F = leaf(source_F, pod_nodes), leaf(target_F, pod_nodes)
    far_F = ~same_node_F & (up_F != down_F)
    first_F1 = np.zeros(len(source_F) + 1, np.int64)
    np.cumsum(2 + 2 * far_F.astype(np.int8), out=first_F1[1:])
    leaves = NODE_GPUS * -(-gpus // (NODE_GPUS * pod_nodes))
    link_I = np.empty(first_F1[-1], np.int32)
    link_I[first_F1[:-1]] = source_F + 2 * gpus * ~same_node_F
    link_I[first_F1[1:] - 1] = target_F + gpus + 2 * gpus * ~same_node_F
    second = first_F1[:-1][far_F] + 1
    link_I[second] = 4 * gpus + up_F[far_F]
    second += 1
    link_I[second] = 4 * gpus + leaves + down_F[far_F]
    return link_I, first_F1


def leaf(gpu_F: Array, pod_nodes: int) -> Array:
    """Under which leaf the NIC of a GPU is."""
    under_F: Array = gpu_F // (NODE_GPUS * pod_nodes) * NODE_GPUS + gpu_F % NODE_GPUS
    return under_F
