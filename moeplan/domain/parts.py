"""All links of a cluster: how wide and slow each is after speeds and faults, and which ones a name means.

Axes: K directed link of the cluster, N node that is left, B directed link of a node.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.cluster_spec import ClusterSpec, FaultSpec, SpeedSpec, place_of
from moeplan.domain.fabric import Leaves
from moeplan.domain.lattice import Dragonfly, Torus
from moeplan.domain.ways import Switches
from moeplan.domain.wiring import FloatArray, IntArray, LinkSpec, NicSpec, Wiring, expand, pairs, read_only
from moeplan.errors import CatalogueError

_HOW = "write it as in n0.nic3, n*.nic3 or n0-3.nic*"
_IN_NODE = re.compile(r"n(\*|\d{1,9}-\d{1,9}|\d{1,9})\.(\S+)")
_NUMBERS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def places_left(spec: ClusterSpec) -> IntArray:
    """The numbers of the nodes that are not lost.

    Raises CatalogueError for numbers that no node has, if none is left, and in a torus, where ranks are places.
    """
    is_left = np.ones(spec.nodes, dtype=bool)
    for index, fault in enumerate(spec.faults):
        with _told(spec, f"faults.{index}"):
            if fault.node is not None and spec.is_torus:
                raise ValueError("a torus cannot lose a node, because its ranks are places; change its shape and nodes")
            if fault.node is not None:
                is_left[_numbers("node", str(fault.node), spec.nodes)] = False
            if not is_left.any():
                raise ValueError(f"all {spec.nodes} nodes are lost; leave at least one")
    return np.flatnonzero(is_left).astype(np.int32)


@contextmanager
def _told(spec: ClusterSpec, part: str) -> Iterator[None]:
    """A ValueError becomes a CatalogueError that says which part of the topology it is about."""
    try:
        yield
    except ValueError as error:
        raise CatalogueError(f"topology {spec.name}: {part}: {error}") from None


def _numbers(what: str, text: str, count: int) -> range:
    match = _NUMBERS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
    if not 0 <= first <= last < count:
        raise ValueError(f"{what} {text!r} is not there; use a number below {count}, or a range such as 0-{count - 1}")
    return range(first, last + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the names in faults and speeds can mean: the nodes that are left, their wires, and what is between."""

    place_N: IntArray
    num_nodes: int
    """As built."""
    num_gpus: int
    num_nics: int
    wiring: Wiring | None
    fabric: Switches | Torus

    @staticmethod
    def of(spec: ClusterSpec, place_N: IntArray, *, wiring: Wiring | None, fabric: Switches | Torus) -> Parts:
        """The parts of a cluster of which the nodes `place_N` are left."""
        return Parts(
            place_N=place_N,
            num_nodes=spec.nodes,
            num_gpus=spec.gpus_per_node,
            num_nics=spec.nic.per_node if spec.nic else 0,
            wiring=wiring,
            fabric=fabric,
        )

    def links(self, spec: FaultSpec | SpeedSpec) -> IntArray:
        """The directed links, both ways, of what a fault or speed names. Raises ValueError."""
        place, text = place_of(spec)
        assert place != "node"
        find = {"link": self._wires, "nic": self._nics, "rail": self._rail, "switch": self._switch}[place]
        links = np.unique(find(text)).astype(np.int32)
        if isinstance(spec, SpeedSpec) and place == "rail":
            # Its uplinks follow from the speed of its NICs.
            links = links[links < len(self.place_N) * self._size]
        if not len(links):
            raise ValueError(f"{place} {text!r} is only on nodes that are lost; remove it")
        return links

    def _nics(self, text: str) -> IntArray:
        nodes, name = self._nodes(text)
        if self.num_nics == 0 or not name.startswith("nic"):
            raise ValueError(f"{text!r} is not a NIC; {_HOW}")
        nics = [int(each.removeprefix("nic")) for each in expand(name, {"nic": self.num_nics})]
        return self._ports(nodes[:, None], np.array(nics, dtype=np.int32))

    @property
    def _size(self) -> int:
        """Directed links of a node."""
        return len(self.wiring.ends_B) if self.wiring else 0

    def ports_NK(self, figure_K: FloatArray) -> FloatArray:
        """A figure of each NIC's port, as the directed link from the NIC to the fabric has it."""
        inside = figure_K[: len(self.place_N) * self._size].reshape(len(self.place_N), -1)
        return inside[:, self._size - 2 * self.num_nics :: 2]

    def _ports(self, nodes: IntArray, nics: IntArray) -> IntArray:
        links = nodes * np.int32(self._size) + np.int32(self._size - 2 * self.num_nics) + 2 * nics
        return np.stack([links, links + 1]).ravel()

    def _rail(self, text: str) -> IntArray:
        fabric = self.fabric
        if not isinstance(fabric, Leaves) or not fabric.by_rail:
            raise ValueError("rail has no effect on a fabric without rails; name the cards, as in {nic: n*.nic3}")
        rails = np.array(_numbers("rail", text, self.num_nics), dtype=np.int32)
        links = np.arange(fabric.num_links, dtype=np.int32)
        is_uplink = np.isin(links // np.int32(2 * fabric.num_ways) % np.int32(self.num_nics), rails)
        nodes = np.arange(len(self.place_N), dtype=np.int32)
        return np.concatenate([self._ports(nodes[:, None], rails), fabric.first_link + links[is_uplink]])

    def _switch(self, text: str) -> IntArray:
        if _IN_NODE.fullmatch(text):
            nodes, name = self._nodes(text)
            return self._inside(nodes, lambda ends: name in ends, text)
        between = [link for link, ends in self._between() if text in ends]
        if isinstance(self.fabric, Torus):
            raise ValueError(f"switch {text!r} is not there, because a torus has none; name a link")
        names = [self.fabric.name(number) for number in range(self.fabric.num_switches)]
        if text not in names and not between:
            raise ValueError(f"switch {text!r} is not there; {names[0]} to {names[-1]} are, or name a link")
        nodes, nics = np.indices((len(self.place_N), self.num_nics), dtype=np.int32).reshape(2, -1)
        on = self.fabric.of(nodes, nics) == (names.index(text) if text in names else -1)
        return np.concatenate([np.array(between, dtype=np.int32), self._ports(nodes[on], nics[on])])

    def _wires(self, text: str) -> IntArray:
        start, arrow, end = (part.strip() for part in text.partition("->"))
        if not arrow or not start or not end:
            raise ValueError(f"{text!r} is not a link; write its two ends, as in n0.gpu3 -> n0.nvswitch")
        if isinstance(self.fabric, Torus):
            return self._torus_wires(text, start, end)
        inside = [bool(_IN_NODE.fullmatch(name)) for name in (start, end)]
        if all(inside):
            return self._node_wires(text, start, end)
        if any(inside):
            return self._plugged(*((start, end) if inside[0] else (end, start)))
        found = [link for link, ends in self._between() if {start, end} == set(ends)]
        if not found:
            raise ValueError(f"{text!r} is not a link of this fabric; {self._known()}")
        return np.array(found, dtype=np.int32)

    def _plugged(self, nic: str, switch: str) -> IntArray:
        """The port of a NIC, which is called by the switch at its other end as well."""
        links = self._nics(nic)
        assert not isinstance(self.fabric, Torus)
        node, link = divmod(int(links[0]) if len(links) else 0, self._size)
        number = (link - self._size) // 2 + self.num_nics
        leaf = self.fabric.name(int(self.fabric.of(np.array([node], np.int32), np.array([number], np.int32))[0]))
        if len(links) and leaf != switch:
            raise ValueError(f"{nic} is plugged into {leaf}, not into {switch!r}; write {nic} -> {leaf}")
        return links

    def _known(self) -> str:
        ends = next((ends for _, ends in self._between()), None)
        return f"its links are such as {' -> '.join(ends)}" if ends else "its switch has no links but the NICs' ports"

    def _between(self) -> Iterator[tuple[int, tuple[str, str]]]:
        """The links between switches, and their ends."""
        fabric = self.fabric
        if isinstance(fabric, Leaves):
            links = range(fabric.first_link, fabric.first_link + fabric.num_links)
            yield from ((link, fabric.link_ends(link)) for link in links)
        elif isinstance(fabric, Dragonfly):
            names = [fabric.name(router) for router in range(fabric.num_switches)]
            ends = zip(*(each.tolist() for each in fabric.ends_E()), strict=True)
            yield from ((fabric.first_link + i, (names[a], names[b])) for i, (a, b) in enumerate(ends))

    def _node_wires(self, text: str, start: str, end: str) -> IntArray:
        (nodes, a), (others, b) = self._nodes(start), self._nodes(end)
        if not np.array_equal(nodes, others):
            raise ValueError(f"{text!r} leads from node to node, where no wire is; name two parts of one node")
        wanted = {frozenset(pair) for pair in pairs(a, b, {"gpu": self.num_gpus, "nic": self.num_nics})}
        return self._inside(nodes, lambda ends: frozenset(ends) in wanted, text)

    def _inside(self, nodes: IntArray, is_meant: Callable[[tuple[str, str]], bool], text: str) -> IntArray:
        assert self.wiring is not None
        links = np.array([b for b, ends in enumerate(self.wiring.ends_B) if is_meant(ends)], dtype=np.int32)
        if not len(links):
            a, b = self.wiring.ends_B[0]
            raise ValueError(f"{text!r} is not a wire of a node; its wires are such as n0.{a} -> n0.{b}")
        return (nodes[:, None] * np.int32(self._size) + links).ravel()

    def _torus_wires(self, text: str, start: str, end: str) -> IntArray:
        assert isinstance(self.fabric, Torus)
        a, b = (self._rank(name) for name in (start, end))
        ports = range(len(self.fabric.ports))
        links = [
            rank * len(ports) + port
            for rank, other in ((a, b), (b, a))
            for port in ports
            if self.fabric.neighbour(rank, port) == other
        ]
        if not links:
            raise ValueError(f"{text!r} is not a link, because the two GPUs are no neighbours; name two that are")
        return np.array(links, dtype=np.int32)

    def _rank(self, text: str) -> int:
        match = re.fullmatch(r"n(\d{1,9})\.gpu(\d{1,9})", text)
        node, gpu = (int(match[1]), int(match[2])) if match else (-1, -1)
        if not (0 <= node < self.num_nodes and gpu < self.num_gpus):
            raise ValueError(f"{text!r} is not a GPU of this torus; write it as in n0.gpu{self.num_gpus - 1}")
        return node * self.num_gpus + gpu

    def _nodes(self, text: str) -> tuple[IntArray, str]:
        """The indices among the nodes that are left of `n3.gpu0` or `n*.gpu0`, and what is behind the point."""
        match = _IN_NODE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a part of a node; {_HOW}")
        numbers = range(self.num_nodes) if match[1] == "*" else _numbers("node", match[1], self.num_nodes)
        is_meant = (self.place_N >= numbers[0]) & (self.place_N <= numbers[-1])
        return np.flatnonzero(is_meant).astype(np.int32), match[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """The figures of every directed link; a kind is a place in `names`."""

    names: tuple[str, ...]
    kind_K: NDArray[np.int8]
    bandwidth_bytes_per_s_K: FloatArray
    latency_s_K: FloatArray


def links_of(spec: ClusterSpec, parts: Parts) -> Links:
    """The links of a cluster after its speeds and faults. Raises CatalogueError for those of what is not there."""
    bare = _torus_links(spec, parts.fabric) if isinstance(parts.fabric, Torus) else _switched_links(spec, parts)
    bandwidth_K, latency_s_K = bare.bandwidth_bytes_per_s_K.copy(), bare.latency_s_K.copy()
    base = [_base(spec, name) for name in bare.names]
    efficiency_K = np.array([each.efficiency for each in base])[bare.kind_K]
    speeds = list(_named(spec, parts, spec.speeds, "speeds"))
    for speed, links in speeds:
        if speed.bandwidth_bytes_per_s is not None:
            bandwidth_K[links] = speed.bandwidth_bytes_per_s * efficiency_K[links]
        if speed.latency_s is not None:
            latency_s_K[links] += speed.latency_s - np.array([each.latency_s for each in base])[bare.kind_K[links]]
    if isinstance(parts.fabric, Leaves) and parts.fabric.num_links:
        _widen_uplinks(spec, parts, bandwidth_K, kept=[links for speed, links in speeds if speed.bandwidth_bytes_per_s])
    for fault, links in _named(spec, parts, spec.faults, "faults"):
        bandwidth_K[links] *= fault.capacity
    return Links(
        names=bare.names,
        kind_K=read_only(bare.kind_K),
        bandwidth_bytes_per_s_K=read_only(bandwidth_K),
        latency_s_K=read_only(latency_s_K),
    )


_Special = TypeVar("_Special", FaultSpec, SpeedSpec)


def _named(
    spec: ClusterSpec, parts: Parts, specials: Sequence[_Special], key: str
) -> Iterator[tuple[_Special, IntArray]]:
    for index, special in enumerate(specials):
        if place_of(special)[0] != "node":
            with _told(spec, f"{key}.{index}"):
                links = parts.links(special)
            yield special, links


def _base(spec: ClusterSpec, name: str) -> LinkSpec | NicSpec:
    """What the topology says of a kind of link; the uplinks are made of the NICs' kind."""
    if name not in ("nic", "leaf"):
        return spec.links[name]
    assert spec.nic is not None
    return spec.nic if name == "nic" else spec.nic.model_copy(update={"latency_s": 0.0})


def _torus_links(spec: ClusterSpec, torus: Torus) -> Links:
    assert spec.fabric is not None
    assert spec.fabric.link is not None
    link = spec.links[spec.fabric.link]
    return Links(
        names=(spec.fabric.link,),
        kind_K=np.zeros(torus.num_links, dtype=np.int8),
        bandwidth_bytes_per_s_K=np.full(torus.num_links, link.usable_bytes_per_s),
        latency_s_K=np.full(torus.num_links, link.latency_s),
    )


def _switched_links(spec: ClusterSpec, parts: Parts) -> Links:
    assert parts.wiring is not None
    assert not isinstance(parts.fabric, Torus)
    nodes, between = len(parts.place_N), _between(spec, parts.fabric)
    names = tuple(dict.fromkeys([*parts.wiring.kind_B, *between.names]))
    kind_B = np.array([names.index(kind) for kind in parts.wiring.kind_B], dtype=np.int8)
    kinds = np.array([names.index(kind) for kind in between.names], dtype=np.int8)
    return Links(
        names=names,
        kind_K=np.concatenate([np.tile(kind_B, nodes), kinds[between.kind_K] if len(kinds) else between.kind_K]),
        bandwidth_bytes_per_s_K=np.concatenate(
            [np.tile(parts.wiring.bandwidth_bytes_per_s_B, nodes), between.bandwidth_bytes_per_s_K]
        ),
        latency_s_K=np.concatenate([np.tile(parts.wiring.latency_s_B, nodes), between.latency_s_K]),
    )


def _between(spec: ClusterSpec, fabric: Switches) -> Links:
    """The links between switches. Each pays the switch that it leaves."""
    hop_s, size = (spec.fabric.latency_s if spec.fabric else 0.0), fabric.num_links
    if isinstance(fabric, Leaves):
        width = np.zeros(size)
        if size:
            assert spec.fabric is not None
            assert spec.nic is not None
            each = spec.nic.usable_bytes_per_s / (spec.fabric.oversubscription or 1.0)
            width = np.repeat(fabric.nics_under() * each / fabric.num_ways, 2 * fabric.num_ways)
        return Links(
            names=("leaf",) if size else (),
            kind_K=np.zeros(size, dtype=np.int8),
            bandwidth_bytes_per_s_K=width,
            latency_s_K=np.full(size, hop_s),
        )
    assert spec.fabric is not None
    assert spec.fabric.link is not None
    assert spec.fabric.global_link is not None
    is_global = fabric.is_global_E()
    near, far = spec.links[spec.fabric.link], spec.links[spec.fabric.global_link]
    return Links(
        names=(spec.fabric.link, spec.fabric.global_link) if is_global.any() else (spec.fabric.link,)[: bool(size)],
        kind_K=is_global.astype(np.int8),
        bandwidth_bytes_per_s_K=np.where(
            is_global, far.usable_bytes_per_s * fabric.num_cables_E(), near.usable_bytes_per_s
        ),
        latency_s_K=np.where(is_global, far.latency_s, near.latency_s) + hop_s,
    )


def _widen_uplinks(spec: ClusterSpec, parts: Parts, bandwidth_K: FloatArray, *, kept: Sequence[IntArray]) -> None:
    """Adds to each uplink what its NICs have more than the rest, but not to those whose own speed is given."""
    fabric = parts.fabric
    assert isinstance(fabric, Leaves)
    assert spec.fabric is not None
    assert spec.nic is not None
    more_NK = parts.ports_NK(bandwidth_K) - spec.nic.usable_bytes_per_s
    leaf_NK = fabric.leaf_NK(len(more_NK))
    more_L = np.bincount(leaf_NK.ravel(), weights=more_NK.ravel(), minlength=fabric.num_switches)
    each_L = more_L / ((spec.fabric.oversubscription or 1.0) * fabric.num_ways)
    added_K = np.repeat(each_L, 2 * fabric.num_ways)
    for links in kept:
        added_K[links[links >= fabric.first_link] - fabric.first_link] = 0.0
    bandwidth_K[fabric.first_link :] += added_K
