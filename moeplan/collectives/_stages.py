"""An all-to-all in two stages: inside the node to the receiver's index, then between nodes on that index.

Axes: N groups, B nodes of a group, L members in a node, I and J the senders and receivers of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.collectives._places import Places, by_rail
from moeplan.domain.program import Exchange, Floats, Ints, Wave


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stage:
    """One of the stages, as teams of ranks that exchange among themselves: a node, or an index over all nodes."""

    team_NTI: Ints
    """The ranks of each team."""
    moved_NTIJ: Floats
    """Within a team, what a rank keeps included."""

    def wave(self, **how: Any) -> Wave:
        """The transfers of the stage."""
        size = self.moved_NTIJ.shape[-1]
        n, team, i, j = np.nonzero(self.moved_NTIJ * (1.0 - np.eye(size)))
        return Wave(
            source_F=self.team_NTI[n, team, i], target_F=self.team_NTI[n, team, j],
            share_F=self.moved_NTIJ[n, team, i, j], group_F=n, bundle_F=np.arange(len(n)), **how,
        )  # fmt: skip


def in_two_stages(exchange: Exchange, where: Places) -> tuple[Stage, Stage]:
    """(b, l) to (b, l') with all that is for any (*, l'), then (b, l') to (b', l') with all that is for it."""
    ranks_NBL, share_NBLBL = by_rail(exchange, where)
    inside = Stage(team_NTI=ranks_NBL, moved_NTIJ=share_NBLBL.sum(axis=3))
    between_NLBB = share_NBLBL.sum(axis=2).transpose(0, 3, 1, 2)
    return inside, Stage(team_NTI=ranks_NBL.transpose(0, 2, 1), moved_NTIJ=between_NLBB)


def held(stage: Stage) -> float:
    """What the fullest rank has before the stage."""
    return float(stage.moved_NTIJ.sum(axis=-1).max())


def sent(stage: Stage) -> float:
    """What the busiest rank sends in the stage."""
    away = 1.0 - np.eye(stage.moved_NTIJ.shape[-1])
    return float((stage.moved_NTIJ * away).sum(axis=-1).max())
