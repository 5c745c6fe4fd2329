"""The groups that position 0 of a stage is in, and the cheapest wires that the same groups of any stage could have."""

from __future__ import annotations

from functools import lru_cache
from math import lcm
from typing import NamedTuple

from moeplan.domain.cluster import Cluster
from moeplan.partition.route import Load
from moeplan.planners._prices import Prices, Wire, hottest
from moeplan.planners._space import Layout


class Grid(NamedTuple):
    """What the groups of a layout depend on; layouts of one grid share them."""

    tp: int
    cp: int
    dp: int
    ep: int
    etp: int
    edp: int
    far: bool
    """Replicas are neighbours, and experts far apart."""
    block: int
    pp: int
    copies: int


def grid_of(layout: Layout) -> Grid:
    """The grid of a layout. Without blocks only the stages' offsets depend on pp."""
    stage_size = layout.dp * layout.tp * layout.cp
    inside = layout.rank_order == "tp-cp-ep-pp-dp"
    block = lcm(layout.tp * layout.cp, layout.etp * layout.ep) if inside else stage_size
    return Grid(
        tp=layout.tp, cp=layout.cp, dp=layout.dp, ep=layout.ep, etp=layout.etp,
        edp=stage_size // (layout.ep * layout.etp), far=layout.rank_order == "tp-cp-dp-ep-pp", block=block,
        pp=layout.pp, copies=layout.copies,
    )  # fmt: skip


@lru_cache(maxsize=65536)
def positions(grid: Grid, axis: str) -> tuple[int, ...]:
    """Positions of the group of position 0 along an axis: tp, cp, dense (cp and dp), ep, etp, edp."""
    near = grid.etp * (grid.edp if grid.far else 1)
    replicas = grid.etp if grid.far else grid.etp * grid.ep
    stride, count = {
        "tp": (1, grid.tp), "cp": (grid.tp, grid.cp), "dense": (grid.tp, grid.cp * grid.dp),
        "etp": (1, grid.etp), "ep": (near, grid.ep), "edp": (replicas, grid.edp),
    }[axis]  # fmt: skip
    return tuple(range(0, stride * count, stride))


def _ranks(grid: Grid, axis: str, stage: int) -> tuple[int, ...]:
    block = grid.block
    return tuple(q % block + block * (stage + grid.pp * (q // block)) for q in positions(grid, axis))


def _offsets(grid: Grid, cluster: Cluster) -> list[int]:
    """Stages whose GPUs lie differently among nodes and leaves; every stage where that cannot be told from the
    offset.
    """
    fabric = cluster.spec.fabric
    if fabric is None or fabric.kind == "torus":
        return list(range(min(grid.pp, 16 if fabric else grid.pp)))
    period = cluster.gpus_per_node * (fabric.nodes_per_leaf or 1)
    return list({grid.block * stage % period: stage for stage in reversed(range(grid.pp))}.values())


def cheapest(prices: Prices, grid: Grid, axis: str, algorithm: str = "ring") -> Wire:
    """The least latency and the least seconds per byte of the group along an axis in any stage."""
    key = (
        "cheapest",
        positions(grid, axis),
        grid.block,
        grid.pp,
        grid.copies if axis in ("dense", "edp") else 1,
        algorithm,
    )
    if key not in prices.cache:
        prices.cache[key] = _least(
            [_wire(prices, grid, axis, stage, algorithm) for stage in _offsets(grid, prices.scenario.cluster)]
        )
    return prices.cache[key]  # type: ignore[return-value]


def _wire(prices: Prices, grid: Grid, axis: str, stage: int, algorithm: str) -> Wire:
    members = _ranks(grid, axis, stage)
    if axis == "ep":
        return prices.all_to_all(members, algorithm)
    if axis in ("dense", "edp") and grid.copies > 1:
        members += _ranks(grid, axis, grid.pp - 1 - stage)
    return prices.ring(members)


def _least(wires: list[Wire]) -> Wire:
    return Wire(latency_s=min(w.latency_s for w in wires), per_byte_s=min(w.per_byte_s for w in wires))


def send_wire(prices: Prices, layout: Layout) -> Wire:
    """The cheapest send between neighbouring pipeline ranks."""
    grid = grid_of(layout)
    key = ("send", grid.block, grid.pp)
    if key not in prices.cache:
        pairs = {(a, a + 1) for a in range(grid.pp - 1)} | ({(grid.pp - 1, 0)} if grid.pp > 1 else {(0, 0)})
        wires = [prices.send(grid.block * a, grid.block * b) for a, b in sorted(pairs) if a != b]
        prices.cache[key] = _least(wires) if wires else Wire(latency_s=0.0, per_byte_s=0.0)
    return prices.cache[key]  # type: ignore[return-value]


def uneven_wires(prices: Prices, grid: Grid, algorithm: str, load: Load, moe: int) -> tuple[Wire, ...]:
    """Dispatch until all are done, and until the hottest place has its own; combine until all, and until one is done.

    Each at the stage where it is cheapest.
    """
    share_GG = load.traffic(moe)[1]
    if share_GG is None:
        return (cheapest(prices, grid, "ep", algorithm),) * 4
    key = ("uneven", positions(grid, "ep"), grid.block, grid.pp, algorithm, moe, share_GG.tobytes())
    if key not in prices.cache:
        place = hottest(load, moe)
        ways = [
            prices.uneven(_ranks(grid, "ep", stage), algorithm, share_GG, place=place)
            for stage in _offsets(grid, prices.scenario.cluster)
        ]
        prices.cache[key] = tuple(_least(list(way)) for way in zip(*ways, strict=True))
    return prices.cache[key]  # type: ignore[return-value]
