"""A cluster: GPUs, NICs and switches as directed links with capacities, and the paths that messages take over them.

Axes: K directed link of the cluster, F pair of ranks (a flow), H link of a path (-1 behind the last).
Numbers are SI, and bandwidth is what is usable (bandwidth x efficiency). Rank r is GPU r % gpus_per_node of node
r // gpus_per_node, where nodes that are lost do not count. Links are numbered node by node, node n from n * B on, then
those of the fabric. A link that does not work has a bandwidth of 0, and no path crosses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeplan.domain.cluster_spec import ClusterSpec, FaultSpec, Gpu, SpeedSpec
from moeplan.domain.fabric import FabricSpec, Leaves, leaves_of
from moeplan.domain.lattice import Dragonfly, Torus, dragonfly_of, torus_paths
from moeplan.domain.parts import Parts, links_of, places_left
from moeplan.domain.ways import (
    Switches,
    Ways,
    chosen_nics,
    ends_of,
    first_pair_cut_off,
    periods,
    switched_paths,
    ways_of,
)
from moeplan.domain.wiring import FABRIC, FloatArray, IntArray, LinkSpec, NicSpec, WireSpec, Wiring
from moeplan.errors import CatalogueError

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "Cluster",
    "ClusterSpec",
    "FabricSpec",
    "FaultSpec",
    "Gpu",
    "LinkSpec",
    "NicSpec",
    "SpeedSpec",
    "WireSpec",
    "build_cluster",
]

_Rank = TypeVar("_Rank", int, IntArray)
MAX_LINKS = 20_000_000
"""A cluster with more directed links is refused: its arrays alone would take half a gigabyte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Directed links with capacities, and the fixed path of every pair of ranks. Built by `build_cluster`.

    Inside a node: `wiring.wire_node` (fewest relays, then the smallest sum of 1 / bandwidth). Between nodes: over the
    GPU's nearest NIC into the fabric, by the fabric's `routing`, and into the other GPU over its nearest NIC. One path
    for each pair: no adaptive routing, no message striped over several NICs.
    Where something does not work: another way inside the node, else over the NICs with the shortest way, else over the
    fewest links of the fabric; two GPUs of a node whose wires fail meet over the fabric. Never over a third node, and
    always the same way. Two clusters are equal when their specs are.
    """

    spec: ClusterSpec
    link_kinds: tuple[str, ...] = field(compare=False)
    bandwidth_bytes_per_s_K: FloatArray = field(compare=False, repr=False)
    """What a long message can use of each directed link when it is alone."""
    latency_s_K: FloatArray = field(compare=False, repr=False)
    kind_K: NDArray[np.int8] = field(compare=False, repr=False)
    """Index into `link_kinds`."""
    wiring: Wiring | None = field(compare=False, repr=False)
    """None in a torus."""
    fabric: Switches | Torus = field(compare=False, repr=False)
    ways: Ways | None = field(compare=False, repr=False)
    """None where all nodes are alike and messages leave over the nearest NIC."""
    place_N: IntArray | None = field(compare=False, repr=False)
    """The number of each node as built, where nodes are lost."""

    @property
    def name(self) -> str:
        """The name of the topology."""
        return self.spec.name

    @property
    def gpu(self) -> Gpu:
        """The accelerator, the same everywhere."""
        return self.spec.gpu

    @property
    def num_nodes(self) -> int:
        """Nodes that are left: machines, or NVLink domains where a rack is one."""
        return self.spec.nodes if self.place_N is None else len(self.place_N)

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one node."""
        return self.spec.gpus_per_node

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes that are left: ranks are 0 to num_gpus - 1."""
        return self.num_nodes * self.spec.gpus_per_node

    @property
    def num_links(self) -> int:
        """Directed links."""
        return len(self.bandwidth_bytes_per_s_K)

    @property
    def message_overhead_s(self) -> float:
        """Software time of one message between nodes."""
        if self.spec.nic is not None:
            return self.spec.nic.message_overhead_s
        return max((link.message_overhead_s for link in self.spec.links.values()), default=0.0)

    @property
    def tier_names(self) -> tuple[str, ...]:
        """What the numbers of `tier` mean."""
        return "same GPU", "same node", "same group" if isinstance(self.fabric, Dragonfly) else "same leaf", "across"

    def node_of(self, rank: _Rank) -> _Rank:
        """The node of a rank, or of each of an array of ranks."""
        return rank // self.gpus_per_node

    def paths(self, src_F: ArrayLike, dst_F: ArrayLike) -> IntArray:
        """(F, H) indices of the directed links from each `src_F` to its `dst_F`; H is the longest path's length.

        Rows are padded with -1 at the end; a rank's path to itself is empty.
        """
        src, dst = self._ranks(src_F), self._ranks(dst_F)
        if isinstance(self.fabric, Torus):
            return torus_paths(self.fabric, src_F=src, dst_F=dst)
        assert self.wiring is not None
        return switched_paths(self.fabric, self.wiring, self.ways, src_F=src, dst_F=dst)

    def path(self, src: int, dst: int) -> tuple[int, ...]:
        """The directed links from one rank to another."""
        return tuple(link for link in self.paths([src], [dst])[0].tolist() if link >= 0)

    def path_latency_s(self, src_F: ArrayLike, dst_F: ArrayLike) -> FloatArray:
        """Sum of the latencies of each path's links; without the message overhead."""
        path_FH = self.paths(src_F, dst_F)
        latency_F: FloatArray = np.where(path_FH >= 0, self.latency_s_K[path_FH], 0.0).sum(axis=1)
        return latency_F

    def path_bandwidth_bytes_per_s(self, src_F: ArrayLike, dst_F: ArrayLike) -> FloatArray:
        """The narrowest link of each path, infinite for an empty one: an upper bound of any message's rate."""
        path_FH = self.paths(src_F, dst_F)
        bandwidth_FH = np.where(path_FH >= 0, self.bandwidth_bytes_per_s_K[path_FH], np.inf)
        bandwidth_F: FloatArray = bandwidth_FH.min(axis=1, initial=np.inf)
        return bandwidth_F

    def path_overhead_s(self, src_F: ArrayLike, dst_F: ArrayLike) -> FloatArray:
        """Software time of one message: the NIC's between nodes, the costliest wire's inside one, 0 to itself."""
        by_kind = [each.message_overhead_s if (each := self._spec_of(kind)) else 0.0 for kind in self.link_kinds]
        return self._per_message(src_F, dst_F, between=self.message_overhead_s, by_kind=by_kind)

    def path_gap_s(self, src_F: ArrayLike, dst_F: ArrayLike) -> FloatArray:
        """Time for which one message keeps its port busy beyond its bytes: the NIC's between nodes, the costliest
        wire's inside one, 0 to itself.
        """
        by_kind = [each.message_gap_s if (each := self._spec_of(kind)) else 0.0 for kind in self.link_kinds]
        between = self.spec.nic.message_gap_s if self.spec.nic else max(by_kind, default=0.0)
        return self._per_message(src_F, dst_F, between=between, by_kind=by_kind)

    def _spec_of(self, kind: str) -> LinkSpec | NicSpec | None:
        return self.spec.nic if kind == "nic" else self.spec.links.get(kind)

    def _per_message(
        self, src_F: ArrayLike, dst_F: ArrayLike, *, between: float, by_kind: Sequence[float]
    ) -> FloatArray:
        """`between` for pairs of different nodes, else the largest `by_kind` on the path."""
        src, dst = self._ranks(src_F), self._ranks(dst_F)
        path_FH = self.paths(src, dst)
        inside_F = np.where(path_FH >= 0, np.array(by_kind)[self.kind_K[path_FH]], 0.0).max(axis=1, initial=0.0)
        return np.where(self.node_of(src) != self.node_of(dst), between, inside_F)

    def tier(self, src_F: ArrayLike, dst_F: ArrayLike) -> NDArray[np.int8]:
        """How far each pair is apart: 0 same GPU, 1 same node, 2 same leaf (in a dragonfly: group), 3 across.

        In a torus 2 does not occur.
        """
        src, dst = self._ranks(src_F), self._ranks(dst_F)
        near_F = np.where(src == dst, np.int8(0), np.int8(1))
        far_F = np.full(len(near_F), 3, dtype=np.int8)
        if not isinstance(self.fabric, Torus) and self.num_nodes > 1:
            assert self.wiring is not None
            a, b = ends_of(self.wiring, src), ends_of(self.wiring, dst)
            nic_a, nic_b = chosen_nics(self.fabric, self.wiring, self.ways, a, b)
            is_near = self.fabric.is_near(self.fabric.of(a.node_F, nic_a), self.fabric.of(b.node_F, nic_b))
            far_F[is_near] = 2
        return np.where(self.node_of(src) == self.node_of(dst), near_F, far_F)

    def link_ends(self, link: int) -> tuple[str, str]:
        """The names at the two ends of a directed link, such as ("n3.gpu2", "n3.nvswitch")."""
        assert 0 <= link < self.num_links
        if isinstance(self.fabric, Torus):
            rank, port = divmod(link, len(self.fabric.ports))
            return self.gpu_name(rank), self.gpu_name(self.fabric.neighbour(rank, port))
        return self.fabric.link_ends(link) if link >= self.fabric.first_link else self._node_link_ends(link)

    def link_name(self, link: int) -> str:
        """A directed link in words: `n3.gpu2 -> n3.nvswitch`."""
        return " -> ".join(self.link_ends(link))

    def gpu_name(self, rank: int) -> str:
        """The name of a rank's GPU in `graph` and `link_name`: `n3.gpu2`, by the node's number as built."""
        node, gpu = divmod(rank, self.gpus_per_node)
        return f"n{self._place(node)}.gpu{gpu}"

    @property
    def can_bind_K(self) -> NDArray[np.bool_]:
        """Which links can hold a flow up: not a leaf's pipe that is as wide as all its NICs together, which hold it
        up before, and not a link that does not work.
        """
        binds = self.bandwidth_bytes_per_s_K > 0
        if isinstance(self.fabric, Leaves) and self.fabric.num_links:
            per_leaf = np.bincount(*self._nics_by_leaf(), minlength=self.fabric.num_switches)
            most_K = np.repeat(per_leaf, 2 * self.fabric.num_ways) * (1 - 1e-9)
            binds[self.fabric.first_link :] &= self.bandwidth_bytes_per_s_K[self.fabric.first_link :] < most_K
        return binds

    def _nics_by_leaf(self) -> tuple[IntArray, FloatArray]:
        """The leaf of every NIC, and how wide its port is."""
        assert isinstance(self.fabric, Leaves)
        assert self.wiring is not None
        assert self.spec.nic is not None
        inside = self.bandwidth_bytes_per_s_K[: self.fabric.first_link].reshape(self.num_nodes, -1)
        width = inside[:, inside.shape[1] - 2 * self.spec.nic.per_node :: 2]
        return self.fabric.leaf_NK(self.num_nodes).ravel(), width.ravel()

    @property
    def alike_block(self) -> int | None:
        """After how many ranks the cluster repeats, None if it does not.

        What holds for two ranks holds for those a block further on, if there are such: their path has links of the same
        kinds, latencies and, where they can bind, bandwidths; and two paths share a link if the paths that are a block
        further on do.
        """
        nodes = self._period_nodes()
        block = nodes * self.gpus_per_node if nodes else None
        return block if block and block < self.num_gpus else None

    def _period_nodes(self) -> int | None:
        fabric = self.fabric
        if isinstance(fabric, Torus):
            block = math.lcm(math.prod(fabric.shape[1:]), self.gpus_per_node)
            return None if self.spec.faults or self.spec.speeds else block // self.gpus_per_node
        if isinstance(fabric, Leaves) and fabric.num_spines and fabric.num_pipes:
            return None
        if isinstance(fabric, Dragonfly) and fabric.roads is not None:
            return None
        is_wide_K = ~self.can_bind_K & (self.bandwidth_bytes_per_s_K > 0)
        figures_XK = np.stack([np.where(is_wide_K, np.inf, self.bandwidth_bytes_per_s_K), self.latency_s_K])
        nodes_XNB = figures_XK[:, : fabric.first_link].reshape(2, self.num_nodes, -1)
        between_XUK = figures_XK[:, fabric.first_link :].reshape(2, fabric.num_units, -1)
        if isinstance(fabric, Dragonfly) and fabric.num_groups == 1 and (between_XUK != between_XUK[:, :, :1]).any():
            return None
        for nodes, units in periods(fabric, self.num_nodes):
            alike = np.array_equal(nodes_XNB[:, nodes:], nodes_XNB[:, :-nodes])
            if alike and (not units or np.array_equal(between_XUK[:, units:], between_XUK[:, :-units])):
                return nodes
        return None

    def graph(self) -> nx.DiGraph[str]:
        """A directed graph with the attributes `link`, `kind`, `bandwidth_bytes_per_s` and `latency_s` on each edge.

        Links that do not work are left out.
        """
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        graph.add_nodes_from(self.gpu_name(rank) for rank in range(self.num_gpus))
        working = np.flatnonzero(self.bandwidth_bytes_per_s_K > 0).tolist()
        graph.add_edges_from((*self.link_ends(link), self._attributes(link)) for link in working)
        return graph

    def bisection_bytes_per_s(self, ranks_a: Iterable[int], ranks_b: Iterable[int]) -> float:
        """The most that `ranks_a` together can send to `ranks_b` over any paths at all: the smallest cut between them.

        The fixed paths may reach less. No rank may be on both sides.
        Reference: Ford and Fulkerson, "Maximal flow through a network", Canadian Journal of Mathematics 8, 1956.
        """
        import networkx as nx

        graph = self.graph()
        graph.add_edges_from(("from a", self.gpu_name(rank)) for rank in ranks_a)
        graph.add_edges_from((self.gpu_name(rank), "to b") for rank in ranks_b)
        return float(nx.maximum_flow_value(graph, "from a", "to b", capacity="bandwidth_bytes_per_s"))

    def _attributes(self, link: int) -> dict[str, Any]:
        return {
            "link": link,
            "kind": self.link_kinds[self.kind_K[link]],
            "bandwidth_bytes_per_s": float(self.bandwidth_bytes_per_s_K[link]),
            "latency_s": float(self.latency_s_K[link]),
        }

    def _ranks(self, rank_F: ArrayLike) -> IntArray:
        ranks = np.atleast_1d(np.asarray(rank_F, dtype=np.int32))
        assert ranks.size == 0 or (ranks.min() >= 0 and ranks.max() < self.num_gpus), "a rank is not in the cluster"
        return ranks

    def _place(self, node: int) -> int:
        return node if self.place_N is None else int(self.place_N[node])

    def _node_link_ends(self, link: int) -> tuple[str, str]:
        assert self.wiring is not None
        assert not isinstance(self.fabric, Torus)
        node, local = divmod(link, len(self.wiring.ends_B))
        ends = self.wiring.ends_B[local]
        nic = int(next((name for name in ends if name.startswith("nic")), "nic0").removeprefix("nic"))
        switch = self.fabric.of(np.array([node], dtype=np.int32), np.array([nic], dtype=np.int32))[0]
        first, second = (
            self.fabric.name(int(switch)) if end == FABRIC else f"n{self._place(node)}.{end}" for end in ends
        )
        return first, second


def build_cluster(spec: ClusterSpec) -> Cluster:
    """The cluster of a spec: one node is worked out and repeated, then speeds and faults are put in.

    Raises CatalogueError for more than 20 million directed links, before anything is allocated; for a speed or fault
    of what is not there; and for the first two GPUs that the faults cut off from each other.
    """
    wiring = None if spec.is_torus else spec.wire_node()
    whole = _fabric(spec, wiring, None)
    _refuse_too_many(spec, whole.first_link + whole.num_links)
    place_N = places_left(spec)
    fabric = _fabric(spec, wiring, place_N) if len(place_N) < spec.nodes else whole
    links = links_of(spec, Parts.of(spec, place_N, wiring=wiring, fabric=fabric))
    works_K = links.bandwidth_bytes_per_s_K > 0
    fabric = fabric.with_works(works_K[fabric.first_link :])
    ways = ways_of(spec, wiring, works_K[: fabric.first_link], is_whole=bool(works_K.all())) if wiring else None
    if not works_K.all():
        _refuse_cut_off(spec, place_N, _first_pair_cut_off(fabric, wiring, ways))
    return Cluster(
        spec=spec,
        link_kinds=links.names,
        bandwidth_bytes_per_s_K=links.bandwidth_bytes_per_s_K,
        latency_s_K=links.latency_s_K,
        kind_K=links.kind_K,
        wiring=wiring,
        fabric=fabric,
        ways=ways,
        place_N=place_N if len(place_N) < spec.nodes else None,
    )


def _fabric(spec: ClusterSpec, wiring: Wiring | None, place_N: IntArray | None) -> Switches | Torus:
    if wiring is None:
        assert spec.fabric is not None
        assert spec.fabric.shape is not None
        return Torus(shape=spec.fabric.shape)
    first_link = (spec.nodes if place_N is None else len(place_N)) * len(wiring.ends_B)
    if spec.fabric is not None and spec.fabric.kind == "dragonfly":
        return dragonfly_of(spec.fabric, num_nodes=spec.nodes, first_link=first_link, place_N=place_N)
    num_nics = spec.nic.per_node if spec.nic else 0
    return leaves_of(spec.fabric, num_nodes=spec.nodes, num_nics=num_nics, first_link=first_link, place_N=place_N)


def _first_pair_cut_off(fabric: Switches | Torus, wiring: Wiring | None, ways: Ways | None) -> tuple[int, int] | None:
    if isinstance(fabric, Torus):
        stranger = int((fabric.roads.region_V != 0).argmax()) if fabric.roads else 0
        return (stranger, 0) if stranger else None
    assert wiring is not None
    assert ways is not None
    return first_pair_cut_off(fabric, wiring, ways)


def _refuse_cut_off(spec: ClusterSpec, place_N: IntArray, pair: tuple[int, int] | None) -> None:
    if pair is None:
        return
    nodes, gpus = zip(*(divmod(rank, spec.gpus_per_node) for rank in pair), strict=True)
    a, b = (f"n{place_N[node]}.gpu{gpu}" for node, gpu in zip(nodes, gpus, strict=True))
    lose = "" if spec.is_torus or len(place_N) == 1 else f", or lose the whole node: {{node: {place_N[nodes[0]]}}}"
    raise CatalogueError(
        f"topology {spec.name}: faults: no way is left between {a} and {b}; leave some capacity on a link that joins "
        f"them{lose}"
    )


def _refuse_too_many(spec: ClusterSpec, num_links: int) -> None:
    if num_links > MAX_LINKS:
        fitting = max(1, spec.nodes * MAX_LINKS // num_links)
        raise CatalogueError(
            f"topology {spec.name}: nodes: {spec.nodes} nodes have {num_links} directed links, at most {MAX_LINKS} are "
            f"allowed; use {fitting} nodes or fewer"
        )
