"""Flows on links that they share max-min fairly: when each of them ends.

Axes: F flow, K link, I place in the list of all flows' links.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.program import Floats, Ints
from moeplan.errors import SimulationError
from moeplan.network.classes import classes_of
from moeplan.network.events import solve
from moeplan.network.levels import FLOW, LINK, Net
from moeplan.network.systems import Part, first_loop, needed, parts_of

Ints32 = NDArray[np.int32]
TABLE_LINKS = 4096
"""Up to so many links, who shares flows with whom is kept in a table; beyond, it would take more than 32 MB."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FlowSet:
    """Flows with their paths. Flow f crosses the links `link_I[first_F1[f]:first_F1[f + 1]]`.

    Weights default to 1 (a flow's rate is weight x level), starts to 0, rate caps to none (infinity is none, too).
    `times_I` is for classes of flows: how many flows of the class cross one link of the class.
    Raises SimulationError for what cannot be: arrays that do not fit together, capacities, weights or caps that are
    not above 0, sizes or starts that are negative or not finite, links that do not exist, a flow that crosses a link
    twice, or one with neither a link nor a cap.
    """

    capacity_bytes_per_s_K: Floats
    link_I: Ints32
    first_F1: Ints
    size_bytes_F: Floats
    start_s_F: Floats | None = None
    weight_F: Floats | None = None
    rate_cap_bytes_per_s_F: Floats | None = None
    times_I: Floats | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.size_bytes_F)

    @property
    def starts_s_F(self) -> Floats:
        """When each flow starts."""
        return np.zeros(len(self)) if self.start_s_F is None else self.start_s_F


def _check(flows: FlowSet) -> None:
    num_flows, first_F1 = len(flows), flows.first_F1
    _law(
        len(first_F1) == num_flows + 1 and first_F1[0] == 0 and first_F1[-1] == len(flows.link_I)
        and bool((np.diff(first_F1) >= 0).all()),
        f"first_F1 does not cut {len(flows.link_I)} links into {num_flows} paths; give each one's begin, and the end",
    )  # fmt: skip
    _all("capacity", flows.capacity_bytes_per_s_K, len(flows.capacity_bytes_per_s_K), above=True)
    _all("size", flows.size_bytes_F, num_flows, above=False)
    _all("start", flows.start_s_F, num_flows, above=False)
    _all("weight", flows.weight_F, num_flows, above=True)
    _all("rate cap", flows.rate_cap_bytes_per_s_F, num_flows, above=True, finite=False)
    if len(flows.link_I):
        low, high = int(flows.link_I.min()), int(flows.link_I.max())
        count = len(flows.capacity_bytes_per_s_K)
        _law(low >= 0 and high < count, f"a path has link {low if low < 0 else high}; there are links 0 to {count - 1}")
    twice = first_loop(first_F1, flows.link_I)
    _law(twice < 0, f"flow {twice} crosses a link twice; paths have no loops")
    empty_F = (np.diff(first_F1) == 0) & (flows.size_bytes_F > 0)
    if flows.rate_cap_bytes_per_s_F is not None:
        empty_F &= ~np.isfinite(flows.rate_cap_bytes_per_s_F)
    _law(not empty_F.any(), "a flow has neither a link nor a rate cap, so nothing limits it; leave it out")


def _all(name: str, values: Floats | None, count: int, *, above: bool, finite: bool = True) -> None:
    if values is None:
        return
    _law(len(values) == count, f"{len(values)} values of {name} for {count}; give one for each")
    good = values > 0 if above else values >= 0
    if finite:
        good &= np.isfinite(values)
    if not good.all():
        where = int(np.flatnonzero(~good)[0])
        least = "above 0" if above else "0 or more"
        _law(False, f"{name} {where} is {values[where]}; it must be a number {least}")


def _law(holds: bool, broken: str) -> None:
    if not holds:
        raise SimulationError(f"flows: {broken}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Finishes:
    """When each flow ends. `size_change` is by what share of its size a flow got more or less than it asked for, at
    most: 0 in exact runs. `finish_s_F` is the exact answer for sizes changed so much.
    """

    finish_s_F: Floats
    events: int
    size_change: float = 0.0


def finish_times(flows: FlowSet, *, tolerance: float = 0.0, lump: bool = True) -> Finishes:
    """When each flow ends: exactly, or with ends batched within `tolerance` of the time since the first start.

    Flows that nothing tells apart are worked out once (`lump`), parts that share no link by themselves. A flow without
    bytes ends as it starts. Raises SimulationError for a tolerance that is not from 0 to 1.
    """
    _law(0 <= tolerance < 1, f"tolerance {tolerance} is not a share from 0 to 1, such as 0.01")
    moving_F = flows.size_bytes_F > 0
    if not moving_F.all():
        some = finish_times(_chosen(flows, moving_F), tolerance=tolerance, lump=lump)
        finish_s_F = flows.starts_s_F.copy()
        finish_s_F[moving_F] = some.finish_s_F
        return replace(some, finish_s_F=finish_s_F)
    found = _classes(flows) if lump and flows.times_I is None else None
    if found is None:
        return _by_part(flows, tolerance)
    classes, class_F = found
    each = _by_part(classes, tolerance)
    return replace(each, finish_s_F=each.finish_s_F[class_F])


def _chosen(flows: FlowSet, kept_F: NDArray[np.bool_]) -> FlowSet:
    """Some of the flows."""
    lengths = np.diff(flows.first_F1)

    def of(values: Floats | None) -> Floats | None:
        return None if values is None else values[kept_F]

    return FlowSet(
        capacity_bytes_per_s_K=flows.capacity_bytes_per_s_K, link_I=flows.link_I[np.repeat(kept_F, lengths)],
        first_F1=np.concatenate([[0], np.cumsum(lengths[kept_F])]), size_bytes_F=flows.size_bytes_F[kept_F],
        start_s_F=of(flows.start_s_F), weight_F=of(flows.weight_F),
        rate_cap_bytes_per_s_F=of(flows.rate_cap_bytes_per_s_F),
        times_I=None if flows.times_I is None else flows.times_I[np.repeat(kept_F, lengths)],
    )  # fmt: skip


def _classes(flows: FlowSet) -> tuple[FlowSet, Ints] | None:
    """One flow of each class, and the class of each flow."""
    given = (flows.size_bytes_F, flows.start_s_F, flows.weight_F, flows.rate_cap_bytes_per_s_F)
    features = tuple(feature for feature in given if feature is not None)
    found = classes_of(flows.first_F1, flows.link_I, flows.capacity_bytes_per_s_K, features_F=features)
    if found is None:
        return None

    def of(values: Floats | None) -> Floats | None:
        return None if values is None else values[found.flow_C]

    classes = FlowSet(
        capacity_bytes_per_s_K=flows.capacity_bytes_per_s_K[found.link_K], link_I=found.link_I,
        first_F1=found.first_C1, size_bytes_F=flows.size_bytes_F[found.flow_C], start_s_F=of(flows.start_s_F),
        weight_F=of(flows.weight_F), rate_cap_bytes_per_s_F=of(flows.rate_cap_bytes_per_s_F), times_I=found.times_I,
    )  # fmt: skip
    return classes, found.class_F


def _by_part(flows: FlowSet, tolerance: float) -> Finishes:
    finish_F, events, change = np.zeros(len(flows)), 0, 0.0
    whole = _with_caps(_needed(flows))
    for part in parts_of(whole.first_F1, whole.link_I, len(whole.capacity_K), flows.starts_s_F):
        net = _net(flows, whole, part)
        ends = np.empty(len(part.flow_F))
        each, worst = solve(net, ends, tolerance)
        finish_F[part.flow_F] = ends
        events, change = events + each, max(change, worst)
    return Finishes(finish_s_F=finish_F, events=events, size_change=change)


def _needed(flows: FlowSet) -> FlowSet:
    """The flows without the links that cannot hold any of them up."""
    times_I = np.zeros(0) if flows.times_I is None else flows.times_I
    kept_I = needed(flows.first_F1, flows.link_I, times_I, flows.capacity_bytes_per_s_K)[flows.link_I]
    if kept_I.all():
        return flows
    return replace(
        flows, link_I=flows.link_I[kept_I], first_F1=np.concatenate([[0], np.cumsum(kept_I)])[flows.first_F1],
        times_I=None if flows.times_I is None else flows.times_I[kept_I],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Links:
    """All links, behind them one for each rate cap, and the flows' paths over both."""

    capacity_K: Floats
    is_cap_K: NDArray[np.bool_]
    first_F1: Ints
    link_I: Ints32
    times_I: Floats


def _with_caps(flows: FlowSet) -> _Links:
    capacity_K, cap_F = flows.capacity_bytes_per_s_K, flows.rate_cap_bytes_per_s_F
    times_I = np.zeros(0) if flows.times_I is None else flows.times_I
    if cap_F is None:
        none = np.zeros(len(capacity_K), bool)
        return _Links(
            capacity_K=capacity_K, is_cap_K=none, first_F1=flows.first_F1, link_I=flows.link_I, times_I=times_I
        )
    # A flow of weight w whose rate is capped at c is held at the level c / w.
    level_F = cap_F if flows.weight_F is None else cap_F / flows.weight_F
    capped_F = np.isfinite(level_F)
    levels, which = np.unique(level_F[capped_F], return_inverse=True)
    ends = flows.first_F1[1:][capped_F]
    return _Links(
        capacity_K=np.concatenate([capacity_K, levels]),
        is_cap_K=np.arange(len(capacity_K) + len(levels)) >= len(capacity_K),
        first_F1=flows.first_F1 + np.concatenate([[0], np.cumsum(capped_F)]),
        link_I=np.insert(flows.link_I, ends, (which + len(capacity_K)).astype(np.int32)),
        times_I=np.insert(times_I, ends, 1.0) if len(times_I) else times_I,
    )


def _net(flows: FlowSet, whole: _Links, part: Part) -> Net:
    count, width = len(part.flow_F), len(part.link_K)
    crossing_K = np.bincount(part.link_I, minlength=width)
    links, each = np.zeros(width, LINK), np.zeros(count, FLOW)
    links["capacity"], links["is_cap"] = whole.capacity_K[part.link_K], whole.is_cap_K[part.link_K]
    links["room"] = np.cumsum(crossing_K) - crossing_K
    links["low"], links["high"], links["place"] = part.low_K, part.high_K, -1
    each["size"], each["start"] = flows.size_bytes_F[part.flow_F], flows.starts_s_F[part.flow_F]
    each["weight"] = 1.0 if flows.weight_F is None else flows.weight_F[part.flow_F]
    load_I = np.repeat(each["weight"], np.diff(part.first_F1))
    if len(whole.times_I):
        load_I *= whole.times_I[part.place_I]
    rows = width if width <= TABLE_LINKS else 0
    is_whole = count < 2**16 and len(whole.times_I) == 0 and flows.weight_F is None
    end_K = np.full(width, np.inf)
    return Net(
        links=links, flows=each, first_F1=part.first_F1.astype(np.uint64), link_I=part.link_I.astype(np.uint32),
        load_I=load_I, now=np.zeros(1), num_ordered=np.zeros(1, np.int64), order_K=np.zeros(width + 1, np.uint32),
        level_K=np.zeros(width), others_K=np.zeros(width), seen_K=np.zeros(width), limit_K=np.full(width, np.inf),
        end_K=end_K, end_bits_K=end_K.view(np.int64), tag_F=np.zeros(count), held=np.zeros(len(part.link_I), np.uint32),
        scratch=np.zeros(int(crossing_K.max(initial=1)), np.uint32),
        shared_KK=np.zeros((rows, rows), np.uint16 if is_whole else np.float64),
    )  # fmt: skip
