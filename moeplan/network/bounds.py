"""What no algorithm and no schedule can beat: bytes that have to cross a cut, over all that the cut can carry.

Cuts looked at: around each GPU, each node and each pod, and halves of a fabric or torus, in both directions. What goes
to several members counts once where one copy would do.
Axes: G member of the group, A sets of ranks, K directed link of the cluster, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.fabric import Leaves
from moeplan.domain.lattice import Torus
from moeplan.domain.program import Exchange, Floats, Ints
from moeplan.domain.wiring import FABRIC


@dataclass(frozen=True, kw_only=True, slots=True)
class CutBound:
    """The least seconds, and the cut that says so."""

    seconds: float
    cut: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cuts:
    """Sets of ranks that share nothing, and what their links out and in can carry. `set_R` is -1 outside all sets."""

    what: str
    set_R: Ints
    out_bytes_per_s_A: Floats
    in_bytes_per_s_A: Floats


def cut_bound(exchange: Exchange, cluster: Cluster) -> CutBound:
    """The worst cut of an exchange: an all-to-all in full, of the others what every member must get or give at least.

    Several groups cross the same cut together.
    """
    best = CutBound(seconds=0.0, cut="nothing has to move")
    for cuts in cuts_of(cluster):
        out_A, in_A = _crossing(exchange, cluster, cuts)
        for way, bytes_A, capacity_A in (
            ("out of", out_A, cuts.out_bytes_per_s_A),
            ("into", in_A, cuts.in_bytes_per_s_A),
        ):
            seconds_A = np.divide(
                bytes_A, capacity_A, out=np.zeros_like(bytes_A), where=(capacity_A > 0) & (bytes_A > 0)
            )
            worst = int(seconds_A.argmax())
            if seconds_A[worst] > best.seconds:
                best = CutBound(seconds=float(seconds_A[worst]), cut=f"{way} {cuts.what} {worst}")
    return best


def cuts_of(cluster: Cluster) -> Iterator[Cuts]:
    """Around GPUs, nodes, pods, and halves."""
    rank_R = np.arange(cluster.num_gpus)
    bandwidth_K = cluster.bandwidth_bytes_per_s_K
    if isinstance(cluster.fabric, Torus):
        per_gpu = bandwidth_K.reshape(cluster.num_gpus, -1)
        # Every wire has two directions of one width, so as much can come in as go out.
        yield Cuts(
            what="GPU", set_R=rank_R, out_bytes_per_s_A=per_gpu.sum(axis=1), in_bytes_per_s_A=per_gpu.sum(axis=1)
        )
        yield from _torus_halves(cluster, cluster.fabric)
        return
    assert cluster.wiring is not None
    ends_B = cluster.wiring.ends_B
    inside_NB = bandwidth_K[: cluster.num_nodes * len(ends_B)].reshape(cluster.num_nodes, -1)
    for what, out_B, in_B, set_R in _local_cuts(cluster, ends_B):
        out_A, in_A = (inside_NB @ table for table in (out_B, in_B))
        yield Cuts(what=what, set_R=set_R, out_bytes_per_s_A=out_A.ravel(), in_bytes_per_s_A=in_A.ravel())
    if isinstance(cluster.fabric, Leaves) and cluster.fabric.num_links:
        yield from _pods(cluster, cluster.fabric)


def _local_cuts(cluster: Cluster, ends_B: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, Floats, Floats, Ints]]:
    """Which links of a node lead out of each GPU, and into it; and out of the node."""
    rank_R = np.arange(cluster.num_gpus)
    names = [f"gpu{gpu}" for gpu in range(cluster.gpus_per_node)]
    out_BG = np.array([[start == name for name in names] for start, _ in ends_B], np.float64).reshape(-1, len(names))
    in_BG = np.array([[end == name for name in names] for _, end in ends_B], np.float64).reshape(-1, len(names))
    yield "GPU", out_BG, in_BG, rank_R
    if cluster.num_nodes > 1:
        out_B1 = np.array([[end == FABRIC] for _, end in ends_B], np.float64)
        in_B1 = np.array([[start == FABRIC] for start, _ in ends_B], np.float64)
        yield "node", out_B1, in_B1, rank_R // cluster.gpus_per_node


def _pods(cluster: Cluster, fabric: Leaves) -> Iterator[Cuts]:
    """Around the pods, and between the first half of them and the others."""
    links = cluster.bandwidth_bytes_per_s_K[fabric.first_link :].reshape(-1, fabric.num_ways, 2).sum(axis=1)
    pod_L = np.arange(len(links)) // (fabric.num_nics if fabric.by_rail else 1)
    pods = int(pod_L.max()) + 1
    out_A, in_A = (np.bincount(pod_L, weights=links[:, way], minlength=pods).astype(np.float64) for way in (0, 1))
    pod_R = np.repeat(fabric.units_N(cluster.num_nodes)[0], cluster.gpus_per_node).astype(np.int64)
    if pods == 1:
        return
    yield Cuts(what="pod", set_R=pod_R, out_bytes_per_s_A=out_A, in_bytes_per_s_A=in_A)
    half = pods // 2
    first = np.where(pod_R < half, 0, -1)
    yield Cuts(
        what="the first half of the pods: half", set_R=first, out_bytes_per_s_A=out_A[:half].sum(keepdims=True),
        in_bytes_per_s_A=in_A[:half].sum(keepdims=True),
    )  # fmt: skip


def _torus_halves(cluster: Cluster, torus: Torus) -> Iterator[Cuts]:
    """Cut across each axis into two halves."""
    rank_R = np.arange(cluster.num_gpus)
    table = cluster.bandwidth_bytes_per_s_K.reshape(cluster.num_gpus, -1)
    for axis, (size, stride) in enumerate(zip(torus.shape, torus.strides, strict=True)):
        if size < 2:
            continue
        place_R = rank_R // stride % size
        capacity = 0.0
        for port, (along, sign) in enumerate(torus.ports):
            crosses_R = ((place_R + sign) % size < size // 2) != (place_R < size // 2)
            if along == axis:
                capacity += float(table[crosses_R & (place_R < size // 2), port].sum())
        half = np.array([capacity])
        yield Cuts(
            what=f"the lower half of axis {axis}: half", set_R=np.where(place_R < size // 2, 0, -1),
            out_bytes_per_s_A=half, in_bytes_per_s_A=half,
        )  # fmt: skip


def _crossing(exchange: Exchange, cluster: Cluster, cuts: Cuts) -> tuple[Floats, Floats]:
    """Bytes that all groups of an exchange have to send out of each set, and into it."""
    sets = len(cuts.out_bytes_per_s_A)
    out_A, in_A = np.zeros(sets), np.zeros(sets)
    for members in exchange.groups_NG:
        set_G = cuts.set_R[members]
        if exchange.operation == "all_to_all":
            _add_all_to_all(out_A, in_A, exchange, cluster, members, set_G)
        elif exchange.operation != "send":
            _add_collective(out_A, in_A, exchange, set_G)
    return out_A, in_A


def _add_all_to_all(
    out_A: Floats, in_A: Floats, exchange: Exchange, cluster: Cluster, members: Ints, set_G: Ints
) -> None:
    reach_GB = exchange.reach_GB
    labels, index_G = np.unique(set_G, return_inverse=True)
    out_S, in_S = (bytes_S * exchange.size_bytes for bytes_S in _leaving(exchange.share_GG, index_G, len(labels)))
    if reach_GB is not None and len(labels) < len(members):
        node_B = np.unique(members // cluster.gpus_per_node)
        out_S, in_S = _counted_once(reach_GB * exchange.size_bytes, members // cluster.gpus_per_node, node_B, index_G)
    elif reach_GB is not None:  # around GPUs: a copy has to come to each, but need leave its origin only once
        out_S = out_S * 0.0
    kept = labels >= 0
    np.add.at(out_A, labels[kept], out_S[kept])
    np.add.at(in_A, labels[kept], in_S[kept])


def _leaving(share_GG: Floats | None, index_G: Ints, sets: int) -> tuple[Floats, Floats]:
    """Shares that go out of each set of members, and that come in; equal ones where there is no matrix."""
    if share_GG is None:
        inside_S = np.bincount(index_G, minlength=sets).astype(np.float64)
        even_S = inside_S * (1.0 - inside_S / len(index_G))
        return even_S, even_S.copy()
    kept_S = np.array([share_GG[np.ix_(members, members)].sum() for members in _members(index_G, sets)])
    out_S = np.bincount(index_G, weights=share_GG.sum(axis=1), minlength=sets) - kept_S
    in_S = np.bincount(index_G, weights=share_GG.sum(axis=0), minlength=sets) - kept_S
    return np.maximum(out_S, 0.0), np.maximum(in_S, 0.0)


def _members(index_G: Ints, sets: int) -> list[Ints]:
    order = np.argsort(index_G, kind="stable")
    return np.split(order, np.searchsorted(index_G[order], np.arange(1, sets)))


def _counted_once(reach_GB: Floats, node_G: Ints, node_B: Ints, index_G: Ints) -> tuple[Floats, Floats]:
    """Sets of whole nodes: of a member's parcels, those for the node of a set that most of them are for."""
    sets = int(index_G.max()) + 1
    set_of_node = np.array([index_G[node_G == node][0] for node in node_B])
    out_S, in_S = np.zeros(sets), np.zeros(sets)
    for member, own in enumerate(index_G):
        for other in range(sets):
            if other != own:
                in_S[other] += reach_GB[member, set_of_node == other].max(initial=0.0)
        out_S[own] += reach_GB[member, set_of_node != own].max(initial=0.0)
    return out_S, in_S


def _add_collective(out_A: Floats, in_A: Floats, exchange: Exchange, set_G: Ints) -> None:
    """A gather brings to each set what is outside, a reduction takes a sum of it out; both for an all-reduce."""
    size, gathers = len(set_G), exchange.operation in ("all_gather", "all_reduce", "broadcast")
    for label in np.unique(set_G[set_G >= 0]):
        inside = float((set_G == label).sum())
        if inside == size:
            continue
        others = (size - inside) / size * exchange.size_bytes
        if exchange.operation == "broadcast":
            others = 0.0 if set_G[0] == label else exchange.size_bytes
        in_A[label] += others if gathers else inside / size * exchange.size_bytes
        out_A[label] += (inside / size * exchange.size_bytes if exchange.operation == "all_gather" else others) * (
            exchange.operation != "broadcast"
        )
