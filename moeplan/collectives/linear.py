"""Every member sends to every other at once, one message each: what NCCL's grouped send and receive does."""

from __future__ import annotations

from moeplan.collectives._waves import shares, wave
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_to_all",)
IS_USUAL = True


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Always."""
    return True


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """One wave of G (G - 1) transfers in each group; pairs without bytes are left out."""
    return [wave(exchange.groups_NG, shares(exchange))]
