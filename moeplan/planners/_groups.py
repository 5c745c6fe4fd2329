"""The groups that position 0 of a stage is in, and the cheapest wires that the same groups of any stage could have."""

from __future__ import annotations

from functools import lru_cache
from math import lcm
from typing import NamedTuple

from moeplan.domain.cluster import Cluster
from moeplan.partition.route import Load
from moeplan.planners._prices import Prices, hottest
from moeplan.planners._space import Branch, Layout
from moeplan.planners._wires import Wire, least_of


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


def ranks_of(grid: Grid, axis: str, stage: int) -> tuple[int, ...]:
    """The group of position 0 of a stage along an axis."""
    block = grid.block
    return tuple(q % block + block * (stage + grid.pp * (q // block)) for q in positions(grid, axis))


def _offsets(grid: Grid, cluster: Cluster) -> list[int]:
    """Stages whose GPUs lie differently among nodes and leaves; every stage where that cannot be told from the
    offset.
    """
    period = _period(cluster)
    if period is None:
        return list(range(grid.pp))
    return list({grid.block * stage % period: stage for stage in reversed(range(grid.pp))}.values())


@lru_cache(maxsize=64)
def _period(cluster: Cluster) -> int | None:
    """After how many ranks the cluster repeats."""
    return cluster.alike_block


def cheapest(prices: Prices, grid: Grid, axis: str, algorithm: str = "ring") -> Wire:
    """The least latency and the least seconds per byte of the group along an axis in any stage."""
    key = (
        "cheapest",
        axis == "ep",
        positions(grid, axis),
        grid.block,
        grid.pp,
        grid.copies if axis in ("dense", "edp") else 1,
        algorithm,
    )
    if key not in prices.cache:
        prices.cache[key] = least_of(
            [_wire(prices, grid, axis, stage, algorithm) for stage in _offsets(grid, prices.scenario.cluster)]
        )
    return prices.cache[key]  # type: ignore[return-value]


def _wire(prices: Prices, grid: Grid, axis: str, stage: int, algorithm: str) -> Wire:
    members = ranks_of(grid, axis, stage)
    if axis == "ep":
        return prices.all_to_all(members, algorithm)
    if axis in ("dense", "edp") and grid.copies > 1:
        members += ranks_of(grid, axis, grid.pp - 1 - stage)
    return prices.ring(members)


def send_wire(prices: Prices, layout: Layout) -> Wire:
    """The cheapest send between neighbouring pipeline ranks."""
    grid = grid_of(layout)
    key = ("send", grid.block, grid.pp)
    if key not in prices.cache:
        pairs = {(a, a + 1) for a in range(grid.pp - 1)} | ({(grid.pp - 1, 0)} if grid.pp > 1 else {(0, 0)})
        wires = [prices.send(grid.block * a, grid.block * b) for a, b in sorted(pairs) if a != b]
        prices.cache[key] = least_of(wires) if wires else Wire()
    return prices.cache[key]  # type: ignore[return-value]


def even_wire(prices: Prices, grid: Grid, algorithm: str, micro_batch: int, moe: int) -> Wire:
    """Dispatch or combine of a layer with experts, all places alike, at the stage where it is cheapest."""
    if not prices.counts_copies(algorithm):
        return cheapest(prices, grid, "ep", algorithm)
    degrees = (grid.ep, grid.etp, grid.tp, grid.cp)
    key = ("even", positions(grid, "ep"), grid.block, grid.pp, *degrees, algorithm, micro_batch, moe)
    if key not in prices.cache:
        load = prices.load(*degrees, micro_batch)[1]
        assert load is not None
        ways = [ranks_of(grid, "ep", stage) for stage in _offsets(grid, prices.scenario.cluster)]
        prices.cache[key] = least_of(
            prices.all_to_all(members, algorithm, prices.reach(load, moe, members, algorithm)) for members in ways
        )
    return prices.cache[key]  # type: ignore[return-value]


def even_wires(prices: Prices, grid: Grid, branch: Branch) -> list[Wire]:
    """Of every algorithm of a branch; of one that counts copies for each micro-batch and kind of layer."""
    layers = [kind.moe for kind in prices.kinds[0] if kind.layer.is_moe]
    counting = [(size, moe) for size in branch.micro_batch for moe in layers]
    return [
        even_wire(prices, grid, algorithm, size, moe)
        for algorithm in branch.all_to_all
        for size, moe in (counting if prices.counts_copies(algorithm) else counting[:1])
    ]


def uneven_wires(prices: Prices, grid: Grid, algorithm: str, load: Load, moe: int) -> tuple[Wire, ...]:
    """Dispatch until all are done, and until the hottest place has its own; combine until all, and until one is done.

    Each at the stage where it is cheapest.
    """
    share_GG = load.traffic(moe)[1]
    if share_GG is None:
        return (cheapest(prices, grid, "ep", algorithm),) * 4
    content = id(load) if prices.counts_copies(algorithm) else share_GG.tobytes()
    key = ("uneven", positions(grid, "ep"), grid.block, grid.pp, algorithm, moe, content)
    if key not in prices.cache:
        place = hottest(load, moe)
        groups = [ranks_of(grid, "ep", stage) for stage in _offsets(grid, prices.scenario.cluster)]
        ways = [
            prices.uneven(members, algorithm, share_GG, prices.reach(load, moe, members, algorithm), place=place)
            for members in groups
        ]
        prices.cache[key] = tuple(least_of(way) for way in zip(*ways, strict=True))
    return prices.cache[key]  # type: ignore[return-value]
