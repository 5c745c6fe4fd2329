"""Which members of a group are in one node: what algorithms for machines of two tiers go by.

Axes: N groups, G members of a group, B nodes of a group in rising order, L members in a node by rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeplan.collectives._waves import shares
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Floats, Ints

Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Places:
    """Where the members of each group stand."""

    node_NG: Ints
    """The number of the member's node among those of its group."""
    index_NG: Ints
    """The number of the member among those in its node."""
    size_NB: Ints
    """Members in each node; 0 where a group has fewer nodes than another one."""

    @property
    def num_nodes(self) -> int:
        """Nodes of the group that has most."""
        return int(self.size_NB.shape[1])

    @property
    def local(self) -> int:
        """Members of every group in each of its nodes, if that is one number; 0 otherwise."""
        found = np.unique(self.size_NB)
        return int(found[0]) if len(found) == 1 else 0

    @property
    def member_NBL(self) -> Ints:
        """The member at each place, where every node has the same number of them."""
        num_groups, size = self.node_NG.shape
        place_NG = self.node_NG * self.local + self.index_NG
        member_NG = np.empty_like(place_NG)
        np.put_along_axis(member_NG, place_NG, np.broadcast_to(np.arange(size), place_NG.shape), axis=1)
        return member_NG.reshape(num_groups, self.num_nodes, self.local)

    def is_near_NGG(self) -> Flags:
        """Which pairs of members are in one node."""
        return np.asarray(self.node_NG[:, :, None] == self.node_NG[:, None, :])

    @property
    def leader_NG(self) -> Ints:
        """The first member of each member's node."""
        return np.take_along_axis(self._by_index_NBG()[:, :, 0], self.node_NG, axis=1)

    def peer_NGB(self) -> Ints:
        """The member of each node that has the same index as member i; in smaller nodes they take turns."""
        n, nodes = np.arange(len(self.node_NG))[:, None, None], np.arange(self.num_nodes)
        index_NGB = self.index_NG[:, :, None] % np.maximum(self.size_NB, 1)[:, None, :]
        return self._by_index_NBG()[n, nodes, index_NGB]

    def _by_index_NBG(self) -> Ints:
        num_groups, size = self.node_NG.shape
        member_NBG = np.zeros((num_groups, self.num_nodes, size), np.int64)
        member_NBG[np.arange(num_groups)[:, None], self.node_NG, self.index_NG] = np.arange(size)
        return member_NBG


def places(groups_NG: Ints, cluster: Cluster) -> Places:
    """The places of the members, whatever their order is."""
    return _places(np.ascontiguousarray(groups_NG, np.int64).tobytes(), groups_NG.shape[1], cluster.gpus_per_node)


@lru_cache(maxsize=512)
def _places(groups: bytes, size: int, gpus_per_node: int) -> Places:
    groups_NG = np.frombuffer(groups, np.int64).reshape(-1, size)
    num_groups = len(groups_NG)
    order_NG = np.argsort(groups_NG, axis=1, kind="stable")
    node_NG = np.take_along_axis(groups_NG, order_NG, axis=1) // gpus_per_node
    is_first_NG = np.concatenate([np.ones((num_groups, 1), bool), node_NG[:, 1:] != node_NG[:, :-1]], axis=1)
    number_NG = np.cumsum(is_first_NG, axis=1) - 1
    start_NG = np.maximum.accumulate(np.where(is_first_NG, np.arange(size), 0), axis=1)
    found = [np.empty_like(number_NG) for _ in range(2)]
    for each, values in zip(found, (number_NG, np.arange(size) - start_NG), strict=True):
        np.put_along_axis(each, order_NG, values, axis=1)
    num_nodes = int(number_NG.max()) + 1
    cell = np.arange(num_groups)[:, None] * num_nodes + number_NG
    size_NB = np.bincount(cell.ravel(), minlength=num_groups * num_nodes).reshape(num_groups, num_nodes)
    return Places(node_NG=found[0], index_NG=found[1], size_NB=size_NB)


def has_rails(groups_NG: Ints, cluster: Cluster) -> bool:
    """Whether each group has the same number of members, more than one, in each of several nodes."""
    found = places(groups_NG, cluster)
    return found.num_nodes > 1 and found.local > 1


def ranks_by_node(groups_NG: Ints, cluster: Cluster) -> Ints:
    """[N, B, L] ranks by node and index, where every node has equally many."""
    local = places(groups_NG, cluster).local
    return np.sort(groups_NG, axis=1).reshape(len(groups_NG), -1, local)


def by_rail(exchange: Exchange, where: Places) -> tuple[Ints, Floats]:
    """[N, B, L] ranks by node and index, and [N, B, L, B, L] their shares, where every node has equally many."""
    member_NBL = where.member_NBL
    num_groups, num_nodes, local = member_NBL.shape
    flat_NG = member_NBL.reshape(num_groups, -1)
    share_NGG = shares(exchange)[flat_NG[:, :, None], flat_NG[:, None, :]]
    ranks_NG = np.take_along_axis(exchange.groups_NG, flat_NG, axis=1)
    return ranks_NG.reshape(member_NBL.shape), share_NGG.reshape(num_groups, num_nodes, local, num_nodes, local)
