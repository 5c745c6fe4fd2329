"""Events of fair sharing, compiled: flows start and end, and levels change. See `levels`."""

from __future__ import annotations

import numpy as np

from moeplan.domain.program import Floats, Ints
from moeplan.jit import compiled, inlined
from moeplan.network.levels import (
    TIE,
    Net,
    Numbers,
    as_number,
    balance,
    clock_of,
    held_by,
    hold,
    join,
    mark,
    path_of,
    pull,
    push,
    set_level,
    sift_down,
    sink,
    tell,
)

_REFRESH = 512
"""Events after which sums that were kept by adding and subtracting are summed anew."""
_FEW = 4
"""So many new flows, or fewer, are added one by one."""


@inlined
def _add(net: Net, flow: int) -> int:
    """A new flow is held by the first link of the order that it crosses, or else by the one with least room.

    Returns the first place that this changed.
    """
    _join_caps(net, flow)
    best, first, spare = as_number(0), np.int32(len(net.order_K)), np.inf
    for place in path_of(net, flow):
        link = net.link_I[place]
        net.links[link].crossing += 1
        mark(net, link)
        if 0 <= net.links[link].place < first:
            best, first = link, net.links[link].place
    if first == len(net.order_K):
        for place in path_of(net, flow):
            link = net.link_I[place]
            room = (net.links[link].capacity - net.others_K[link]) / net.load_I[place]
            if room < spare:
                best, spare = link, room
        join(net, best, max(spare, 0.0))
    net.flows[flow].holder = best
    net.tag_F[flow] = clock_of(net, best) + net.flows[flow].size / net.flows[flow].weight
    hold(net, flow, best, 1.0)
    push(net, best, flow)
    set_level(net, best)
    return sink(net, net.links[best].place)


@inlined
def _join_caps(net: Net, flow: int) -> None:
    """A cap that is the flow's stands in the order, though it hold nothing."""
    for place in path_of(net, flow):
        link = net.link_I[place]
        if net.links[link].is_cap and net.links[link].place < 0:
            join(net, link, net.links[link].capacity)
            sink(net, net.links[link].place)


@inlined
def _remove(net: Net, flow: int) -> None:
    """A flow has ended."""
    link = as_number(net.flows[flow].holder)
    pull(net, link, flow)
    hold(net, flow, link, -1.0)
    for place in path_of(net, flow):
        link = net.link_I[place]
        net.links[link].crossing -= 1
        net.seen_K[link] = np.nan
        mark(net, link)


@compiled
def _fill(net: Net, alive: Numbers) -> None:
    """Progressive filling from nothing for all flows of `alive`, whose tags say how much they have to get."""
    _empty(net)
    left, load = np.zeros(len(net.links)), np.zeros(len(net.links))
    for link in range(len(left)):
        left[link] = net.links[link].capacity
    for flow in alive:
        net.flows[flow].holder = -1
        for place in path_of(net, flow):
            link = net.link_I[place]
            net.held[net.links[link].room + net.links[link].crossing] = flow
            net.links[link].crossing += 1
            load[link] += net.load_I[place]
    unheld = np.zeros(len(net.links), np.int64)
    for link in range(len(unheld)):
        unheld[link] = net.links[link].crossing
    for _ in range(len(net.links)):
        link, level = _lowest(net, left, load, unheld)
        if link < 0:
            break
        _freeze(net, as_number(link), level, left, load, unheld)
    for link in range(len(unheld)):
        mark(net, link)
    for flow in alive:
        _join_caps(net, flow)


@inlined
def _empty(net: Net) -> None:
    net.num_ordered[0] = 0
    for number in range(len(net.links)):
        link = net.links[number]
        link.clock = link.weight = 0.0
        link.since = net.now[0]
        link.num = link.crossing = 0
        link.place = -1
    net.level_K[:] = net.others_K[:] = 0.0
    for number in range(len(net.shared_KK)):
        net.shared_KK[number, :] = 0


@inlined
def _lowest(net: Net, left: Floats, load: Floats, unheld: Ints) -> tuple[int, float]:
    """The link that is full first when all flows that are not held grow alike."""
    best, lowest = -1, np.inf
    for link in range(len(left)):
        if unheld[link] > 0:
            level = net.links[link].capacity if net.links[link].is_cap else max(left[link], 0.0) / load[link]
            if level < lowest:
                best, lowest = link, level
    return best, lowest


@inlined
def _freeze(net: Net, link: int, level: float, left: Floats, load: Floats, unheld: Ints) -> None:
    """`link` holds all that crosses it and is not held yet."""
    join(net, link, level)
    base = net.links[link].room
    for spot in range(base, base + net.links[link].crossing):
        flow = net.held[spot]
        if net.flows[flow].holder >= 0:
            continue
        net.flows[flow].holder = link
        hold(net, flow, link, 1.0)
        net.held[base + net.links[link].num] = flow
        net.flows[flow].spot = net.links[link].num
        net.links[link].num += 1
        for place in path_of(net, flow):
            other = net.link_I[place]
            left[other] -= level * net.load_I[place]
            load[other] -= net.load_I[place]
            unheld[other] -= 1
    for spot in range(net.links[link].num // 2, -1, -1):
        if spot < net.links[link].num:
            sift_down(net, link, spot)
    net.links[link].tag = net.tag_F[net.held[base]]


@compiled
def _alive(net: Net, first: int, last: int) -> Numbers:
    """All flows that are held, with what they still have to get as their tags, and those from `first` to `last`."""
    count = last - first
    for place in range(net.num_ordered[0]):
        count += net.links[net.order_K[place]].num
    found, number = np.empty(count, np.uint32), 0
    for place in range(net.num_ordered[0]):
        link = net.order_K[place]
        clock = clock_of(net, link)
        for spot in held_by(net, link):
            flow = net.held[spot]
            net.tag_F[flow] -= clock
            found[number] = flow
            number += 1
    for flow in range(first, last):
        net.tag_F[flow] = net.flows[flow].size / net.flows[flow].weight
        found[number] = flow
        number += 1
    return found


@inlined
def _refresh(net: Net) -> None:
    """Sums up anew what other links hold of each link."""
    net.others_K[:] = 0.0
    for place in range(net.num_ordered[0]):
        link = net.order_K[place]
        tell(net, link, net.level_K[link])


# ---- time


@inlined
def _next_end(net: Net) -> float:
    """When the first flow of all ends."""
    first = net.end_bits_K[0]
    for link in range(np.uint64(len(net.end_bits_K))):
        first = min(first, net.end_bits_K[link])
    for link in range(len(net.end_bits_K)):
        if net.end_bits_K[link] == first:
            return float(net.end_K[link])
    return np.inf


@inlined
def _end_all(net: Net, until: float, finish_F: Floats) -> tuple[int, float]:
    """Ends the flows that are done by `until`; the lowest place that lost one, and the largest error of a size.

    A flow that would end at another time than now keeps that end; what it gets too much or too little is the error.
    """
    lowest, worst = net.num_ordered[0], 0.0
    for link in range(np.uint64(len(net.end_K))):
        while net.end_K[link] <= until:
            flow = net.held[net.links[link].room]
            finish_F[flow] = net.end_K[link]
            change = abs(finish_F[flow] - net.now[0]) * net.level_K[link] * net.flows[flow].weight
            worst = max(worst, change / net.flows[flow].size)
            lowest = min(lowest, net.links[link].place)
            _remove(net, flow)
    return lowest, worst


@compiled
def solve(net: Net, finish_F: Floats, tolerance: float) -> tuple[int, float]:
    """Fills in when each flow ends; returns events, and by what share a flow's size was changed at most.

    With a `tolerance` above 0, flows that end within that share of the time since the first start share one event in
    the middle between them, each with its own end.
    """
    num_flows, started, events, worst = len(net.flows), 0, 0, 0.0
    origin = net.flows[0].start if num_flows else 0.0
    while True:
        first = _next_end(net)
        if started == num_flows and first == np.inf:
            return events, worst
        start = net.flows[started].start if started < num_flows else np.inf
        span = tolerance * (first - origin) if first < np.inf else 0.0
        until = min(first + max(span, TIE * first), start) if first <= start else start * (1.0 + TIE)
        net.now[0] = start if first > start else (first if span == 0.0 else 0.5 * (first + until))
        if first <= until:
            lowest, change = _end_all(net, until, finish_F)
            worst = max(worst, change)
            balance(net, lowest)
        started = _start_all(net, started)
        events += 1
        if events % _REFRESH == 0:
            _refresh(net)


@compiled
def _start_all(net: Net, started: int) -> int:
    """Adds the flows that start now; how many have started."""
    last, now = started, net.now[0] * (1.0 + TIE)
    while last < len(net.flows) and net.flows[last].start <= now:
        last += 1
    if last - started > _FEW:
        _fill(net, _alive(net, started, last))
    else:
        for flow in range(started, last):
            balance(net, _add(net, as_number(flow)))
    return last
