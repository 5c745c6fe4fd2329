"""The inside of a node: wires between names, and the table of shortest paths that all nodes share.

Axes: G GPU of a node, K NIC of a node, B directed link of a node, H link of a path (-1 behind the last).
A wire is full duplex: wire w is the directed links 2w (as written) and 2w + 1 (back). The NICs' ports come last.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from moeplan.domain._frozen import Frozen
from moeplan.errors import unknown_name

Positive = Annotated[float, Field(gt=0, le=1e30)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**8)]
IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]

FABRIC = "fabric"
"""Stands, in a node's table, for the switch that a NIC is plugged into; no part of a node may be called so."""
_NAME = re.compile(r"([a-z][a-z_]*)(\*|\d{1,6}-\d{1,6}|\d{1,6})?")
_Neighbours = dict[str, list[tuple[str, int, int]]]
_Route = tuple[int, ...]
_Length = tuple[int, int, int]
"""Relays, sum of 1 / bandwidth, links."""
_Found = tuple[_Length, _Route]
_Relays = Literal["never", "if needed", "gpus"]
_Array = TypeVar("_Array", bound=NDArray[np.generic])


class LinkSpec(Frozen):
    """One kind of wire, per direction. What a message can use is bandwidth x efficiency."""

    bandwidth_bytes_per_s: Positive
    latency_s: NotNegative = 0.0
    efficiency: Share = 1.0
    message_overhead_s: NotNegative = 0.0
    """Software time that each message over this kind of wire costs inside a node."""
    message_gap_s: NotNegative = 0.0
    """Time for which a message keeps the port busy beyond its bytes: 1 / message rate."""

    @property
    def usable_bytes_per_s(self) -> float:
        """What a long message reaches in one direction."""
        return self.bandwidth_bytes_per_s * self.efficiency


class _LinkTable(TypedDict):
    ends_B: tuple[tuple[str, str], ...]
    kind_B: tuple[str, ...]
    bandwidth_bytes_per_s_B: FloatArray
    latency_s_B: FloatArray


class WireSpec(Frozen):
    """`count` parallel wires of one kind between two names, or between the names of two lists (`gpu*`, `gpu0-3`)."""

    model_config = ConfigDict(populate_by_name=True)

    start: str = Field(alias="from")
    end: str = Field(alias="to")
    link: str
    count: Count = 1


class NicSpec(Frozen):
    """The network cards of a node, each with one full-duplex port. A path pays `latency_s` twice, once at each end."""

    per_node: Annotated[int, Field(ge=1, le=1024)]
    bandwidth_bytes_per_s: Positive
    latency_s: NotNegative = 0.0
    efficiency: Share = 1.0
    message_overhead_s: NotNegative = 0.0
    """Software time that each message between nodes costs."""
    message_gap_s: NotNegative = 0.0
    """Time for which a message keeps the port busy beyond its bytes: 1 / message rate."""

    @property
    def usable_bytes_per_s(self) -> float:
        """What a long message reaches in one direction."""
        return self.bandwidth_bytes_per_s * self.efficiency


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """The directed links of one node and the paths over them; link b of node n is link n * B + b of the cluster."""

    ends_B: tuple[tuple[str, str], ...]
    kind_B: tuple[str, ...]
    bandwidth_bytes_per_s_B: FloatArray
    latency_s_B: FloatArray
    local_GGH: IntArray
    """Links from one GPU to another."""
    up_GH: IntArray
    """Links from a GPU over its NIC to the fabric; no columns without NICs."""
    down_GH: IntArray
    """The same wires from the fabric to the GPU."""
    nic_G: IntArray
    """The NIC of each GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeWays:
    """The paths of one node over the wires that work, and over each of its NICs; a row of -1 where there is no way."""

    local_GGH: IntArray
    up_GKH: IntArray
    """Links from a GPU over a NIC to the fabric."""
    down_GKH: IntArray
    """The same wires from the fabric to the GPU."""
    nic_G: IntArray
    """The NIC of each GPU, -1 where it reaches none."""


def wire_node(
    wiring: Sequence[WireSpec],
    links: Mapping[str, LinkSpec],
    *,
    num_gpus: int,
    nic: NicSpec | None,
    fabric_latency_s: float,
) -> Wiring:
    """The table of one node.

    A path has the fewest relays through other GPUs and NICs (none, where a switch or socket offers a way), then the
    smallest sum of 1 / bandwidth, then the fewest links, then the lowest link numbers; the way back is the same way.
    A GPU leaves over the NIC that is nearest in this order; among equally near ones over that with its own number, or,
    if that is not among them, number g modulo how many there are. So rails stay rails and GPUs share NICs evenly.
    Raises ValueError for an unknown name, an unwired GPU or NIC, or two kinds of wire between the same two names.
    """
    num_nics = nic.per_node if nic else 0
    wires = _merged(wiring, links, counts={"gpu": num_gpus, "nic": num_nics})
    _check_used(wires, links)
    neighbours = _neighbours(wires, links)
    routes = [_Routes(neighbours, f"gpu{gpu}") for gpu in range(num_gpus)]
    local = {(a, b): routes[a].to(f"gpu{b}") for a in range(num_gpus) for b in range(a + 1, num_gpus)}
    nics = [_nearest_nic(routes[gpu], gpu, range(num_nics)) for gpu in range(num_gpus)] if nic else []
    _check_nics(nics)
    ups = [(*routes[gpu].to(f"nic{k}"), 2 * (len(wires) + k)) for gpu, k in enumerate(nics)]
    return Wiring(
        **_link_table(wires, links, nic=nic, fabric_latency_s=fabric_latency_s),
        local_GGH=_local_table(local, num_gpus),
        up_GH=_padded(ups),
        down_GH=_padded([_back(up) for up in ups]),
        nic_G=read_only(np.array(nics, dtype=np.int32)),
    )


def node_ways(
    wiring: Sequence[WireSpec],
    links: Mapping[str, LinkSpec],
    *,
    num_gpus: int,
    num_nics: int,
    dead: frozenset[int],
    is_aligned: bool,
) -> NodeWays:
    """The paths of a node whose wires and ports `dead` do not work, by the rules of `wire_node`.

    If `is_aligned`, the way to a NIC that is not the GPU's own has the smallest sum of 1 / bandwidth, through other
    GPUs as well: over NVLink to the GPU beside that NIC, and not over the host.
    """
    wires = _merged(wiring, links, counts={"gpu": num_gpus, "nic": num_nics})
    neighbours = _neighbours(wires, links, dead)
    routes = [_Routes(neighbours, f"gpu{gpu}") for gpu in range(num_gpus)]
    working = [k for k in range(num_nics) if len(wires) + k not in dead]
    nics = [_nearest_nic(routes[gpu], gpu, working) for gpu in range(num_gpus)]
    local = {(a, b): routes[a].find(f"gpu{b}") or () for a in range(num_gpus) for b in range(a + 1, num_gpus)}
    ups: dict[tuple[int, int], _Route] = {}
    for gpu, nic in product(range(num_gpus), working):
        route = routes[gpu].find(f"nic{nic}", by_fastest=is_aligned and nic != nics[gpu])
        ups[gpu, nic] = (*route, 2 * (len(wires) + nic)) if route else ()
    return NodeWays(
        local_GGH=_local_table(local, num_gpus),
        up_GKH=_table(ups, (num_gpus, num_nics)),
        down_GKH=_table({key: _back(up) for key, up in ups.items()}, (num_gpus, num_nics)),
        nic_G=read_only(np.array(nics, dtype=np.int32)),
    )


def _check_nics(nics: Sequence[int]) -> None:
    if -1 in nics:
        raise ValueError(
            f"wiring: no wires lead from gpu{nics.index(-1)} to a nic; wire nic* to the GPUs or to the switch that "
            "they hang on"
        )


def read_only(array: _Array) -> _Array:
    """The same array, which refuses to be written to."""
    array.flags.writeable = False
    return array


def expand(name: str, counts: Mapping[str, int]) -> list[str]:
    """The names that a name in a wiring stands for: `gpu*` is all of them, `gpu0-3` four, `nvswitch` itself.

    Raises ValueError for what is not a name, and for a GPU or NIC that the node does not have.
    """
    match = _NAME.fullmatch(name)
    if match is None or name == FABRIC:
        raise ValueError(
            f"wiring: {name!r} is not a name; use gpu0, gpu*, gpu0-3, nic0, or a switch such as nvswitch or plx1"
        )
    stem, numbers = match.groups()
    if numbers is None and stem not in counts:
        return [name]
    if numbers == "*" and stem not in counts:
        raise ValueError(f"wiring: {name!r} has no end, only gpu* and nic* have; write a range such as {stem}0-3")
    first, last = _range(numbers, counts.get(stem, 0))
    if stem in counts and not 0 <= first <= last < counts[stem]:
        raise ValueError(
            f"wiring: {name!r}, but a node has {counts[stem]} {stem}s; use {stem}*, or numbers below {counts[stem]}"
        )
    return [f"{stem}{number}" for number in range(first, last + 1)]


def _range(numbers: str | None, count: int) -> tuple[int, int]:
    if numbers is None:
        return -1, -1
    if numbers == "*":
        return 0, count - 1
    first, _, last = numbers.partition("-")
    return int(first), int(last or first)


def pairs(start: str, end: str, counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of names that a wire or link between two names of a wiring stands for. Raises ValueError."""
    starts, ends = expand(start, counts), expand(end, counts)
    if len(starts) == 1 or len(ends) == 1:
        return ((a, b) for a in starts for b in ends)
    if len(starts) != len(ends):
        raise ValueError(
            f"wiring: {start!r} is {len(starts)} names and {end!r} is {len(ends)}; "
            "use lists of equal length (one to one), or a single name on one side"
        )
    return zip(starts, ends, strict=True)


def _merged(
    wiring: Sequence[WireSpec], links: Mapping[str, LinkSpec], *, counts: Mapping[str, int]
) -> dict[tuple[str, str], tuple[str, int]]:
    wires: dict[tuple[str, str], tuple[str, int]] = {}
    for wire in wiring:
        if wire.link not in links:
            raise ValueError(f"wiring: {unknown_name('link', wire.link, links)}")
        for a, b in pairs(wire.start, wire.end, counts):
            pair = (b, a) if (b, a) in wires else (a, b)
            kind, already = wires.get(pair, (wire.link, 0))
            if a == b or kind != wire.link:
                other = "itself" if a == b else f"{b} by {kind} already"
                raise ValueError(
                    f"wiring: {a} is wired to {other}; remove the {wire.link} wire, or put a switch between"
                )
            wires[pair] = wire.link, already + wire.count
    return wires


def _check_used(wires: Mapping[tuple[str, str], tuple[str, int]], links: Mapping[str, LinkSpec]) -> None:
    unused = sorted(set(links) - {kind for kind, _ in wires.values()})
    if unused:
        raise ValueError(f"links: {unused[0]!r} has no effect, because no wire uses it; remove it or wire it")


def _neighbours(
    wires: Mapping[tuple[str, str], tuple[str, int]],
    links: Mapping[str, LinkSpec],
    dead: frozenset[int] = frozenset(),
) -> _Neighbours:
    # Whole numbers, because sums of 1 / bandwidth in another order would break ties by rounding.
    found: _Neighbours = {}
    for number, ((a, b), (kind, count)) in enumerate(wires.items()):
        if number in dead:
            continue
        cost = max(1, round(1e21 / (links[kind].usable_bytes_per_s * count)))
        found.setdefault(a, []).append((b, 2 * number, cost))
        found.setdefault(b, []).append((a, 2 * number + 1, cost))
    return found


class _Routes:
    """The shortest routes from one GPU, those that need relays worked out only when one is asked for."""

    def __init__(self, neighbours: _Neighbours, source: str) -> None:
        self._neighbours, self._source = neighbours, source
        self._direct = _shortest(neighbours, source, relays="never")
        self._others: dict[_Relays, dict[str, _Found]] = {}

    def to(self, target: str) -> _Route:
        """The route; raises ValueError where there is none."""
        route = self.find(target)
        if route is None:
            raise ValueError(
                f"wiring: no wires lead from {self._source} to {target}; wire both to the same switch, or to each other"
            )
        return route

    def find(self, target: str, *, by_fastest: bool = False) -> _Route | None:
        """The route, or None; `by_fastest` counts no relays through GPUs."""
        if by_fastest:
            found = self._by("gpus").get(target)
        else:
            found = self._direct.get(target) or self._by("if needed").get(target)
        return found[1] if found else None

    def nearest(self, targets: Sequence[str]) -> list[int]:
        """Which of the targets are equally near, and nearer than the rest; empty where none can be reached."""
        found = _lengths(self._direct, targets) or _lengths(self._by("if needed"), targets)
        return [index for index, length in found.items() if length == min(found.values())]

    def _by(self, relays: _Relays) -> dict[str, _Found]:
        if relays not in self._others:
            self._others[relays] = _shortest(self._neighbours, self._source, relays=relays)
        return self._others[relays]


def _lengths(reached: Mapping[str, _Found], targets: Sequence[str]) -> dict[int, _Length]:
    return {index: reached[name][0] for index, name in enumerate(targets) if name in reached}


def _shortest(neighbours: _Neighbours, source: str, *, relays: _Relays) -> dict[str, _Found]:
    """Dijkstra's algorithm on (relays, cost, links, route); with "gpus", relaying through a GPU counts nothing."""
    reached: dict[str, _Found] = {}
    heap: list[tuple[_Length, _Route, str]] = [((0, 0, 0), (), source)]
    while heap:
        length, route, name = heapq.heappop(heap)
        if name in reached:
            continue
        reached[name] = length, route
        relay = name != source and name.startswith(("gpu", "nic"))
        if relay and (relays == "never" or (relays == "gpus" and name.startswith("nic"))):
            continue
        for other, link, cost in neighbours.get(name, ()):
            if other not in reached:
                step = (length[0] + (relay and relays == "if needed"), length[1] + cost, length[2] + 1)
                heapq.heappush(heap, (step, (*route, link), other))
    return reached


def _nearest_nic(routes: _Routes, gpu: int, nics: Sequence[int]) -> int:
    """The nearest of the NICs, -1 where none can be reached."""
    nearest = [nics[index] for index in routes.nearest([f"nic{nic}" for nic in nics])]
    if not nearest:
        return -1
    return gpu if gpu in nearest else nearest[gpu % len(nearest)]


def _back(route: _Route) -> _Route:
    return tuple(link ^ 1 for link in reversed(route))


def _table(routes: Mapping[Any, _Route], shape: tuple[int, ...]) -> IntArray:
    table = np.full((*shape, max(map(len, routes.values()), default=0)), -1, dtype=np.int32)
    for row, route in routes.items():
        table[row][: len(route)] = route
    return read_only(table)


def _padded(routes: Sequence[_Route]) -> IntArray:
    return _table({(row,): route for row, route in enumerate(routes)}, (len(routes),))


def _local_table(routes: Mapping[tuple[int, int], _Route], num_gpus: int) -> IntArray:
    both = {**routes, **{(b, a): _back(route) for (a, b), route in routes.items()}}
    return _table(both, (num_gpus, num_gpus))


def _link_table(
    wires: Mapping[tuple[str, str], tuple[str, int]],
    links: Mapping[str, LinkSpec],
    *,
    nic: NicSpec | None,
    fabric_latency_s: float,
) -> _LinkTable:
    """Both ways of every wire, then of every NIC's port. A link that leaves a switch pays the switch's latency."""
    rows: list[tuple[tuple[str, str], str, float, float]] = []
    for (a, b), (kind, count) in wires.items():
        link = links[kind]
        rows += [(ends, kind, link.usable_bytes_per_s * count, link.latency_s) for ends in ((a, b), (b, a))]
    for k in range(nic.per_node if nic else 0):
        assert nic is not None
        rows.append(((f"nic{k}", FABRIC), "nic", nic.usable_bytes_per_s, nic.latency_s))
        rows.append(((FABRIC, f"nic{k}"), "nic", nic.usable_bytes_per_s, nic.latency_s + fabric_latency_s))
    return {
        "ends_B": tuple(row[0] for row in rows),
        "kind_B": tuple(row[1] for row in rows),
        "bandwidth_bytes_per_s_B": read_only(np.array([row[2] for row in rows], dtype=np.float64)),
        "latency_s_B": read_only(np.array([row[3] for row in rows], dtype=np.float64)),
    }
