"""Inside the node, then each part between nodes on a rail of its own, then inside the node again.

All-reduce: a reduce-scatter in the node leaves each of its L members 1 / L, which a ring of the members of that index
reduces over the nodes; then the node gathers. A gather goes between nodes first, a reduce-scatter inside first, a
broadcast is scattered in its node and sent on from node to node. Inside a node all pairs exchange at once. Reference:
Cho et al., "BlueConnect" (IBM Journal of Research and Development 63, 2019), which has the same levels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.collectives._places import has_rails, ranks_by_node
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Where each group has the same number of members, more than one, in each of several nodes."""
    return has_rails(groups_NG, cluster)


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """Inside, between, inside: what the operation needs of them."""
    ranks_NBL = ranks_by_node(exchange.groups_NG, cluster)
    _, num_nodes, local = ranks_NBL.shape
    inside, hops = _inside(ranks_NBL), num_nodes - 1
    if exchange.operation == "broadcast":
        return _broadcast(ranks_NBL, exchange.groups_NG[:, 0])
    if exchange.operation == "all_reduce":
        return [inside, _between(ranks_NBL, 2 * hops, share=2 * hops / num_nodes / local), inside]
    between = _between(ranks_NBL, hops, share=hops / num_nodes / local)
    return [between, inside] if exchange.operation == "all_gather" else [inside, between]


def _inside(ranks_NBL: Ints) -> Wave:
    """1 / L between all pairs of each node."""
    num_groups, num_nodes, local = ranks_NBL.shape
    i, j = np.nonzero(1 - np.eye(local))
    count = num_groups * num_nodes * len(i)
    return Wave(
        source_F=ranks_NBL[:, :, i].ravel(), target_F=ranks_NBL[:, :, j].ravel(), share_F=np.full(count, 1.0 / local),
        group_F=np.repeat(np.arange(num_groups), num_nodes * len(i)), bundle_F=np.arange(count),
    )  # fmt: skip


def _between(ranks_NBL: Ints, steps: int, *, share: float, is_open: bool = False) -> Wave:
    """A ring over the nodes for each index; if `is_open`, a chain from the first node to the last."""
    num_groups, _, local = ranks_NBL.shape
    source, target = ranks_NBL, np.roll(ranks_NBL, -1, axis=1)
    if is_open:
        source, target = source[:, :-1], target[:, :-1]
    bundle_NBL = np.arange(num_groups)[:, None, None] * local + np.arange(local) + 0 * source
    return Wave(
        source_F=source.ravel(), target_F=target.ravel(), share_F=np.full(source.size, share),
        group_F=(bundle_NBL // local).ravel(), bundle_F=bundle_NBL.ravel(), steps=float(steps), messages=float(steps),
    )  # fmt: skip


def _broadcast(ranks_NBL: Ints, first_N: Ints) -> list[Wave]:
    """The first member's parts to its neighbours, over the rails to the other nodes, and to all in each node."""
    num_groups, num_nodes, local = ranks_NBL.shape
    home_N = (ranks_NBL == first_N[:, None, None]).any(axis=2).argmax(axis=1)
    order_NB = (home_N[:, None] + np.arange(num_nodes)) % num_nodes
    ranks_NBL = np.take_along_axis(ranks_NBL, order_NB[:, :, None], axis=1)
    others = ranks_NBL[:, 0] != first_N[:, None]
    count = num_groups * (local - 1)
    scatter = Wave(
        source_F=np.repeat(first_N, local - 1), target_F=ranks_NBL[:, 0][others], share_F=np.full(count, 1.0 / local),
        group_F=np.repeat(np.arange(num_groups), local - 1), bundle_F=np.arange(count),
    )  # fmt: skip
    inside = _inside(ranks_NBL)
    lacks_F = inside.target_F != first_N[inside.group_F]
    last = replace(
        inside, source_F=inside.source_F[lacks_F], target_F=inside.target_F[lacks_F], share_F=inside.share_F[lacks_F],
        group_F=inside.group_F[lacks_F], bundle_F=np.arange(int(lacks_F.sum())),
    )  # fmt: skip
    return [scatter, _between(ranks_NBL, num_nodes - 1, share=1.0 / local, is_open=True), last]
