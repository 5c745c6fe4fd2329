"""Between the nodes: leaves under a spine, or a torus, and the paths over them, worked out for many pairs at once.

Axes: F pair of ranks, H link of a path (-1 behind the last), G GPU of a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moeplan.domain._frozen import Frozen
from moeplan.domain.wiring import Count, IntArray, NotNegative, Wiring

Kind = Literal["single_switch", "fat_tree", "rail_optimised", "torus"]
_OWN_FIELDS = {
    "single_switch": set[str](),
    "fat_tree": {"nodes_per_leaf", "oversubscription"},
    "rail_optimised": {"nodes_per_leaf", "oversubscription"},
    "torus": {"shape", "link"},
}
_EXAMPLES = {"nodes_per_leaf": "32", "shape": "[16, 16]", "link": "ici"}
_NEEDED = {"fat_tree": ("nodes_per_leaf",), "rail_optimised": ("nodes_per_leaf",), "torus": ("shape", "link")}


class FabricSpec(Frozen):
    """What stands between the nodes. Each switch on the way adds `latency_s`; in a torus the link's latency counts.

    single_switch: every NIC on one non-blocking switch.
    fat_tree: all NICs of `nodes_per_leaf` nodes on one leaf. Its uplinks are one fluid pipe per direction, as wide as
    its NICs divided by `oversubscription`; the spine above never blocks.
    rail_optimised: NIC r of the `nodes_per_leaf` nodes of a pod is on leaf (pod, r). Other rails are reached over the
    spine.
    torus: `shape` GPUs, each wired to its neighbours on every axis; ranks count along the last axis first.
    """

    kind: Kind
    nodes_per_leaf: Count | None = None
    oversubscription: Annotated[float, Field(gt=0, le=1e6)] | None = None
    latency_s: NotNegative = 0.0
    shape: tuple[int, ...] | None = Field(default=None, strict=False, min_length=1, max_length=6)
    link: str | None = None

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> FabricSpec:
        given = {
            name for name in ("nodes_per_leaf", "oversubscription", "shape", "link") if getattr(self, name) is not None
        }
        if self.kind == "torus" and self.latency_s:
            raise ValueError("latency has no effect on a torus, which has no switches; give it to the link instead")
        for name in sorted(given - _OWN_FIELDS[self.kind]):
            raise ValueError(f"{name} has no effect on a {self.kind}; remove it")
        for name in _NEEDED.get(self.kind, ()):
            if name not in given:
                raise ValueError(f"a {self.kind} needs {name}, such as {_EXAMPLES[name]}")
        if any(size < 1 for size in self.shape or ()):
            raise ValueError(f"shape {list(self.shape or ())} has an axis without GPUs; use sizes of 1 or more")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaves:
    """Which leaf each NIC is on. Leaf l owns the directed links first_link + 2l (up) and + 2l + 1 (down)."""

    by_rail: bool
    nodes_per_leaf: int
    num_nodes: int
    num_nics: int
    first_link: int
    is_switch: bool
    """One switch for all, without uplinks."""

    @property
    def num_pods(self) -> int:
        """Groups of nodes under the same leaf or leaves."""
        return -(-self.num_nodes // self.nodes_per_leaf)

    @property
    def num_leaves(self) -> int:
        """Leaf switches."""
        return self.num_pods * (self.num_nics if self.by_rail else 1)

    @property
    def num_pipes(self) -> int:
        """Leaves that have an uplink: none where a single leaf holds everything."""
        return self.num_leaves if self.num_leaves > 1 else 0

    def of(self, node_F: IntArray, nic_F: IntArray) -> IntArray:
        """The leaf that NIC `nic_F` of node `node_F` is plugged into."""
        pod_F = node_F // np.int32(self.nodes_per_leaf)
        return pod_F * np.int32(self.num_nics) + nic_F if self.by_rail else pod_F

    def nics_under(self) -> NDArray[np.int64]:
        """How many NICs are on each leaf that has an uplink; the last pod may be smaller."""
        nodes = np.full(self.num_pods, self.nodes_per_leaf, dtype=np.int64)
        nodes[-1] = self.num_nodes - (self.num_pods - 1) * self.nodes_per_leaf
        per_leaf = np.repeat(nodes, self.num_nics) if self.by_rail else nodes * self.num_nics
        return per_leaf[: self.num_pipes]

    def name(self, leaf: int) -> str:
        """`switch`, `leaf3`, or `leaf3.7` for rail 7 of pod 3."""
        if self.is_switch:
            return "switch"
        return f"leaf{leaf // self.num_nics}.{leaf % self.num_nics}" if self.by_rail else f"leaf{leaf}"


def leaves_of(spec: FabricSpec | None, *, num_nodes: int, num_nics: int, first_link: int) -> Leaves:
    """Where the NICs are plugged in; one node alone is on one switch."""
    tiered = spec is not None and spec.kind in ("fat_tree", "rail_optimised")
    return Leaves(
        by_rail=spec is not None and spec.kind == "rail_optimised",
        nodes_per_leaf=(spec.nodes_per_leaf if tiered and spec is not None else None) or num_nodes,
        num_nodes=num_nodes,
        num_nics=num_nics,
        first_link=first_link,
        is_switch=not tiered,
    )


def same_leaf(leaves: Leaves, wiring: Wiring, *, src_F: IntArray, dst_F: IntArray) -> NDArray[np.bool_]:
    """Whether the NICs of two ranks of different nodes are on one leaf."""
    node_a, node_b, gpu_a, gpu_b = _split(wiring, src_F, dst_F)
    same: NDArray[np.bool_] = leaves.of(node_a, wiring.nic_G[gpu_a]) == leaves.of(node_b, wiring.nic_G[gpu_b])
    return same


def leaf_paths(leaves: Leaves, wiring: Wiring, *, src_F: IntArray, dst_F: IntArray) -> IntArray:
    """(F, H) directed links from `src_F` to `dst_F`; H is the length of the longest of these paths."""
    node_a, node_b, gpu_a, gpu_b = _split(wiring, src_F, dst_F)
    inside = node_a == node_b
    if inside.all():
        return _trimmed(_local(wiring, node_a, gpu_a, gpu_b))
    outside = ~inside
    around = _around(leaves, wiring, node_a[outside], node_b[outside], gpu_a[outside], gpu_b[outside])
    within = _local(wiring, node_a[inside], gpu_a[inside], gpu_b[inside])
    path_FH = np.full((len(src_F), max(around.shape[1], within.shape[1])), -1, dtype=np.int32)
    path_FH[outside, : around.shape[1]] = around
    path_FH[inside, : within.shape[1]] = within
    return _trimmed(path_FH)


def _split(wiring: Wiring, src_F: IntArray, dst_F: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    num_gpus = np.int32(len(wiring.local_GGH))
    (node_a, gpu_a), (node_b, gpu_b) = np.divmod(src_F, num_gpus), np.divmod(dst_F, num_gpus)
    return node_a, node_b, gpu_a, gpu_b


def _local(wiring: Wiring, node_F: IntArray, gpu_a: IntArray, gpu_b: IntArray) -> IntArray:
    return _moved(wiring.local_GGH[gpu_a, gpu_b], node_F * np.int32(len(wiring.ends_B)))


def _around(
    leaves: Leaves, wiring: Wiring, node_a: IntArray, node_b: IntArray, gpu_a: IntArray, gpu_b: IntArray
) -> IntArray:
    block = np.int32(len(wiring.ends_B))
    up_FH = _moved(wiring.up_GH[gpu_a], node_a * block)
    down_FH = _moved(wiring.down_GH[gpu_b], node_b * block)
    leaf_a, leaf_b = leaves.of(node_a, wiring.nic_G[gpu_a]), leaves.of(node_b, wiring.nic_G[gpu_b])
    pipes_FH = leaves.first_link + 2 * np.stack([leaf_a, leaf_b], axis=1) + np.array([0, 1], dtype=np.int32)
    pipes_FH[leaf_a == leaf_b] = -1
    if (pipes_FH < 0).all():
        return _left_justified(np.concatenate([up_FH, down_FH], axis=1))
    return _left_justified(np.concatenate([up_FH, pipes_FH.astype(np.int32), down_FH], axis=1))


def _moved(link_FH: IntArray, base_F: IntArray) -> IntArray:
    return np.where(link_FH < 0, np.int32(-1), link_FH + base_F[:, None])


def _left_justified(path_FH: IntArray) -> IntArray:
    """The same rows with every -1 moved to the end."""
    kept_FH = path_FH >= 0
    if kept_FH.all():
        return path_FH
    width = path_FH.shape[1]
    length_F = kept_FH.view(np.int8) @ np.ones(width, dtype=np.int32)  # summing along short rows is slower
    packed_FH = np.full_like(path_FH, -1)
    packed_FH[np.arange(width, dtype=np.int32) < length_F[:, None]] = path_FH[kept_FH]
    return packed_FH


def _trimmed(path_FH: IntArray) -> IntArray:
    width = path_FH.shape[1]
    while width and (path_FH[:, width - 1] < 0).all():
        width -= 1
    return np.ascontiguousarray(path_FH[:, :width])


@dataclass(frozen=True, kw_only=True, slots=True)
class Torus:
    """Link `rank * num_ports + port` leaves `rank` on one axis in one direction; an axis of 2 has one wire, not two."""

    shape: tuple[int, ...]

    @property
    def ports(self) -> tuple[tuple[int, int], ...]:
        """(axis, +1 or -1) of every directed link that leaves a GPU."""
        return tuple(
            (axis, sign)
            for axis, size in enumerate(self.shape)
            for sign in (1, -1)
            if size > 2 or (size == 2 and sign == 1)
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """How far apart the ranks of two neighbours on each axis are."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    def neighbour(self, rank: int, port: int) -> int:
        """The rank at the other end of the link that leaves `rank` through `port`."""
        axis, sign = self.ports[port]
        stride, size = self.strides[axis], self.shape[axis]
        position = rank // stride % size
        return rank + stride * ((position + sign) % size - position)


def torus_paths(torus: Torus, *, src_F: IntArray, dst_F: IntArray) -> IntArray:
    """(F, H) directed links in dimension order, on each axis the shorter way round, ties to the positive direction."""
    legs, rank_F = [np.empty((len(src_F), 0), dtype=np.int32)], src_F
    for axis, (size, stride) in enumerate(zip(torus.shape, torus.strides, strict=True)):
        start_F = src_F // np.int32(stride) % np.int32(size)
        end_F = dst_F // np.int32(stride) % np.int32(size)
        base_F = rank_F - np.int32(stride) * start_F
        legs.append(_leg(torus, axis, base_F=base_F, start_F=start_F, end_F=end_F))
        rank_F = base_F + np.int32(stride) * end_F
    return _trimmed(_left_justified(np.concatenate(legs, axis=1)))


def _leg(torus: Torus, axis: int, *, base_F: IntArray, start_F: IntArray, end_F: IntArray) -> IntArray:
    """The links along one axis; `base_F` is the rank at position 0 of the ring that the leg runs on."""
    size, ports = torus.shape[axis], torus.ports
    ahead_F = (end_F - start_F) % np.int32(size)
    forward_F = 2 * ahead_F <= size
    steps_F = np.where(forward_F, ahead_F, size - ahead_F)
    sign_F = np.where(forward_F, np.int32(1), np.int32(-1))
    step_H = np.arange(steps_F.max(initial=0), dtype=np.int32)
    position_FH = start_F[:, None] + sign_F[:, None] * step_H
    position_FH += np.where(
        position_FH < 0, np.int32(size), np.where(position_FH >= size, np.int32(-size), np.int32(0))
    )
    first_F = base_F * np.int32(len(ports)) + np.int32(ports.index((axis, 1)) if (axis, 1) in ports else 0)
    first_F += ~forward_F  # the port of the negative direction follows that of the positive one
    link_FH = first_F[:, None] + np.int32(torus.strides[axis] * len(ports)) * position_FH
    return np.where(step_H < steps_F[:, None], link_FH, np.int32(-1))
