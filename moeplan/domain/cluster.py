"""A cluster: GPUs, NICs and switches as directed links with capacities, and the paths that messages take over them.

Axes: K directed link of the cluster, F pair of ranks (a flow), H link of a path (-1 behind the last).
Numbers are SI, and bandwidth is what is usable (bandwidth x efficiency). Rank r is GPU r % gpus_per_node of node
r // gpus_per_node. Links are numbered node by node, node n from n * B on, then the uplinks of the leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeplan.domain.cluster_spec import ClusterSpec, Gpu
from moeplan.domain.fabric import FabricSpec, Leaves, Torus, leaf_paths, leaves_of, same_leaf, torus_paths
from moeplan.domain.wiring import FABRIC, FloatArray, IntArray, LinkSpec, NicSpec, WireSpec, Wiring, read_only
from moeplan.errors import CatalogueError

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Cluster", "ClusterSpec", "FabricSpec", "Gpu", "LinkSpec", "NicSpec", "WireSpec", "build_cluster"]

_Rank = TypeVar("_Rank", int, IntArray)
MAX_LINKS = 20_000_000
"""A cluster with more directed links is refused: its arrays alone would take half a gigabyte."""
TIER_NAMES = ("same GPU", "same node", "same leaf", "across")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Directed links with capacities, and the fixed path of every pair of ranks. Built by `build_cluster`.

    Inside a node: `wiring.wire_node` (fewest relays, then the smallest sum of 1 / bandwidth). Between nodes: over the
    GPU's nearest NIC to its leaf, if need be up to the spine and down, and into the other GPU over its nearest NIC. In
    a torus: in dimension order. One path for each pair: no adaptive routing, no message striped over several NICs, and
    no detour inside a node to the right rail (an all-to-all that wants it sends two messages). Two clusters are equal
    when their specs are.
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
    fabric: Leaves | Torus = field(compare=False, repr=False)

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
        """Nodes: machines, or NVLink domains where a rack is one."""
        return self.spec.nodes

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one node."""
        return self.spec.gpus_per_node

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes: ranks are 0 to num_gpus - 1."""
        return self.spec.nodes * self.spec.gpus_per_node

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
        return TIER_NAMES

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
        return leaf_paths(self.fabric, self.wiring, src_F=src, dst_F=dst)

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
        src, dst = self._ranks(src_F), self._ranks(dst_F)
        by_kind = [
            self.spec.links[kind].message_overhead_s if kind in self.spec.links else 0.0 for kind in self.link_kinds
        ]
        path_FH = self.paths(src, dst)
        inside_F = np.where(path_FH >= 0, np.array(by_kind)[self.kind_K[path_FH]], 0.0).max(axis=1, initial=0.0)
        between = self.node_of(src) != self.node_of(dst)
        return np.where(between, self.message_overhead_s, inside_F)

    def tier(self, src_F: ArrayLike, dst_F: ArrayLike) -> NDArray[np.int8]:
        """How far each pair is apart: 0 same GPU, 1 same node, 2 same leaf, 3 across (in a torus 2 does not occur)."""
        src, dst = self._ranks(src_F), self._ranks(dst_F)
        near_F = np.where(src == dst, np.int8(0), np.int8(1))
        far_F = np.full(len(near_F), 3, dtype=np.int8)
        if isinstance(self.fabric, Leaves) and self.num_nodes > 1:
            assert self.wiring is not None
            far_F[same_leaf(self.fabric, self.wiring, src_F=src, dst_F=dst)] = 2
        return np.where(self.node_of(src) == self.node_of(dst), near_F, far_F)

    def link_ends(self, link: int) -> tuple[str, str]:
        """The names at the two ends of a directed link, such as ("n3.gpu2", "n3.nvswitch")."""
        assert 0 <= link < self.num_links
        if isinstance(self.fabric, Torus):
            rank, port = divmod(link, len(self.fabric.ports))
            return self.gpu_name(rank), self.gpu_name(self.fabric.neighbour(rank, port))
        if link >= self.fabric.first_link:
            leaf, is_down = divmod(link - self.fabric.first_link, 2)
            ends = self.fabric.name(leaf), "spine"
            return (ends[1], ends[0]) if is_down else ends
        return self._node_link_ends(link)

    def link_name(self, link: int) -> str:
        """A directed link in words: `n3.gpu2 -> n3.nvswitch`."""
        return " -> ".join(self.link_ends(link))

    def gpu_name(self, rank: int) -> str:
        """The name of a rank's GPU in `graph` and `link_name`: `n3.gpu2`."""
        return f"n{rank // self.gpus_per_node}.gpu{rank % self.gpus_per_node}"

    @property
    def can_bind_K(self) -> NDArray[np.bool_]:
        """Which links can hold a flow up: not a leaf's pipe that is as wide as all its NICs together, which hold it
        up before.
        """
        binds = np.ones(self.num_links, dtype=bool)
        fabric = self.spec.fabric
        if isinstance(self.fabric, Leaves) and fabric is not None and (fabric.oversubscription or 1.0) <= 1:
            binds[self.num_links - 2 * self.fabric.num_pipes :] = False
        return binds

    def graph(self) -> nx.DiGraph[str]:
        """A directed graph with the attributes `link`, `kind`, `bandwidth_bytes_per_s` and `latency_s` on each edge."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        graph.add_nodes_from(self.gpu_name(rank) for rank in range(self.num_gpus))
        graph.add_edges_from((*self.link_ends(link), attributes) for link, attributes in self._edges())
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

    def _edges(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for link in range(self.num_links):
            yield (
                link,
                {
                    "link": link,
                    "kind": self.link_kinds[self.kind_K[link]],
                    "bandwidth_bytes_per_s": float(self.bandwidth_bytes_per_s_K[link]),
                    "latency_s": float(self.latency_s_K[link]),
                },
            )

    def _ranks(self, rank_F: ArrayLike) -> IntArray:
        ranks = np.atleast_1d(np.asarray(rank_F, dtype=np.int32))
        assert ranks.size == 0 or (ranks.min() >= 0 and ranks.max() < self.num_gpus), "a rank is not in the cluster"
        return ranks

    def _node_link_ends(self, link: int) -> tuple[str, str]:
        assert self.wiring is not None
        assert isinstance(self.fabric, Leaves)
        node, local = divmod(link, len(self.wiring.ends_B))
        ends = self.wiring.ends_B[local]
        nic = int(next((name for name in ends if name.startswith("nic")), "nic0").removeprefix("nic"))
        leaf = self.fabric.of(np.array([node], dtype=np.int32), np.array([nic], dtype=np.int32))[0]
        first, second = (self.fabric.name(int(leaf)) if end == FABRIC else f"n{node}.{end}" for end in ends)
        return first, second


def build_cluster(spec: ClusterSpec) -> Cluster:
    """The cluster of a spec: one node is worked out and repeated.

    Raises CatalogueError for more than 20 million directed links, before anything is allocated.
    """
    return _build_torus(spec) if spec.is_torus else _build_leaves(spec)


def _build_leaves(spec: ClusterSpec) -> Cluster:
    wiring = spec.wire_node()
    num_nics = spec.nic.per_node if spec.nic else 0
    first_link = spec.nodes * len(wiring.ends_B)
    leaves = leaves_of(spec.fabric, num_nodes=spec.nodes, num_nics=num_nics, first_link=first_link)
    num_pipes = leaves.num_pipes
    _refuse_too_many(spec, first_link + 2 * num_pipes)
    kinds = tuple(dict.fromkeys(wiring.kind_B)) + (("leaf",) if num_pipes else ())
    kind_B = np.array([kinds.index(kind) for kind in wiring.kind_B], dtype=np.int8)
    hop_s = spec.fabric.latency_s if spec.fabric else 0.0
    return Cluster(
        spec=spec,
        link_kinds=kinds,
        bandwidth_bytes_per_s_K=_joined(
            np.tile(wiring.bandwidth_bytes_per_s_B, spec.nodes), _pipe_bytes_per_s(spec, leaves)
        ),
        latency_s_K=_joined(np.tile(wiring.latency_s_B, spec.nodes), np.full(2 * num_pipes, hop_s)),
        kind_K=_joined(np.tile(kind_B, spec.nodes), np.full(2 * num_pipes, len(kinds) - 1, dtype=np.int8)),
        wiring=wiring,
        fabric=leaves,
    )


def _pipe_bytes_per_s(spec: ClusterSpec, leaves: Leaves) -> FloatArray:
    """Up and down pipe of each leaf: the sum of its NICs divided by the oversubscription."""
    if not leaves.num_pipes:
        return np.empty(0)
    assert spec.nic is not None
    assert spec.fabric is not None
    per_leaf = leaves.nics_under() * (spec.nic.usable_bytes_per_s / (spec.fabric.oversubscription or 1.0))
    return np.repeat(per_leaf, 2)


def _build_torus(spec: ClusterSpec) -> Cluster:
    assert spec.fabric is not None
    assert spec.fabric.shape is not None
    assert spec.fabric.link is not None
    torus, link = Torus(shape=spec.fabric.shape), spec.links[spec.fabric.link]
    num_links = math.prod(torus.shape) * len(torus.ports)
    _refuse_too_many(spec, num_links)
    return Cluster(
        spec=spec,
        link_kinds=(spec.fabric.link,),
        bandwidth_bytes_per_s_K=read_only(np.full(num_links, link.usable_bytes_per_s)),
        latency_s_K=read_only(np.full(num_links, link.latency_s)),
        kind_K=read_only(np.zeros(num_links, dtype=np.int8)),
        wiring=None,
        fabric=torus,
    )


_Item = TypeVar("_Item", bound=np.generic)


def _joined(nodes: NDArray[_Item], leaves: NDArray[_Item]) -> NDArray[_Item]:
    return read_only(np.concatenate([nodes, leaves]))


def _refuse_too_many(spec: ClusterSpec, num_links: int) -> None:
    if num_links > MAX_LINKS:
        fitting = max(1, spec.nodes * MAX_LINKS // num_links)
        raise CatalogueError(
            f"topology {spec.name}: nodes: {spec.nodes} nodes have {num_links} directed links, at most {MAX_LINKS} are "
            f"allowed; use {fitting} nodes or fewer"
        )
