"""Tutel's two-dimensional hierarchical all-to-all: the exchanges of `two_stage`, with strided copies of whole buffers.

Strided copy (by local peer), exchange inside the node, strided copy (by remote node), exchange between nodes. Both
copies pass over all bytes that a rank holds, those included that it keeps. Reference: Hwang et al., "Tutel: Adaptive
mixture-of-experts at scale" (MLSys 2023), section 4.3 and figure 15.
"""

from __future__ import annotations

from moeplan.collectives._places import has_rails, places
from moeplan.collectives._stages import held, in_two_stages
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_to_all",)


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has the same number of members, more than one, in each of several nodes."""
    return has_rails(groups_NG, cluster)


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Inside each node, then between nodes."""
    stages = in_two_stages(exchange, places(exchange.groups_NG, cluster))
    return [stage.wave(copy_share=held(stage)) for stage in stages]
