"""How long exchanges take whatever else is on the wires: each phase's latency, copies, and its busiest link.

Axes: F transfers, R ranks, G members of a group, B nodes of a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Floats
from moeplan.network.expand import Pattern

Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Seconds of an exchange of x bytes, no matter what else is on the wires: at least latency_s + x * per_byte_s."""

    latency_s: float = 0.0
    per_byte_s: float = 0.0
    flow_s_per_byte: float = 0.0
    """The part of `per_byte_s` in which bytes are on the wires; copies in local memory are the rest."""


def least_of(wires: Iterable[Wire]) -> Wire:
    """The least latency, the least seconds per byte, and the least of them on the wires."""
    found = list(wires)
    return Wire(
        latency_s=min(w.latency_s for w in found), per_byte_s=min(w.per_byte_s for w in found),
        flow_s_per_byte=min(w.flow_s_per_byte for w in found),
    )  # fmt: skip


def busiest(pattern: Pattern, cluster: Cluster, chosen_F: Flags | None = None, *, phases: int | None = None) -> Wire:
    """Over the first phases, or all: their latency and the busiest link of the chosen transfers, or of all."""
    chosen_F = np.ones(len(pattern.source_F), bool) if chosen_F is None else chosen_F
    latency, copy, flow, extra_F = 0.0, 0.0, 0.0, _extra_bytes(pattern)
    for phase in range(len(pattern.copy_s_per_byte_P) if phases is None else phases):
        now_F = pattern.phase_F == phase
        latency += float(pattern.delay_s_F[now_F].max(initial=0.0))
        copy += float(pattern.copy_s_per_byte_P[phase])
        extra_s, byte_s = _busiest_link(pattern, cluster, now_F & chosen_F, extra_F)
        latency, flow = latency + extra_s, flow + byte_s
    return Wire(latency_s=latency, per_byte_s=copy + flow, flow_s_per_byte=flow)


def _extra_bytes(pattern: Pattern) -> Floats:
    """(F,) gaps between messages, as bytes: of transfers at one pace the least, since all of them end together."""
    least_B = np.full(int(pattern.bundle_F.max(initial=-1)) + 1, np.inf)
    np.minimum.at(least_B, pattern.bundle_F, pattern.extra_bytes_F)
    return least_B[pattern.bundle_F]


def _busiest_link(pattern: Pattern, cluster: Cluster, chosen_F: Flags, extra_F: Floats) -> tuple[float, float]:
    """Of the link that takes longest for large messages: seconds for the gaps between them, and for each byte."""
    paths = pattern.paths_FH[chosen_F]
    row, hop = np.nonzero(paths >= 0)
    if not len(row):
        return 0.0, 0.0
    links, index = np.unique(paths[row, hop], return_inverse=True)
    bandwidth = cluster.bandwidth_bytes_per_s_K[links]
    byte_s = np.bincount(index, weights=pattern.share_F[chosen_F][row]) / bandwidth
    extra_s = np.bincount(index, weights=extra_F[chosen_F][row]) / bandwidth
    return float(extra_s[byte_s == byte_s.max()].max()), float(byte_s.max())


def until(pattern: Pattern, cluster: Cluster, member: int) -> Wire:
    """Until a member has sent and got its own: all phases before the last in which it has anything, and that one's
    transfers from and to it.
    """
    own_F = (pattern.source_F == member) | (pattern.target_F == member)
    last = int(pattern.phase_F[own_F].max(initial=-1))
    return busiest(pattern, cluster, own_F | (pattern.phase_F < last), phases=last + 1)


def first_done(pattern: Pattern, cluster: Cluster, members: tuple[int, ...]) -> Wire:
    """Until one member has sent and got its own: the phases before the last in which it has anything, and in that
    one its own load on the links at its ends.
    """
    last_R = np.full(max(members) + 1, -1)
    for rank_F in (pattern.source_F, pattern.target_F):
        np.maximum.at(last_R, rank_F, pattern.phase_F)
    found, members_G = [], np.array(members)
    for phase in np.unique(last_R[members_G]).tolist():
        before = busiest(pattern, cluster, pattern.phase_F < phase, phases=phase + 1)
        load_R = _end_load(pattern, cluster, pattern.phase_F == phase, size=len(last_R))
        least = float(load_R[members_G[last_R[members_G] == phase]].min())
        found.append(Wire(latency_s=before.latency_s, per_byte_s=before.per_byte_s + least))
    return least_of(found)


def _end_load(pattern: Pattern, cluster: Cluster, chosen_F: Flags, *, size: int) -> Floats:
    """(R,) seconds per byte that each rank's own transfers take on the busiest link that ends at it."""
    paths, share = pattern.paths_FH[chosen_F], pattern.share_F[chosen_F]
    load_R, each = np.zeros(size), np.arange(len(paths))
    for rank_F, hop in ((pattern.source_F, 0 * each), (pattern.target_F, (paths >= 0).sum(axis=1) - 1)):
        link = paths[each, hop]
        both, index = np.unique(np.stack([rank_F[chosen_F], link]), axis=1, return_inverse=True)
        load = np.bincount(index.ravel(), weights=share)
        np.maximum.at(load_R, both[0], load / cluster.bandwidth_bytes_per_s_K[both[1]])
    return load_R
