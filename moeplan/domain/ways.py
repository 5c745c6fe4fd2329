"""The paths between GPUs whose nodes hang on leaves or routers, worked out for many pairs at once.

Axes: F pair of ranks, H link of a path (-1 behind the last), V kind of node by what works in it, N node, G GPU, K NIC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moeplan.domain.cluster_spec import ClusterSpec
from moeplan.domain.fabric import BoolArray, Leaves
from moeplan.domain.lattice import Dragonfly, left_justified, trimmed
from moeplan.domain.wiring import IntArray, Wiring, node_ways, read_only

Switches = Leaves | Dragonfly
_MOST_COMBINATIONS = 500_000
_MOST_PERIODS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """The paths inside each kind of node and over each of its NICs, where nodes differ or a message may change NIC."""

    kind_N: IntArray
    local_VGGH: IntArray
    up_VGKH: IntArray
    down_VGKH: IntArray
    num_links_VGK: IntArray
    """Links from a GPU over a NIC to the fabric; 0 where there is no way."""
    nic_VG: IntArray
    is_aligned: bool
    """Whether a message leaves on the receiver's rail."""


class Ends(NamedTuple):
    """Where one end of each pair is."""

    node_F: IntArray
    gpu_F: IntArray


def ways_of(spec: ClusterSpec, wiring: Wiring, works_K: BoolArray, *, is_whole: bool) -> Ways | None:
    """The tables of each kind of node, by which of the nodes' links work; None where the one of all nodes will do.

    `is_whole`: everything works, outside the nodes as well.
    """
    works_NW = works_K.reshape(-1, max(1, len(wiring.ends_B)))[:, ::2]
    is_aligned = spec.fabric is not None and spec.fabric.policy == "rail_aligned" and len(works_NW) > 1
    if is_whole and not is_aligned:
        return None
    dead_VW, kind_N = _kinds(works_NW)
    kinds = [
        node_ways(
            spec.wiring,
            spec.node_links,
            num_gpus=spec.gpus_per_node,
            num_nics=spec.nic.per_node if spec.nic else 0,
            dead=frozenset(np.flatnonzero(dead_W).tolist()),
            is_aligned=is_aligned,
        )
        for dead_W in dead_VW
    ]
    up_VGKH = _stacked([kind.up_GKH for kind in kinds])
    return Ways(
        kind_N=read_only(kind_N),
        local_VGGH=_stacked([kind.local_GGH for kind in kinds]),
        up_VGKH=up_VGKH,
        down_VGKH=_stacked([kind.down_GKH for kind in kinds]),
        num_links_VGK=read_only((up_VGKH >= 0).sum(axis=-1, dtype=np.int32)),
        nic_VG=read_only(np.stack([kind.nic_G for kind in kinds])),
        is_aligned=is_aligned,
    )


def _kinds(works_NW: BoolArray) -> tuple[BoolArray, IntArray]:
    """What does not work in each kind of node, the first one whole, and the kind of each node."""
    kind_N = np.zeros(len(works_NW), dtype=np.int32)
    hurt = np.flatnonzero(~works_NW.all(axis=1))
    dead_VW, kind_N[hurt] = np.unique(~works_NW[hurt], axis=0, return_inverse=True)
    kind_N[hurt] += 1
    return np.concatenate([np.zeros((1, works_NW.shape[1]), dtype=bool), dead_VW]), kind_N


def _stacked(tables: Sequence[IntArray]) -> IntArray:
    width = max(table.shape[-1] for table in tables)
    padded = [np.pad(t, [(0, 0), (0, 0), (0, width - t.shape[-1])], constant_values=-1) for t in tables]
    return read_only(np.stack(padded))


def ends_of(wiring: Wiring, rank_F: IntArray) -> Ends:
    """The node of each rank, and which of its GPUs it is."""
    return Ends(*np.divmod(rank_F, np.int32(len(wiring.local_GGH))))


def switched_paths(
    switches: Switches, wiring: Wiring, ways: Ways | None, *, src_F: IntArray, dst_F: IntArray
) -> IntArray:
    """(F, H) directed links from `src_F` to `dst_F`; H is the length of the longest of these paths."""
    a, b = ends_of(wiring, src_F), ends_of(wiring, dst_F)
    is_inside, local_FH = _local(wiring, ways, a, b)
    within = _moved(wiring, local_FH, a.node_F[is_inside])
    if is_inside.all():
        return trimmed(within)
    away = ~is_inside
    a, b = Ends(a.node_F[away], a.gpu_F[away]), Ends(b.node_F[away], b.gpu_F[away])
    nic_a, nic_b = chosen_nics(switches, wiring, ways, a, b)
    up_FH, down_FH = (
        (wiring.up_GH[a.gpu_F], wiring.down_GH[b.gpu_F])
        if ways is None
        else (
            ways.up_VGKH[ways.kind_N[a.node_F], a.gpu_F, nic_a],
            ways.down_VGKH[ways.kind_N[b.node_F], b.gpu_F, nic_b],
        )
    )
    switch_a, switch_b = switches.of(a.node_F, nic_a), switches.of(b.node_F, nic_b)
    between = switches.between(switch_a, switch_b, src_F=src_F[away], dst_F=dst_F[away])
    parts = [_moved(wiring, up_FH, a.node_F), between, _moved(wiring, down_FH, b.node_F)]
    return _interleaved(is_inside, within, left_justified(np.concatenate(parts, axis=1)))


def _local(wiring: Wiring, ways: Ways | None, a: Ends, b: Ends) -> tuple[BoolArray, IntArray]:
    """Which pairs stay inside their node, and the links of those, as numbered in the node."""
    is_inside = a.node_F == b.node_F
    if ways is None:
        return is_inside, wiring.local_GGH[a.gpu_F[is_inside], b.gpu_F[is_inside]]
    rows = np.flatnonzero(is_inside)
    local_FH = ways.local_VGGH[ways.kind_N[a.node_F[rows]], a.gpu_F[rows], b.gpu_F[rows]]
    has_way = (a.gpu_F[rows] == b.gpu_F[rows]) | (local_FH >= 0).any(axis=1)
    is_inside[rows] = has_way
    return is_inside, local_FH[has_way]


def _interleaved(is_inside: BoolArray, within: IntArray, around: IntArray) -> IntArray:
    path_FH = np.full((len(is_inside), max(around.shape[1], within.shape[1])), -1, dtype=np.int32)
    path_FH[~is_inside, : around.shape[1]] = around
    path_FH[is_inside, : within.shape[1]] = within
    return trimmed(path_FH)


def _moved(wiring: Wiring, link_FH: IntArray, node_F: IntArray) -> IntArray:
    """Links as numbered in a node to those of the cluster."""
    base_F = node_F * np.int32(len(wiring.ends_B))
    return np.where(link_FH < 0, np.int32(-1), link_FH + base_F[:, None])


def chosen_nics(switches: Switches, wiring: Wiring, ways: Ways | None, a: Ends, b: Ends) -> tuple[IntArray, IntArray]:
    """The NICs over which a message leaves one node and enters the other.

    Those of the policy; where they do not work or no way joins them, those with the shortest way, and of equals the
    next ones after the GPUs' own, so that GPUs share what is left evenly.
    """
    if ways is None:
        return wiring.nic_G[a.gpu_F], wiring.nic_G[b.gpu_F]
    at_a, at_b = (ways.kind_N[a.node_F], a.gpu_F), (ways.kind_N[b.node_F], b.gpu_F)
    nic_b = ways.nic_VG[at_b]
    nic_a = nic_b.copy() if ways.is_aligned else ways.nic_VG[at_a]
    works = (ways.num_links_VGK[(*at_a, nic_a)] > 0) & (ways.num_links_VGK[(*at_b, nic_b)] > 0)
    works &= switches.are_joined(switches.of(a.node_F, nic_a), switches.of(b.node_F, nic_b))
    rows = np.flatnonzero(~works)
    step = max(1, _MOST_COMBINATIONS // ways.num_links_VGK.shape[2] ** 2)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        ends = Ends(a.node_F[part], a.gpu_F[part]), Ends(b.node_F[part], b.gpu_F[part])
        nic_a[part], nic_b[part] = _shortest_nics(switches, ways, *ends)
    return nic_a, nic_b


def _shortest_nics(switches: Switches, ways: Ways, a: Ends, b: Ends) -> tuple[IntArray, IntArray]:
    at_a, at_b = (ways.kind_N[a.node_F], a.gpu_F), (ways.kind_N[b.node_F], b.gpu_F)
    size = ways.num_links_VGK.shape[2]
    nic_K = np.arange(size, dtype=np.int32)
    up_FK, down_FK = ways.num_links_VGK[at_a], ways.num_links_VGK[at_b]
    switch_FK1 = switches.of(a.node_F[:, None], nic_K)[:, :, None]
    switch_F1K = switches.of(b.node_F[:, None], nic_K)[:, None, :]
    works_FKK = (up_FK > 0)[:, :, None] & (down_FK > 0)[:, None, :] & switches.are_joined(switch_FK1, switch_F1K)
    hops_FKK = up_FK[:, :, None] + down_FK[:, None, :] + 2 * (switch_FK1 != switch_F1K)
    after_FK = (nic_K - ways.nic_VG[at_a][:, None]) % size
    before_FK = (nic_K - ways.nic_VG[at_b][:, None]) % size
    cost_FKK = (hops_FKK * size + after_FK[:, :, None]) * size + before_FK[:, None, :]
    best_F = np.where(works_FKK, cost_FKK, np.iinfo(cost_FKK.dtype).max).reshape(len(a.node_F), -1).argmin(axis=1)
    nic_a, nic_b = np.divmod(best_F.astype(np.int32), np.int32(size))
    return nic_a, nic_b


def periods(switches: Switches, num_nodes: int) -> Iterator[tuple[int, int]]:
    """Numbers of nodes, and of pods or groups, after which the places of the nodes in the fabric repeat."""
    unit_N, slot_N = switches.units_N(num_nodes)
    units = range(_MOST_PERIODS + 1)
    starts = range(units.stop) if unit_N[0] == unit_N[-1] else np.searchsorted(unit_N, unit_N[0] + np.array(units))
    for nodes in (int(start) for start in starts if 0 < start < num_nodes):
        ahead_N = unit_N[nodes:] - unit_N[:-nodes]
        if (ahead_N == ahead_N[0]).all() and np.array_equal(slot_N[nodes:], slot_N[:-nodes]):
            yield nodes, int(ahead_N[0])


def first_pair_cut_off(switches: Switches, wiring: Wiring, ways: Ways) -> tuple[int, int] | None:
    """A rank that is cut off, and the first from which it is: neither wires of their node nor NICs join the two.

    GPUs that reach each other inside their node count as one. Over the fabric two are joined if they share a meeting
    point, so all are if all share one; those without the most common one are looked at one by one. None if all are
    joined.
    """
    num_gpus = len(wiring.local_GGH)
    first_VG = ((ways.local_VGGH >= 0).any(axis=-1) | np.eye(num_gpus, dtype=bool)).argmax(axis=2)
    node_R, gpu_R = np.nonzero((first_VG == np.arange(num_gpus))[ways.kind_N])
    if len(node_R) == 1:
        return None
    works_RK = ways.num_links_VGK[ways.kind_N[node_R], gpu_R] > 0
    nic_K = np.arange(works_RK.shape[1], dtype=np.int32)
    switch_RK = np.broadcast_to(switches.of(node_R[:, None].astype(np.int32), nic_K), works_RK.shape)
    point_RP = np.where(works_RK[:, :, None], switches.meeting_points(switch_RK), -1).reshape(len(node_R), -1)
    common = _most_common(point_RP)
    for row in np.flatnonzero(~(point_RP == common).any(axis=1) | (common < 0)):
        mine = point_RP[row][point_RP[row] >= 0]
        strangers = np.flatnonzero(~np.isin(point_RP, mine).any(axis=1))
        strangers = strangers[strangers != row]
        if len(strangers):
            a, b = (int(node_R[each]) * num_gpus + int(gpu_R[each]) for each in (row, strangers[0]))
            return a, b
    return None


def _most_common(point_RP: IntArray) -> int:
    """The point that most rows share, -1 if there is none."""
    ordered = np.sort(point_RP, axis=1)
    is_first = np.ones(ordered.shape, dtype=bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    points = ordered[is_first & (ordered >= 0)]
    return int(np.bincount(points).argmax()) if len(points) else -1
