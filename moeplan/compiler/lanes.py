"""Ranks that must behave alike become one lane, flows that must get the same rate one class: one colour refinement of both.

A rank's colour is made of its part in the plan and of the colours of its groups and flows; a flow's of its share, its ends and
its links; a link's of its capacity and its flows. When no colour splits any more, ranks, flows and links of one
colour cannot be told apart by any fair sharing of the links (the partition is equitable), so one of each stands for all of them.
Colours are 64-bit hashes: two different colours are taken for one with a chance below 1e-9 for a million flows.
Reference: McKay, Piperno, "Practical graph isomorphism, II" (2014), section 2.2, for refinement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.compiler.traffic import Pattern
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Flows, Ints, Phase

Colours = NDArray[np.uint64]


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
    """The coarsest exact lanes in which ranks of different `part_R` stay apart. Lanes are numbered by their first rank."""
    table = _Table.of(patterns, part_R, cluster)
    rank, flow, link = _refine(table)
    lane_R = _numbered(rank)
    return _classes(table, patterns, lane_R=lane_R, flow=flow, link=link, cluster=cluster)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Table:
    """All patterns' transfers one after another; links that nothing crosses are left out."""

    part_R: Ints
    source_F: Ints
    target_F: Ints
    start_F: Colours
    pattern_F: Ints
    flow_I: Ints
    link_I: Ints
    links_K: Ints
    start_K: Colours
    groups: tuple[Ints, ...]

    @staticmethod
    def of(patterns: Sequence[Pattern], part_R: Ints, cluster: Cluster) -> _Table:
        pattern = np.repeat(np.arange(len(patterns)), [len(p.source_F) for p in patterns])
        share = np.concatenate([p.share_F for p in patterns]) if patterns else np.zeros(0)
        phase = np.concatenate([p.phase_F for p in patterns]) if patterns else np.zeros(0, np.int64)
        delay = np.concatenate([p.delay_s_F for p in patterns]) if patterns else np.zeros(0)
        flow_I, link_I = _incidences(patterns)
        links, link_I = np.unique(link_I, return_inverse=True)
        capacity = cluster.bandwidth_bytes_per_s_K[links]
        return _Table(
            part_R=part_R,
            source_F=np.concatenate([p.source_F for p in patterns]) if patterns else phase,
            target_F=np.concatenate([p.target_F for p in patterns]) if patterns else phase,
            start_F=_mix(_bits(share) + _mix(_bits(delay)) * _u(3) + _mix(_u(pattern * 16 + phase))),
            pattern_F=pattern,
            flow_I=flow_I,
            link_I=link_I,
            links_K=links,
            start_K=_mix(_bits(capacity)),
            groups=tuple(p.groups_NG for p in patterns),
        )


def _incidences(patterns: Sequence[Pattern]) -> tuple[Ints, Ints]:
    """(flow, link) for every hop of every flow."""
    flows, links, base = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for p in patterns:
        row, hop = np.nonzero(p.paths_FH >= 0)
        flows.append(row + base)
        links.append(p.paths_FH[row, hop].astype(np.int64))
        base += len(p.paths_FH)
    return np.concatenate(flows), np.concatenate(links)


def _refine(table: _Table) -> tuple[Colours, Colours, Colours]:
    """Colours of ranks, flows and links when none splits any more."""
    rank, link = _mix(_u(table.part_R)), table.start_K
    flow = table.start_F
    count = -1
    while True:
        flow = _mix(table.start_F + _mix(rank[table.source_F]) * _u(3) + _mix(rank[table.target_F]) * _u(5))
        flow = _mix(flow + _summed(_mix(link[table.link_I]), table.flow_I, len(flow)))
        link = _mix(table.start_K + _summed(_mix(flow)[table.flow_I], table.link_I, len(link)))
        rank = _rank_colours(table, rank, flow)
        found = _distinct(rank) + _distinct(flow) + _distinct(link)
        if found == count:
            return rank, flow, link
        count = found


def _rank_colours(table: _Table, rank: Colours, flow: Colours) -> Colours:
    size = len(rank)
    new = rank + _summed(_mix(flow + _u(7)), table.source_F, size) + _summed(_mix(flow + _u(11)), table.target_F, size)
    for number, groups_NG in enumerate(table.groups):
        whole = _mix(_mix(rank)[groups_NG].sum(axis=1) + _u(number))
        new += _summed(np.repeat(_mix(whole), groups_NG.shape[1]), groups_NG.ravel(), size)
    return _mix(new)


def _classes(
    table: _Table, patterns: Sequence[Pattern], *, lane_R: Ints, flow: Colours, link: Colours, cluster: Cluster
) -> Folding:
    link_class = _numbered(link)
    who_F, key_F = _groups_of_flows(table, patterns, lane_R)
    class_F = _numbered(_mix(flow + _mix(key_F)))
    first = np.unique(class_F, return_index=True)[1]
    num_links = np.bincount(link_class)
    crossing = np.zeros((len(first), len(num_links)))
    np.add.at(crossing, (class_F[table.flow_I], link_class[table.link_I]), 1.0)
    first_link = table.links_K[np.unique(link_class, return_index=True)[1]]
    shares = np.concatenate([p.share_F for p in patterns]) if patterns else np.zeros(0)
    flows = Flows(
        share_C=shares[first],
        count_C=np.bincount(class_F),
        crossing_CK=crossing / num_links,
        capacity_bytes_per_s_K=cluster.bandwidth_bytes_per_s_K[first_link],
        link_kind_K=tuple(cluster.link_kinds[int(kind)] for kind in cluster.kind_K[first_link]),
        num_links_K=num_links,
        sender_lane_C=lane_R[table.source_F[first]],
        receiver_lane_C=lane_R[table.target_F[first]],
    )
    meetings = tuple(
        _meetings(number, pattern, lane_R=lane_R, table=table, who_F=who_F, class_F=class_F)
        for number, pattern in enumerate(patterns)
    )
    return Folding(lane_R=lane_R, flows=flows, meetings=meetings)


def _groups_of_flows(table: _Table, patterns: Sequence[Pattern], lane_R: Ints) -> tuple[Ints, Colours]:
    """For each flow the set of lanes that its group is made of: a number within its pattern, and as a colour."""
    numbers = [_lane_sets(p, lane_R)[0][p.group_F] for p in patterns]
    who = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
    return who, _u(who + (table.pattern_F << 32))


def _lane_sets(pattern: Pattern, lane_R: Ints) -> tuple[Ints, Ints]:
    """The number of each group's set of lanes, and one group of each set."""
    sorted_NG = np.sort(lane_R[pattern.groups_NG], axis=1)
    colour = _mix(_mix(_u(sorted_NG)) + _u(np.arange(sorted_NG.shape[1]))).sum(axis=1)
    _, first, number = np.unique(colour, return_index=True, return_inverse=True)
    return number, first


def _meetings(
    number: int, pattern: Pattern, *, lane_R: Ints, table: _Table, who_F: Ints, class_F: Ints
) -> tuple[Meeting, ...]:
    mine = np.flatnonzero(table.pattern_F == number)
    who, klass = who_F[mine], class_F[mine]
    found = []
    for set_number, group in enumerate(_lane_sets(pattern, lane_R)[1]):
        chosen = who == set_number
        phases = tuple(
            _phase(pattern, klass, chosen & (pattern.phase_F == phase)) for phase in range(pattern.phase_F.max() + 1)
        )
        lanes = tuple(np.unique(lane_R[pattern.groups_NG[group]]).tolist())
        found.append(Meeting(lanes=lanes, phases=phases))
    return tuple(found)


def _phase(pattern: Pattern, class_F: Ints, chosen_F: NDArray[np.bool_]) -> Phase:
    latency = float(pattern.delay_s_F[chosen_F].max(initial=0.0))
    return Phase(latency_s=latency, classes=tuple(np.unique(class_F[chosen_F]).tolist()))


def _numbered(colour: Colours) -> Ints:
    """Classes 0, 1, ... in the order of their first member."""
    _, first, inverse = np.unique(colour, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first, kind="stable")] = np.arange(len(first))
    return order[inverse]


def _distinct(colour: Colours) -> int:
    return len(np.unique(colour))


def _summed(values: Colours, index: Ints, size: int) -> Colours:
    total = np.zeros(size, np.uint64)
    np.add.at(total, index, values)
    return total


def _u(values: Ints | int) -> Colours:
    return np.asarray(values).astype(np.uint64)


def _bits(values: NDArray[np.float64]) -> Colours:
    """Floats as integers; the last 12 bits are dropped, so that rounding does not split what is equal."""
    return (np.ascontiguousarray(values).view(np.uint64) + _u(1 << 11)) >> _u(12)


def _mix(values: Colours) -> Colours:
    """Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (2014): the finaliser of splitmix64."""
    z = values + _u(0x9E3779B97F4A7C15)
    z = (z ^ (z >> _u(30))) * _u(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _u(27))) * _u(0x94D049BB133111EB)
    return z ^ (z >> _u(31))
