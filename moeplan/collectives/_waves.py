"""What the dishes are made with: shares of an exchange, and waves from tables of who sends what to whom.

Axes: N groups, G members of a group, F transfers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moeplan.domain.program import Exchange, Floats, Ints, Wave


def shares(exchange: Exchange) -> Floats:
    """(G, G) part of the exchange's bytes from member i to member j: equal parts where it does not say."""
    size = exchange.groups_NG.shape[1]
    return np.full((size, size), 1.0 / size) if exchange.share_GG is None else exchange.share_GG


def wave(groups_NG: Ints, moved_NGG: Floats, **how: Any) -> Wave:
    """A wave of one transfer for each pair of members that has bytes; one table (G, G) stands for all groups."""
    size = groups_NG.shape[1]
    if moved_NGG.ndim == 2:
        i, j = np.nonzero(moved_NGG * (1.0 - np.eye(size)))
        return pairs(groups_NG, i, j, moved_NGG[i, j], **how)
    n, i, j = np.nonzero(moved_NGG * (1.0 - np.eye(size)))
    return Wave(
        source_F=groups_NG[n, i], target_F=groups_NG[n, j], share_F=moved_NGG[n, i, j], group_F=n,
        bundle_F=np.arange(len(n)), **how,
    )  # fmt: skip


def pairs(groups_NG: Ints, i: Ints, j: Ints, share: Floats, **how: Any) -> Wave:
    """A wave in which, in every group, member i[p] sends share[p] to member j[p]."""
    num_groups = len(groups_NG)
    return Wave(
        source_F=groups_NG[:, i].ravel(), target_F=groups_NG[:, j].ravel(), share_F=np.tile(share, num_groups),
        group_F=np.repeat(np.arange(num_groups), len(i)), bundle_F=np.arange(num_groups * len(i)), **how,
    )  # fmt: skip


def nothing(groups_NG: Ints) -> Wave:
    """A wave without transfers."""
    none = np.zeros(0, np.int64)
    return pairs(groups_NG, none, none, np.zeros(0))


def added_up(from_NGX: Ints, to_NGX: Ints, moved_NGX: Floats) -> Floats:
    """(N, G, G) sums of what moves from and to the same members; the three tables are broadcast together."""
    start, end, moved = np.broadcast_arrays(from_NGX, to_NGX, moved_NGX)
    num_groups, size = moved.shape[:2]
    cell = (np.arange(num_groups)[:, None, None] * size + start) * size + end
    found = np.bincount(cell.ravel(), weights=moved.ravel(), minlength=num_groups * size * size)
    return np.asarray(found, np.float64).reshape(num_groups, size, size)


def mirrored(waves: list[Wave]) -> list[Wave]:
    """The way back: the last wave first, and every transfer the other way. What was followed then follows."""
    after = [False, *(each.follows for each in reversed(waves))]
    return [
        replace(each, source_F=each.target_F, target_F=each.source_F, follows=follows)
        for each, follows in zip(reversed(waves), after, strict=False)
    ]
