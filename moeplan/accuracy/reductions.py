"""All-reduces that are no rings: servers' own kernels in one NVLink domain, NCCL's trees and what switches sum.

In a domain each of n GPUs reads what the others have and adds it up (once), or a share of it, and then the sums of the
others (twice):

    once   start + (n - 1) size / rate
    twice  2 (start + (n - 1) / n size / rate)

Between nodes a message goes up and down a tree, whose delays are those by which NCCL itself chooses, in its protocol
for short messages:

    2 ((GPUs of a node - 1) near + log2(nodes) far) + base  +  2 size / rate of a GPU's card
"""

from __future__ import annotations

from math import inf, log2

from moeplan.domain.cluster import Cluster

_START_S = 5e-6
"""Reference: AIConfigurator (aiconfigurator-core 0.12.0), custom_allreduce_perf tables of vLLM 0.24.0, SGLang 0.5.14
and TensorRT-LLM 1.3.0rc20: 8 KiB take 3.5 to 5.2 us on eight H200 and 5.3 to 8.1 on eight B200.
"""
_BASE_S, _NEAR_S, _FAR_S = 6.8e-6, 0.6e-6, 5.0e-6
"""Reference: NVIDIA/nccl, src/graph/tuning.cc: latencies of trees with protocol LL."""


def all_reduce_s(cluster: Cluster, *, ranks: int, size_bytes: float) -> float:
    """Seconds of an all-reduce of `size_bytes` over the first `ranks` GPUs."""
    near = min(ranks, cluster.gpus_per_node)
    nodes = -(-ranks // near)
    if ranks == 1:
        return 0.0
    if nodes == 1:
        link = cluster.spec.links["nvlink" if "nvlink" in cluster.spec.links else next(iter(cluster.spec.links))]
        read_s = (near - 1) * size_bytes / (link.bandwidth_bytes_per_s * link.efficiency)
        return min(_START_S + read_s, 2 * (_START_S + read_s / near))
    assert cluster.spec.nic is not None
    delay_s = _BASE_S + 2 * ((near - 1) * _NEAR_S + log2(nodes) * _FAR_S)
    return delay_s + 2 * size_bytes / near / (cluster.spec.nic.bandwidth_bytes_per_s * cluster.spec.nic.efficiency)


_SWITCH_BASE_S = 23e-6
_SWITCH_EFFICIENCY = {"hopper": 0.85, "blackwell": 0.74}
"""Reference: NVIDIA/nccl, src/graph/tuning.cc: base latency of NVLS, and its efficiency by generation."""


def switched_s(cluster: Cluster, *, ranks: int, size_bytes: float) -> float:
    """Seconds of NCCL's all-reduce that the switches of one NVLink domain sum; infinite where they cannot.

    start + base + (1 + 1 / n) size / (rate x efficiency): a GPU sends all, and a share of the sum comes back once more.
    """
    name = cluster.gpu.name
    kind = "blackwell" if name.startswith(("b", "gb")) else "hopper" if name.startswith("h") else None
    if kind is None or "nvlink" not in cluster.spec.links or ranks > cluster.gpus_per_node:
        return inf
    link = cluster.spec.links["nvlink"]
    rate = link.bandwidth_bytes_per_s * link.efficiency * _SWITCH_EFFICIENCY[kind]
    return cluster.gpu.exchange_start_s + _SWITCH_BASE_S + (1 + 1 / ranks) * size_bytes / rate
