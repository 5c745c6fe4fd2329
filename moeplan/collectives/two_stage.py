"""First inside each node, so that everything for local index l is on the rank with index l; then between nodes, index
by index.

Messages between nodes are as many times larger as the group has members in a node, and never cross rails; the bytes
inside a node are those of both stages. Before each stage a rank lays out what it is about to send; what stays is
taken to stay where it is (the paper does not say). Reference: Rajbhandari et al., "DeepSpeed-MoE" (ICML 2022), section
5.2.
"""

from __future__ import annotations

from moeplan.collectives._places import has_rails, places
from moeplan.collectives._stages import in_two_stages, sent
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_to_all",)
IS_USUAL = True


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has the same number of members, more than one, in each of several nodes."""
    return has_rails(groups_NG, cluster)


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Two waves: (b, l) to (b, l') with all that is for any (*, l'), then (b, l') to (b', l') with all that is for
    it.
    """
    stages = in_two_stages(exchange, places(exchange.groups_NG, cluster))
    return [stage.wave(copy_share=sent(stage)) for stage in stages]
