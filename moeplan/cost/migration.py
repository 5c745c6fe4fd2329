"""Seconds until replicas of experts stand where they shall, over the links of the cluster.

Axes of arrays: E expert, G GPU, N node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """What one replica weighs, and the links that it comes by, idle; latency is left out."""

    replica_bytes: float
    gpus_per_node: int
    nic_bytes_per_s: float
    """Of all NICs of a node, in one direction; infinite where there is one node."""
    nvlink_bytes_per_s: float
    """Into a GPU."""

    @property
    def move_s(self) -> float:
        """Of one replica from another node, or where there is one node from another GPU."""
        far_s = self.gpus_per_node * self.replica_bytes / self.nic_bytes_per_s
        return far_s or self.replica_bytes / self.nvlink_bytes_per_s

    def seconds(self, stood_EG: Bools, stands_EG: Bools) -> float:
        """Until every replica that is new on its GPU is there: max(NIC in, NIC out, NVLink in).

        A GPU gets what its node has over NVLink, the rest through its own part of the node's NICs; nodes that have an
        expert send it in equal parts, through all their NICs.
        """
        each = self.gpus_per_node
        stood_EN = stood_EG.reshape(len(stood_EG), -1, each).any(axis=2)
        near_EG = np.repeat(stood_EN, each, axis=1)
        new_EG = stands_EG & ~stood_EG
        far_EG = new_EG & ~near_EG
        sent_N = (far_EG.sum(axis=1) / stood_EN.sum(axis=1)) @ stood_EN
        nic_s = max(each * far_EG.sum(axis=0).max(), sent_N.max()) * self.replica_bytes / self.nic_bytes_per_s
        near = (new_EG & near_EG).sum(axis=0).max()
        return float(max(nic_s, near * self.replica_bytes / self.nvlink_bytes_per_s))
