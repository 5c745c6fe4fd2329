"""Between the nodes: what a topology file says of the fabric, and the leaves under a spine.

Axes: F pair of ranks, H link of a path (-1 behind the last), N node, L leaf, S spine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moeplan.domain._frozen import Frozen
from moeplan.domain.wiring import Count, IntArray, NotNegative

Kind = Literal["single_switch", "fat_tree", "rail_optimised", "rail_only", "dragonfly", "torus"]
Policy = Literal["shortest", "ecmp", "rail_aligned", "dimension_order"]
BoolArray = NDArray[np.bool_]
_LEAVES = {"nodes_per_leaf", "oversubscription", "spines", "seed"}
_OWN_FIELDS = {
    "single_switch": set[str](),
    "fat_tree": _LEAVES,
    "rail_optimised": _LEAVES,
    "rail_only": _LEAVES,
    "dragonfly": {"nodes_per_router", "routers_per_group", "global_links_per_router", "link", "global_link"},
    "torus": {"shape", "link"},
}
_EXAMPLES = {
    "nodes_per_leaf": "32",
    "shape": "[16, 16]",
    "link": "ici",
    "global_link": "optical",
    "nodes_per_router": "4",
    "routers_per_group": "32",
    "global_links_per_router": "16",
}
_NEEDED = {
    "fat_tree": ("nodes_per_leaf",),
    "rail_optimised": ("nodes_per_leaf",),
    "dragonfly": ("nodes_per_router", "routers_per_group", "global_links_per_router", "link", "global_link"),
    "torus": ("shape", "link"),
}
_POLICIES: dict[str, tuple[Policy, ...]] = {
    "single_switch": ("shortest",),
    "fat_tree": ("shortest", "ecmp"),
    "rail_optimised": ("shortest", "ecmp", "rail_aligned"),
    "rail_only": ("rail_aligned",),
    "dragonfly": ("shortest",),
    "torus": ("dimension_order",),
}
MAX_AXES = 6


class FabricSpec(Frozen):
    """What stands between the nodes. Each switch on the way adds `latency_s`; in a torus the link's latency counts.

    single_switch: every NIC on one non-blocking switch. Peers on a wide-area network are this too: their NICs are their
    access links.
    fat_tree: all NICs of `nodes_per_leaf` nodes on one leaf. Its uplinks are one fluid pipe per direction, as wide as
    its NICs divided by `oversubscription`; the spine above never blocks. Supernodes with tapered uplinks are this.
    rail_optimised: NIC r of the `nodes_per_leaf` nodes of a pod is on leaf (pod, r). Other rails are reached over the
    spine.
    rail_only: rails as above, but nothing joins one rail to another. With `nodes_per_leaf` each rail has leaves, under
    a spine of its own; without, one switch. Reference: Wang et al., "Rail-only", IEEE Hot Interconnects 2024.
    dragonfly: the NICs of `nodes_per_router` nodes on one router; the `routers_per_group` routers of a group are wired
    all to all by `link`; each has `global_links_per_router` ports, which are dealt out evenly over the other groups,
    as `global_link`. Reference: Kim et al., "Technology-driven, highly-scalable dragonfly topology", ISCA 2008.
    torus: `shape` GPUs, each wired to its neighbours on every axis; ranks count along the last axis first.

    `routing` says which way a message between nodes takes. Every pair has one fixed way; none is adaptive.
    shortest: from the sender's NIC to the receiver's, up to the spine only if they are not on one leaf; in a dragonfly
    the minimal way: at most one hop in the sender's group, one global link, one hop in the receiver's. Valiant's detour
    over a third group is left out.
    ecmp: as shortest, over one of `spines` links of each leaf (each 1 / spines of the pipe). Which one is a hash of
    `seed`, sender and receiver, so that flows may collide. Without `spines` the pipe is spread perfectly.
    rail_aligned: the sender hands a message for another rail over inside its own node, to the GPU whose NIC is on the
    receiver's rail (NCCL's PXN), and it stays on that rail. The only way in rail_only. May have `spines` as well.
    dimension_order: one axis of a torus after the other, each the shorter way round, ties forward.
    """

    kind: Kind
    routing: Policy | None = None
    nodes_per_leaf: Count | None = None
    oversubscription: Annotated[float, Field(gt=0, le=1e6)] | None = None
    spines: Annotated[int, Field(ge=2, le=4096)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    nodes_per_router: Count | None = None
    routers_per_group: Annotated[int, Field(ge=1, le=4096)] | None = None
    global_links_per_router: Annotated[int, Field(ge=1, le=4096)] | None = None
    latency_s: NotNegative = 0.0
    shape: tuple[int, ...] | None = Field(default=None, strict=False, min_length=1, max_length=MAX_AXES)
    link: str | None = None
    global_link: str | None = None

    @property
    def policy(self) -> Policy:
        """The routing, which is the kind's first one where the file says nothing."""
        return self.routing or _POLICIES[self.kind][0]

    @property
    def is_by_rail(self) -> bool:
        """Whether NIC r of every node is on rail r."""
        return self.kind in ("rail_optimised", "rail_only")

    @property
    def ports_per_group(self) -> int:
        """Global ports of the routers of one group of a dragonfly."""
        return (self.routers_per_group or 1) * (self.global_links_per_router or 1)

    def num_groups(self, num_nodes: int) -> int:
        """Groups of a dragonfly: as many as the nodes fill."""
        return -(-num_nodes // ((self.nodes_per_router or 1) * (self.routers_per_group or 1)))

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> FabricSpec:
        fields = set().union(*_OWN_FIELDS.values())
        given = {name for name in fields if getattr(self, name) is not None}
        if self.kind == "torus" and self.latency_s:
            raise ValueError("latency has no effect on a torus, which has no switches; give it to the link instead")
        for name in sorted(given - _OWN_FIELDS[self.kind]):
            raise ValueError(f"{name} has no effect on a {self.kind}; remove it")
        for name in _NEEDED.get(self.kind, ()):
            if name not in given:
                raise ValueError(f"a {self.kind} needs {name}, such as {_EXAMPLES[name]}")
        if any(size < 1 for size in self.shape or ()):
            raise ValueError(f"shape {list(self.shape or ())} has an axis without GPUs; use sizes of 1 or more")
        self._check_routing(given)
        return self

    def _check_routing(self, given: set[str]) -> None:
        allowed = _POLICIES[self.kind]
        if self.policy not in allowed:
            raise ValueError(f"routing {self.policy} has no effect on a {self.kind}; use {' or '.join(allowed)}")
        if self.policy == "ecmp" and not self.spines:
            raise ValueError("routing ecmp needs spines, such as 16; add it, or use routing shortest")
        if self.policy == "shortest" and self.spines:
            raise ValueError("spines has no effect on routing shortest; use routing ecmp, or remove it")
        if self.seed is not None and not self.spines:
            raise ValueError("seed has no effect without spines to choose among; add spines, or remove it")
        if self.kind == "rail_only" and not self.nodes_per_leaf:
            for name in sorted(given & {"oversubscription", "spines"}):
                raise ValueError(f"{name} has no effect on rails of one switch; add nodes_per_leaf, or remove it")


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output of splitmix64 for each state: a hash whose bits all depend on all bits.

    Reference: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        z = state + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaves:
    """Which leaf each NIC is on, and the links above the leaves.

    Leaf l owns, for each of its ways up s, the directed links first_link + 2 (l * num_ways + s) (up) and the next one
    (down).
    """

    by_rail: bool
    has_rail_spines: bool
    """Each rail has its own spine, and no link leads from rail to rail."""
    nodes_per_leaf: int
    num_nodes: int
    """As built: nodes that are lost have kept their place."""
    num_nics: int
    first_link: int
    is_switch: bool
    """One switch for all, without uplinks."""
    num_spines: int = 0
    """0: one fluid pipe."""
    seed: int = 0
    place_N: IntArray | None = None
    """The place of each node that is left; None if all are."""
    is_live_LS: BoolArray | None = None
    """Which ways up work; None if all do."""

    @property
    def num_ways(self) -> int:
        """Ways from a leaf up to the spines."""
        return max(1, self.num_spines)

    @property
    def num_pods(self) -> int:
        """Groups of nodes under the same leaf or leaves."""
        return -(-self.num_nodes // self.nodes_per_leaf)

    @property
    def num_units(self) -> int:
        """Pods."""
        return self.num_pods

    @property
    def num_switches(self) -> int:
        """Leaf switches."""
        return self.num_pods * (self.num_nics if self.by_rail else 1)

    @property
    def num_pipes(self) -> int:
        """Leaves that have an uplink: none where a leaf can reach no other."""
        others = self.num_pods if self.has_rail_spines else self.num_switches
        return self.num_switches if others > 1 else 0

    @property
    def num_links(self) -> int:
        """Directed links above the leaves."""
        return 2 * self.num_pipes * self.num_ways

    def with_works(self, works_E: BoolArray) -> Leaves:
        """The same, knowing which of its links work; both directions of a link do or do not."""
        live_LS = works_E.reshape(-1, self.num_ways, 2)[:, :, 0]
        return self if live_LS.all() else replace(self, is_live_LS=live_LS)

    def of(self, node_F: IntArray, nic_F: IntArray) -> IntArray:
        """The leaf that NIC `nic_F` of node `node_F` is plugged into."""
        place_F = node_F if self.place_N is None else self.place_N[node_F]
        pod_F = place_F // np.int32(self.nodes_per_leaf)
        return pod_F * np.int32(self.num_nics) + nic_F if self.by_rail else pod_F

    def leaf_NK(self, num_nodes: int) -> IntArray:
        """The leaf of every NIC of the nodes that are left."""
        node_N, nic_K = np.arange(num_nodes, dtype=np.int32), np.arange(self.num_nics, dtype=np.int32)
        return np.broadcast_to(self.of(node_N[:, None], nic_K), (num_nodes, self.num_nics))

    def nics_under(self) -> NDArray[np.int64]:
        """How many NICs are on each leaf that has an uplink, as built; the last pod may be smaller."""
        nodes = np.full(self.num_pods, self.nodes_per_leaf, dtype=np.int64)
        nodes[-1] = self.num_nodes - (self.num_pods - 1) * self.nodes_per_leaf
        per_leaf = np.repeat(nodes, self.num_nics) if self.by_rail else nodes * self.num_nics
        return per_leaf[: self.num_pipes]

    def are_joined(self, leaf_a: IntArray, leaf_b: IntArray) -> BoolArray:
        """Whether any way leads from one leaf to the other."""
        joined: BoolArray = np.ones(np.broadcast_shapes(leaf_a.shape, leaf_b.shape), dtype=bool)
        if self.has_rail_spines:
            joined = leaf_a % self.num_nics == leaf_b % self.num_nics
        if self.is_live_LS is not None:
            joined &= (self.is_live_LS[leaf_a] & self.is_live_LS[leaf_b]).any(axis=-1)
        joined |= leaf_a == leaf_b
        return joined

    def units_N(self, num_nodes: int) -> tuple[IntArray, IntArray]:
        """The pod of each node; where in the pod it is makes no difference."""
        place_N = np.arange(num_nodes, dtype=np.int32) if self.place_N is None else self.place_N
        return place_N // np.int32(self.nodes_per_leaf), place_N * 0

    def is_near(self, leaf_a: IntArray, leaf_b: IntArray) -> BoolArray:
        """Whether two leaves are one."""
        near: BoolArray = leaf_a == leaf_b
        return near

    def meeting_points(self, leaf_RK: IntArray) -> IntArray:
        """(R, K, 1 + S) what leaves must share to be joined: the leaf itself, or a spine; -1 for one out of reach."""
        if not self.num_pipes:
            return leaf_RK[:, :, None]
        rail_RK = leaf_RK % np.int32(self.num_nics) if self.has_rail_spines else leaf_RK * 0
        if self.is_live_LS is None:
            return np.stack([leaf_RK, self.num_switches + rail_RK], axis=2)
        spine_S = np.arange(self.num_ways, dtype=np.int32)
        spine_RKS = self.num_switches + rail_RK[:, :, None] * np.int32(self.num_ways) + spine_S
        spine_RKS = np.where(self.is_live_LS[leaf_RK], spine_RKS, np.int32(-1))
        return np.concatenate([leaf_RK[:, :, None], spine_RKS], axis=2)

    def between(self, leaf_a: IntArray, leaf_b: IntArray, *, src_F: IntArray, dst_F: IntArray) -> IntArray:
        """(F, 2) the links up from one leaf and down to the other, -1 for both in one; no columns if all are."""
        is_same = leaf_a == leaf_b
        if is_same.all():
            return np.empty((len(leaf_a), 0), dtype=np.int32)
        way_F = self._ways(leaf_a, leaf_b, src_F, dst_F)[:, None] if self.num_spines else np.int32(0)
        leaf_FH = np.stack([leaf_a, leaf_b], axis=1)
        link_FH = self.first_link + 2 * (leaf_FH * np.int32(self.num_ways) + way_F) + np.array([0, 1], dtype=np.int32)
        link_FH[is_same] = -1
        as_int32: IntArray = link_FH.astype(np.int32, copy=False)
        return as_int32

    def _ways(self, leaf_a: IntArray, leaf_b: IntArray, src_F: IntArray, dst_F: IntArray) -> IntArray:
        """The spine of each pair, hashed over those that both leaves reach."""
        flow_F = (src_F.astype(np.uint64) << np.uint64(32)) | dst_F.astype(np.uint64)
        seed = splitmix64(np.array([self.seed], dtype=np.uint64))
        hash_F = splitmix64(seed ^ flow_F)
        if self.is_live_LS is None:
            return (hash_F % np.uint64(self.num_ways)).astype(np.int32)
        live_FS = self.is_live_LS[leaf_a] & self.is_live_LS[leaf_b]
        wanted_F = hash_F % np.maximum(1, live_FS.sum(axis=1)).astype(np.uint64)
        way_F: IntArray = (live_FS.cumsum(axis=1) > wanted_F[:, None]).argmax(axis=1).astype(np.int32)
        return way_F

    def name(self, leaf: int) -> str:
        """`switch`, `leaf3`, or `leaf3.7` for rail 7 of pod 3."""
        if self.is_switch:
            return "switch"
        return f"leaf{leaf // self.num_nics}.{leaf % self.num_nics}" if self.by_rail else f"leaf{leaf}"

    def link_ends(self, link: int) -> tuple[str, str]:
        """The leaf and the spine at the two ends of a link: `spine`, `spine2` of several, `spine7.2` on rail 7."""
        way, is_down = divmod(link - self.first_link, 2)
        leaf, spine = divmod(way, self.num_ways)
        numbers = [leaf % self.num_nics] * self.has_rail_spines + [spine] * (self.num_spines > 0)
        ends = self.name(leaf), "spine" + ".".join(map(str, numbers))
        return (ends[1], ends[0]) if is_down else ends


def leaves_of(
    spec: FabricSpec | None, *, num_nodes: int, num_nics: int, first_link: int, place_N: IntArray | None = None
) -> Leaves:
    """Where the NICs are plugged in; one node alone is on one switch."""
    tiered = spec is not None and spec.kind in ("fat_tree", "rail_optimised", "rail_only")
    return Leaves(
        by_rail=spec is not None and spec.is_by_rail,
        has_rail_spines=spec is not None and spec.kind == "rail_only",
        nodes_per_leaf=(spec.nodes_per_leaf if tiered and spec is not None else None) or num_nodes,
        num_nodes=num_nodes,
        num_nics=num_nics,
        first_link=first_link,
        is_switch=not tiered,
        num_spines=(spec.spines if spec else None) or 0,
        seed=(spec.seed if spec else None) or 0,
        place_N=place_N,
    )
