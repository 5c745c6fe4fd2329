"""Fabrics whose routers are wired to one another, torus and dragonfly, and the ways round links that do not work.

Axes: F pair of ranks, H link of a path (-1 behind the last), V router (in a torus: GPU), E directed link of the fabric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from moeplan.domain.fabric import BoolArray, FabricSpec
from moeplan.domain.wiring import IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Roads:
    """Which directed links between routers work, to find ways round those that do not."""

    first_link: int
    is_live_E: BoolArray
    tail_E: IntArray
    head_E: IntArray
    by_tail_E: IntArray
    """Links that work, ordered by the router that they leave."""
    start_V: IntArray
    """Where each router's links begin in `by_tail_E`; one more entry at the end."""
    region_V: IntArray
    """The lowest router that each can reach."""

    def detoured(self, path_FH: IntArray, src_F: IntArray, dst_F: IntArray) -> IntArray:
        """`path_FH` with the fewest links that work, lowest numbers first, in the rows that cross one that does not."""
        local_FH = np.where(path_FH >= 0, path_FH - np.int32(self.first_link), 0)
        rows = np.flatnonzero(((path_FH >= 0) & ~self.is_live_E[local_FH]).any(axis=1)).astype(np.int32)
        if not len(rows):
            return path_FH
        ways = [way for source in np.unique(src_F[rows]).tolist() for way in self._ways(source, rows, src_F, dst_F)]
        width = max(path_FH.shape[1], max(len(way) for _, way in ways))
        wider_FH = np.full((len(path_FH), width), -1, dtype=np.int32)
        wider_FH[:, : path_FH.shape[1]] = path_FH
        for row, way in ways:
            wider_FH[row] = -1
            wider_FH[row, : len(way)] = np.array(way) + self.first_link
        return wider_FH

    def _ways(self, source: int, rows: IntArray, src_F: IntArray, dst_F: IntArray) -> list[tuple[int, list[int]]]:
        link_V = _tree(self, source)
        return [(int(row), self._back(link_V, int(dst_F[row]))) for row in rows[src_F[rows] == source]]

    def _back(self, link_V: IntArray, target: int) -> list[int]:
        way: list[int] = []
        while (link := int(link_V[target])) >= 0:
            way.append(link)
            target = int(self.tail_E[link])
        assert link == _ROOT, "a pair that is cut off was refused when the cluster was built"
        return way[::-1]


_ROOT, _UNSEEN = -2, -1


def _roads_of(tail_E: IntArray, head_E: IntArray, is_live_E: BoolArray, first_link: int) -> Roads:
    live = np.flatnonzero(is_live_E).astype(np.int32)
    by_tail = live[np.argsort(tail_E[live], kind="stable")]
    num_routers = int(np.maximum(tail_E, head_E).max()) + 1
    bare = Roads(
        first_link=first_link,
        is_live_E=is_live_E,
        tail_E=tail_E,
        head_E=head_E,
        by_tail_E=by_tail,
        start_V=np.searchsorted(tail_E[by_tail], np.arange(num_routers + 1)).astype(np.int32),
        region_V=np.empty(0, dtype=np.int32),
    )
    return replace(bare, region_V=_regions(bare, num_routers))


def _regions(roads: Roads, num_routers: int) -> IntArray:
    region_V = np.full(num_routers, -1, dtype=np.int32)
    while (region_V < 0).any():
        source = int((region_V < 0).argmax())
        region_V[_tree(roads, source) != _UNSEEN] = source
    return region_V


def _tree(roads: Roads, source: int) -> IntArray:
    """The link by which each router is first reached from the source, breadth first."""
    link_V = np.full(len(roads.start_V) - 1, _UNSEEN, dtype=np.int32)
    link_V[source] = _ROOT
    frontier = np.array([source], dtype=np.int32)
    while len(frontier):
        counts = roads.start_V[frontier + 1] - roads.start_V[frontier]
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        links = roads.by_tail_E[np.repeat(roads.start_V[frontier], counts) + within]
        links = links[link_V[roads.head_E[links]] == _UNSEEN]
        frontier, first = np.unique(roads.head_E[links], return_index=True)
        link_V[frontier] = links[first]
    return link_V


@dataclass(frozen=True, kw_only=True, slots=True)
class Dragonfly:
    """Router r of group g is number g * a + r, with a = routers_per_group.

    A group owns a (a - 1) links inside it, then for each other group, by how far behind it comes, `num_lanes` links.
    The ports of a group go round its routers, so what a group sends to the next but d depends on d alone.
    """

    nodes_per_router: int
    routers_per_group: int
    num_groups: int
    num_cables: int
    """Between each two groups: those of the same two routers are one lane, a link as wide as they are together."""
    first_link: int
    place_N: IntArray | None = None
    """The place of each node that is left; None if all are."""
    roads: Roads | None = None
    """Where links do not work."""

    @property
    def num_lanes(self) -> int:
        """Links from one group to another: one for each pair of routers that cables join."""
        return min(self.num_cables, self.routers_per_group)

    @property
    def num_switches(self) -> int:
        """Routers of all groups."""
        return self.num_groups * self.routers_per_group

    @property
    def num_units(self) -> int:
        """Groups."""
        return self.num_groups

    @property
    def links_per_group(self) -> int:
        """Directed links that leave the routers of a group for others."""
        return self.routers_per_group * (self.routers_per_group - 1) + (self.num_groups - 1) * self.num_lanes

    @property
    def num_links(self) -> int:
        """Directed links between routers."""
        return self.num_groups * self.links_per_group

    def units_N(self, num_nodes: int) -> tuple[IntArray, IntArray]:
        """The group of each node, and its router there; a group alone repeats router by router."""
        node_N = np.arange(num_nodes, dtype=np.int32)
        router_N = self.of(node_N, node_N * 0)
        if self.num_groups == 1:
            return router_N, router_N * 0
        unit_N, slot_N = np.divmod(router_N, np.int32(self.routers_per_group))
        return unit_N, slot_N

    def is_near(self, router_a: IntArray, router_b: IntArray) -> BoolArray:
        """Whether two routers are in one group."""
        near: BoolArray = router_a // self.routers_per_group == router_b // self.routers_per_group
        return near

    def meeting_points(self, router_RK: IntArray) -> IntArray:
        """(R, K, 1) what routers must share to be joined: the region of those that reach each other."""
        return router_RK[:, :, None] * 0 if self.roads is None else self.roads.region_V[router_RK][:, :, None]

    def num_cables_E(self) -> IntArray:
        """How many cables each link between two groups holds; what it says of the others means nothing."""
        inside = self.routers_per_group * (self.routers_per_group - 1)
        lane_E = (np.arange(self.num_links) % max(1, self.links_per_group) - inside) % max(1, self.num_lanes)
        return -(-(self.num_cables - lane_E.astype(np.int32)) // np.int32(self.routers_per_group))

    def with_works(self, works_E: BoolArray) -> Dragonfly:
        """The same, with ways round the links that do not work."""
        return self if works_E.all() else replace(self, roads=_roads_of(*self.ends_E(), works_E, self.first_link))

    def of(self, node_F: IntArray, nic_F: IntArray) -> IntArray:
        """The router that NIC `nic_F` of node `node_F` is plugged into: all NICs of a node are on one."""
        place_F = node_F if self.place_N is None else self.place_N[node_F]
        return place_F // np.int32(self.nodes_per_router) + np.int32(0) * nic_F

    def are_joined(self, router_a: IntArray, router_b: IntArray) -> BoolArray:
        """Whether any way leads from one router to the other."""
        if self.roads is None:
            return np.ones(np.broadcast_shapes(router_a.shape, router_b.shape), dtype=bool)
        joined: BoolArray = self.roads.region_V[router_a] == self.roads.region_V[router_b]
        return joined

    def between(self, router_a: IntArray, router_b: IntArray, *, src_F: IntArray, dst_F: IntArray) -> IntArray:
        """(F, H) the minimal way: at most one hop inside each group, and one lane between two groups."""
        size = np.int32(self.routers_per_group)
        (group_a, a), (group_b, b) = np.divmod(router_a, size), np.divmod(router_b, size)
        is_far = group_a != group_b
        ahead = np.where(is_far, (group_b - group_a) % np.int32(self.num_groups), np.int32(1))
        lane, leaving, arriving = self._lanes(ahead, a, b)
        near_to = np.where(is_far, leaving, b)
        path_FH = np.full((len(router_a), 3), -1, dtype=np.int32)
        path_FH[:, 0] = np.where(a != near_to, self._inside(group_a, a, near_to), -1)
        path_FH[:, 1] = np.where(is_far, self._across(group_a, ahead, lane), -1)
        path_FH[:, 2] = np.where(is_far & (arriving != b), self._inside(group_b, arriving, b), -1)
        if self.roads is not None:
            return self.roads.detoured(left_justified(path_FH), router_a, router_b)
        return path_FH

    def _lanes(self, ahead: IntArray, a: IntArray, b: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The lane of each pair with the fewest hops, and the routers at its two ends."""
        size, lanes = np.int32(self.routers_per_group), np.int32(self.num_lanes)
        if not lanes:
            return np.zeros_like(a), a, b
        first_a = self._first_router(ahead)
        first_b = self._first_router(np.int32(self.num_groups) - ahead)
        from_a, to_b = (a - first_a) % size, (b - first_b) % size
        lane = np.where(from_a < lanes, from_a, np.where(to_b < lanes, to_b, (a + b) % lanes))
        return lane, (first_a + lane) % size, (first_b + lane) % size

    def _first_router(self, ahead: IntArray) -> IntArray:
        """The router that holds the first cable to the group that is `ahead` further on."""
        return ((ahead - np.int32(1)) * np.int32(self.num_cables)) % np.int32(self.routers_per_group)

    def _inside(self, group: IntArray, start: IntArray, end: IntArray) -> IntArray:
        base = np.int32(self.first_link) + group * np.int32(self.links_per_group)
        return base + start * np.int32(self.routers_per_group - 1) + end - (end > start)

    def _across(self, group: IntArray, ahead: IntArray, lane: IntArray) -> IntArray:
        inside = np.int32(self.first_link + self.routers_per_group * (self.routers_per_group - 1))
        return inside + group * np.int32(self.links_per_group) + (ahead - 1) * np.int32(self.num_lanes) + lane

    def ends_E(self) -> tuple[IntArray, IntArray]:
        """The routers that all links leave and reach, in the order of their numbers."""
        return self._ends(np.arange(self.num_links, dtype=np.int32))

    def _ends(self, link_E: IntArray) -> tuple[IntArray, IntArray]:
        size, inside = np.int32(self.routers_per_group), self.routers_per_group * (self.routers_per_group - 1)
        group, link = np.divmod(link_E, np.int32(self.links_per_group))
        start, end = np.divmod(link, np.int32(max(1, self.routers_per_group - 1)))
        ahead, lane = np.divmod(link - np.int32(inside), np.int32(max(1, self.num_lanes)))
        ahead = ahead + np.int32(1)
        leaving = (self._first_router(ahead) + lane) % size
        arriving = (self._first_router(np.int32(self.num_groups) - ahead) + lane) % size
        is_far = link >= inside
        tail = np.where(is_far, leaving, start)
        head = np.where(is_far, arriving, end + (end >= start))
        return group * size + tail, np.where(is_far, (group + ahead) % self.num_groups, group) * size + head

    def is_global_E(self) -> BoolArray:
        """Which links lead from group to group."""
        is_global: BoolArray = np.arange(self.num_links) % max(1, self.links_per_group) >= self.routers_per_group * (
            self.routers_per_group - 1
        )
        return is_global

    def name(self, router: int) -> str:
        """`router3.7` for router 7 of group 3."""
        return f"router{router // self.routers_per_group}.{router % self.routers_per_group}"

    def link_ends(self, link: int) -> tuple[str, str]:
        """The routers at the two ends of a link."""
        tail, head = self._ends(np.array([link - self.first_link], dtype=np.int32))
        return self.name(int(tail[0])), self.name(int(head[0]))


def dragonfly_of(spec: FabricSpec, *, num_nodes: int, first_link: int, place_N: IntArray | None = None) -> Dragonfly:
    """The groups that the nodes fill; the last one's routers are all there, whatever hangs on them."""
    groups = spec.num_groups(num_nodes)
    return Dragonfly(
        nodes_per_router=spec.nodes_per_router or 1,
        routers_per_group=spec.routers_per_group or 1,
        num_groups=groups,
        num_cables=spec.ports_per_group // (groups - 1) if groups > 1 else 0,
        first_link=first_link,
        place_N=place_N,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Torus:
    """Link `rank * num_ports + port` leaves `rank` on one axis in one direction; an axis of 2 has one wire, not two."""

    shape: tuple[int, ...]
    roads: Roads | None = None
    """Where links do not work."""

    @property
    def ports(self) -> tuple[tuple[int, int], ...]:
        """(axis, +1 or -1) of every directed link that leaves a GPU."""
        return tuple(
            (axis, sign)
            for axis, size in enumerate(self.shape)
            for sign in (1, -1)
            if size > 2 or (size == 2 and sign == 1)
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """How far apart the ranks of two neighbours on each axis are."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    def ends_E(self) -> tuple[IntArray, IntArray]:
        """The ranks that all links leave and reach, in the order of their numbers."""
        rank = np.arange(math.prod(self.shape), dtype=np.int32)
        heads = [
            rank + np.int32(stride) * ((rank // stride % size + sign) % size - rank // stride % size)
            for axis, sign in self.ports
            for size, stride in [(self.shape[axis], self.strides[axis])]
        ]
        return np.repeat(rank, len(heads)), np.stack(heads, axis=1).ravel() if heads else rank[:0]

    @property
    def first_link(self) -> int:
        """There are no other links before these."""
        return 0

    @property
    def num_links(self) -> int:
        """Directed links."""
        return math.prod(self.shape) * len(self.ports)

    def with_works(self, works_E: BoolArray) -> Torus:
        """The same, with ways round the links that do not work."""
        return self if works_E.all() else replace(self, roads=_roads_of(*self.ends_E(), works_E, 0))

    def neighbour(self, rank: int, port: int) -> int:
        """The rank at the other end of the link that leaves `rank` through `port`."""
        axis, sign = self.ports[port]
        stride, size = self.strides[axis], self.shape[axis]
        position = rank // stride % size
        return rank + stride * ((position + sign) % size - position)


def torus_paths(torus: Torus, *, src_F: IntArray, dst_F: IntArray) -> IntArray:
    """(F, H) directed links in dimension order, on each axis the shorter way round, ties to the positive direction."""
    legs, rank_F = [np.empty((len(src_F), 0), dtype=np.int32)], src_F
    for axis, (size, stride) in enumerate(zip(torus.shape, torus.strides, strict=True)):
        start_F = src_F // np.int32(stride) % np.int32(size)
        end_F = dst_F // np.int32(stride) % np.int32(size)
        base_F = rank_F - np.int32(stride) * start_F
        legs.append(_leg(torus, axis, base_F=base_F, start_F=start_F, end_F=end_F))
        rank_F = base_F + np.int32(stride) * end_F
    path_FH = left_justified(np.concatenate(legs, axis=1))
    return trimmed(path_FH if torus.roads is None else torus.roads.detoured(path_FH, src_F, dst_F))


def _leg(torus: Torus, axis: int, *, base_F: IntArray, start_F: IntArray, end_F: IntArray) -> IntArray:
    """The links along one axis; `base_F` is the rank at position 0 of the ring that the leg runs on."""
    size, ports = torus.shape[axis], torus.ports
    ahead_F = (end_F - start_F) % np.int32(size)
    forward_F = 2 * ahead_F <= size
    steps_F = np.where(forward_F, ahead_F, size - ahead_F)
    sign_F = np.where(forward_F, np.int32(1), np.int32(-1))
    step_H = np.arange(steps_F.max(initial=0), dtype=np.int32)
    position_FH = start_F[:, None] + sign_F[:, None] * step_H
    position_FH += np.where(
        position_FH < 0, np.int32(size), np.where(position_FH >= size, np.int32(-size), np.int32(0))
    )
    first_F = base_F * np.int32(len(ports)) + np.int32(ports.index((axis, 1)) if (axis, 1) in ports else 0)
    first_F += ~forward_F  # the port of the negative direction follows that of the positive one
    link_FH = first_F[:, None] + np.int32(torus.strides[axis] * len(ports)) * position_FH
    return np.where(step_H < steps_F[:, None], link_FH, np.int32(-1))


def left_justified(path_FH: IntArray) -> IntArray:
    """The same rows with every -1 moved to the end."""
    kept_FH = path_FH >= 0
    if kept_FH.all():
        return path_FH
    width = path_FH.shape[1]
    length_F = kept_FH.view(np.int8) @ np.ones(width, dtype=np.int32)  # summing along short rows is slower
    packed_FH = np.full_like(path_FH, -1)
    packed_FH[np.arange(width, dtype=np.int32) < length_F[:, None]] = path_FH[kept_FH]
    return packed_FH


def trimmed(path_FH: IntArray) -> IntArray:
    """The same rows without the last columns in which all are -1."""
    width = path_FH.shape[1]
    while width and (path_FH[:, width - 1] < 0).all():
        width -= 1
    return np.ascontiguousarray(path_FH[:, :width])
