"""Ranks that must behave alike become one lane, flows that must get the same rate one class: one colour refinement of
both.

A rank's colour is made of its part in the plan and of the colours of its groups and flows; a flow's of its share, its
ends and its links (all hops of a ring are one flow, since they go at one pace); a link's of its capacity and its
flows. When no colour splits any more, ranks, flows and links of one colour cannot be told apart by any fair sharing
of the links (the partition is equitable), so one of each stands for all of them. Reference: McKay, Piperno,
"Practical graph isomorphism, II" (2014), section 2.2, for refinement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Floats, Flows, Ints, Phase
from moeplan.network.colours import Colours, bits, distinct, mix, numbered, summed, unsigned
from moeplan.network.expand import Pattern


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Meeting:
    """The lanes that do one pattern together, and the flow classes of each of its phases."""

    lanes: tuple[int, ...]
    phases: tuple[Phase, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Folding:
    """Lanes, flow classes, and for each pattern its meetings."""

    lane_R: Ints
    flows: Flows
    meetings: tuple[tuple[Meeting, ...], ...]


def fold(patterns: Sequence[Pattern], *, part_R: Ints, cluster: Cluster) -> Folding:
    """The coarsest exact lanes in which ranks of different `part_R` stay apart. Lanes are numbered by their first
    rank.
    """
    table = _Table.of(patterns, part_R, cluster)
    rank, flow, link = _refine(table)
    lane_R = numbered(rank)
    return _classes(table, patterns, lane_R=lane_R, flow=flow, link=link, cluster=cluster)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Table:
    """All patterns' transfers F one after another, in B flows (bundles of one pace); links that nothing crosses, or
    that never hold a flow up, are left out."""

    part_R: Ints
    source_F: Ints
    target_F: Ints
    flow_F: Ints
    first_B: Ints
    """One transfer of each flow."""
    start_B: Colours
    pattern_B: Ints
    flow_I: Ints
    link_I: Ints
    links_K: Ints
    start_K: Colours
    groups: tuple[Ints, ...]

    @staticmethod
    def of(patterns: Sequence[Pattern], part_R: Ints, cluster: Cluster) -> _Table:
        counts = [int(p.bundle_F.max(initial=-1)) + 1 for p in patterns]
        starts = np.cumsum([0, *counts])
        flow_F = _joined([p.bundle_F + start for p, start in zip(patterns, starts, strict=False)])
        first_B = np.unique(flow_F, return_index=True)[1]
        pattern_B = np.repeat(np.arange(len(patterns)), counts)
        share_B = _joined_floats([p.share_F for p in patterns])[first_B]
        extra_B = _joined_floats([p.extra_bytes_F for p in patterns])[first_B]
        delay_B = np.zeros(len(first_B))
        np.maximum.at(delay_B, flow_F, _joined_floats([p.delay_s_F for p in patterns]))
        phase_B = _joined([p.phase_F for p in patterns])[first_B]
        hop_F, link_I = _hops(patterns, cluster)
        links, link_I = np.unique(link_I, return_inverse=True)
        return _Table(
            part_R=part_R,
            source_F=_joined([p.source_F for p in patterns]),
            target_F=_joined([p.target_F for p in patterns]),
            flow_F=flow_F,
            first_B=first_B,
            start_B=mix(
                bits(share_B)
                + mix(bits(delay_B)) * unsigned(3)
                + mix(bits(extra_B)) * unsigned(5)
                + mix(unsigned(pattern_B * 4096 + phase_B))
            ),
            pattern_B=pattern_B,
            flow_I=flow_F[hop_F],
            link_I=link_I,
            links_K=links,
            start_K=mix(bits(cluster.bandwidth_bytes_per_s_K[links])),
            groups=tuple(p.groups_NG for p in patterns),
        )


def _joined(columns: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *columns])


def _joined_floats(columns: Sequence[Floats]) -> Floats:
    return np.concatenate([np.zeros(0), *columns])


def _hops(patterns: Sequence[Pattern], cluster: Cluster) -> tuple[Ints, Ints]:
    """(transfer, link) for every hop of every transfer over a link that could hold it up."""
    binds_K = cluster.can_bind_K
    transfers, links, base = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for p in patterns:
        row, hop = np.nonzero((p.paths_FH >= 0) & binds_K[p.paths_FH])
        transfers.append(row + base)
        links.append(p.paths_FH[row, hop].astype(np.int64))
        base += len(p.paths_FH)
    return np.concatenate(transfers), np.concatenate(links)


def _refine(table: _Table) -> tuple[Colours, Colours, Colours]:
    """Colours of ranks, flows and links when none splits any more."""
    rank, link = mix(unsigned(table.part_R)), table.start_K
    count = -1
    while True:
        ends = mix(rank[table.source_F]) * unsigned(3) + mix(rank[table.target_F]) * unsigned(5)
        flow = mix(table.start_B + summed(mix(ends), table.flow_F, len(table.start_B)))
        flow = mix(flow + summed(mix(link)[table.link_I], table.flow_I, len(flow)))
        link = mix(table.start_K + summed(mix(flow)[table.flow_I], table.link_I, len(link)))
        rank = _rank_colours(table, rank, flow)
        found = distinct(rank) + distinct(flow) + distinct(link)
        if found == count:
            return rank, flow, link
        count = found


def _rank_colours(table: _Table, rank: Colours, flow: Colours) -> Colours:
    size, of_transfer = len(rank), flow[table.flow_F]
    sent = summed(mix(of_transfer + unsigned(7)), table.source_F, size)
    new = rank + sent + summed(mix(of_transfer + unsigned(11)), table.target_F, size)
    for number, groups_NG in enumerate(table.groups):
        whole = mix(mix(rank)[groups_NG].sum(axis=1) + unsigned(number))
        new += summed(np.repeat(mix(whole), groups_NG.shape[1]), groups_NG.ravel(), size)
    return mix(new)


def _classes(
    table: _Table, patterns: Sequence[Pattern], *, lane_R: Ints, flow: Colours, link: Colours, cluster: Cluster
) -> Folding:
    link_class = numbered(link)
    who_B = _joined([_lane_sets(p, lane_R)[0][p.group_F] for p in patterns])[table.first_B]
    class_B = numbered(mix(flow + mix(unsigned(who_B + (table.pattern_B << 32)))))
    first = np.unique(class_B, return_index=True)[1]
    num_links = np.bincount(link_class)
    crossing = np.zeros((len(first), len(num_links)))
    np.add.at(crossing, (class_B[table.flow_I], link_class[table.link_I]), 1.0)
    first_link = table.links_K[np.unique(link_class, return_index=True)[1]]
    flows = Flows(
        share_C=_joined_floats([p.share_F for p in patterns])[table.first_B[first]],
        extra_bytes_C=_joined_floats([p.extra_bytes_F for p in patterns])[table.first_B[first]],
        count_C=np.bincount(class_B),
        crossing_CK=crossing / num_links,
        capacity_bytes_per_s_K=cluster.bandwidth_bytes_per_s_K[first_link],
        link_kind_K=tuple(cluster.link_kinds[int(kind)] for kind in cluster.kind_K[first_link]),
        num_links_K=num_links,
        lanes_C=_lanes_of_classes(table, lane_R, class_B),
    )
    meetings = tuple(
        _meetings(number, pattern, lane_R=lane_R, table=table, who_B=who_B, class_B=class_B)
        for number, pattern in enumerate(patterns)
    )
    return Folding(lane_R=lane_R, flows=flows, meetings=meetings)


def _lanes_of_classes(table: _Table, lane_R: Ints, class_B: Ints) -> tuple[tuple[int, ...], ...]:
    class_F = class_B[table.flow_F]
    ends = np.unique(np.concatenate([lane_R[table.source_F], lane_R[table.target_F]]) + (np.tile(class_F, 2) << 32))
    owner, lane = ends >> 32, ends & 0xFFFFFFFF
    bounds = np.searchsorted(owner, np.arange(1, int(class_B.max(initial=-1)) + 1))
    return tuple(tuple(part.tolist()) for part in np.split(lane, bounds)) if len(class_B) else ()


def _lane_sets(pattern: Pattern, lane_R: Ints) -> tuple[Ints, Ints]:
    """The number of each group's set of lanes, and one group of each set."""
    sorted_NG = np.sort(lane_R[pattern.groups_NG], axis=1)
    colour = mix(mix(unsigned(sorted_NG)) + unsigned(np.arange(sorted_NG.shape[1]))).sum(axis=1)
    _, first, number = np.unique(colour, return_index=True, return_inverse=True)
    return number, first


def _meetings(
    number: int, pattern: Pattern, *, lane_R: Ints, table: _Table, who_B: Ints, class_B: Ints
) -> tuple[Meeting, ...]:
    mine = np.flatnonzero(table.pattern_B == number)
    who, klass = who_B[mine], class_B[mine]
    phase_B = np.zeros(len(mine), np.int64)
    phase_B[pattern.bundle_F] = pattern.phase_F
    delay_B = np.zeros(len(mine))
    np.maximum.at(delay_B, pattern.bundle_F, pattern.delay_s_F)
    found = []
    for set_number, group in enumerate(_lane_sets(pattern, lane_R)[1]):
        phases = []
        for phase in range(len(pattern.copy_s_per_byte_P)):
            chosen = (who == set_number) & (phase_B == phase)
            classes = tuple(np.unique(klass[chosen]).tolist())
            latency_s, copy = float(delay_B[chosen].max(initial=0.0)), float(pattern.copy_s_per_byte_P[phase])
            host, host_share = (pattern.host, pattern.host_share) if pattern.host and phase == 0 else ((), 0.0)
            phases.append(
                Phase(
                    latency_s=latency_s, classes=classes, copy_s_per_byte=copy, host=host, host_share=host_share
                )
            )  # fmt: skip
        lanes = tuple(np.unique(lane_R[pattern.groups_NG[group]]).tolist())
        found.append(Meeting(lanes=lanes, phases=tuple(phases)))
    return tuple(found)
