"""Rounds in which no port sends to two or gets from two, chosen so that together they last as long as the busiest port.

On one tier (one node, or one member in each) nothing can be faster but for the latencies of the rounds. On two tiers
the rounds are of what goes between nodes, member by member, and what stays in a node goes beside the longest rounds,
over wires of its own. References: Birkhoff (1946), in `_birkhoff.py`; Lei et al., "FAST" (arXiv 2505.09764, 2025),
which evens out the members of a node before.
"""

from __future__ import annotations

from itertools import zip_longest

import numpy as np

from moeplan.collectives._birkhoff import rounds
from moeplan.collectives._places import places
from moeplan.collectives._waves import pairs, shares
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Floats, Ints, Wave

OPERATIONS = ("all_to_all",)
MOST_MEMBERS = 64
"""Larger tables have thousands of rounds, each with its latency, and take seconds to be taken apart."""
_BESIDE = 64
"""Rounds that take along what stays in a node."""
Round = tuple[Ints, Ints, Floats]
"""Senders, receivers, bytes."""


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """For 3 to 64 members."""
    return bool(2 < groups_NG.shape[1] <= MOST_MEMBERS)


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """A wave for each round, the longest first."""
    share_GG, where = shares(exchange), places(exchange.groups_NG, cluster)
    shapes, shape_N = np.unique(where.node_NG, axis=0, return_inverse=True)
    by_shape = [_rounds(share_GG, node_G) for node_G in shapes]
    groups = [np.flatnonzero(shape_N.ravel() == number) for number in range(len(shapes))]
    return [
        _joined(exchange.groups_NG, [(rows, found) for rows, found in zip(groups, together, strict=True) if found])
        for together in zip_longest(*by_shape)
    ]


def _rounds(share_GG: Floats, node_G: Ints) -> list[Round]:
    """The rounds of one group, those that stay in a node beside the others."""
    away_GG = share_GG * (1.0 - np.eye(len(share_GG)))
    is_near_GG = node_G[:, None] == node_G
    is_one_tier = bool(is_near_GG.all()) or len(np.unique(node_G)) == len(node_G)
    inside_GG = np.where(is_near_GG, 0.0 if is_one_tier else away_GG, 0.0)
    found = sorted(rounds(away_GG - inside_GG), key=lambda each: -float(each[2].max()))
    return _beside(found, inside_GG) if inside_GG.any() or not found else found


def _beside(found: list[Round], inside_GG: Floats) -> list[Round]:
    """The longest rounds with what stays in a node, as parts of the rounds' lengths; a round of that alone if there
    is none.
    """
    i, j = np.nonzero(inside_GG)
    longest = found[:_BESIDE] or [(i[:0], j[:0], np.zeros(0))]
    length = np.array([each[2].max(initial=0.0) for each in longest])
    part = length / length.sum() if length.any() else np.ones(1)
    together = [
        (np.concatenate([each[0], i]), np.concatenate([each[1], j]), np.concatenate([each[2], inside_GG[i, j] * now]))
        for each, now in zip(longest, part, strict=True)
    ]
    return [*together, *found[_BESIDE:]]


def _joined(groups_NG: Ints, together: list[tuple[Ints, Round]]) -> Wave:
    """One wave of the same round of groups of several shapes."""
    parts = [pairs(groups_NG[rows], *found) for rows, found in together]
    group_F = np.concatenate([rows[part.group_F] for (rows, _), part in zip(together, parts, strict=True)])
    return Wave(
        source_F=np.concatenate([part.source_F for part in parts]),
        target_F=np.concatenate([part.target_F for part in parts]),
        share_F=np.concatenate([part.share_F for part in parts]),
        group_F=group_F,
        bundle_F=np.arange(len(group_F)),
    )
