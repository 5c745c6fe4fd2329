"""Exact max-min sharing from event to event, compiled: what each finish or start changes, and nothing else.

Every flow is *held* by one link of its path, the one with the lowest *level* (bytes per second and weight); all flows
that a link holds get its level. So a link needs one service clock, and a flow ends when the clock of its link reaches
the flow's tag. A link that holds nothing is not full. An event changes levels from its own link upwards:

    level[l] = (capacity[l] - sum over links m of level[m] * shared[m, l]) / weight that l holds

where `shared[m, l]` is the weight of the flows that m holds and that cross l. Links stand in the order of their levels.
Where a change reverses two neighbours, the flows that cross both change hands: this insertion sort is progressive
filling (Bertsekas, Gallager, "Data Networks", 1992, section 6.5.2), started from its last answer.

Links with a fixed level are rate caps: all flows of one cap are held by one such link.
Axes: F flow, K link, I place in the list of all flows' links.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeplan.jit import compiled_in_place

Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Floats = NDArray[np.float64]

TIE = 1e-13
"""Levels, and ends, that differ by less than this share are the same."""
_FLOWS_PER_ROW = 128
"""A row of the table takes as long as so many times fewer flows, one by one."""
_OVER = 1e-11
"""By this share a link may seem to carry more than its capacity through rounding."""


LINK = np.dtype(
    [
        ("capacity", "f8"), ("level", "f8"),
        ("clock", "f8"), ("since", "f8"),  # the clock showed `clock` at the time `since`
        ("weight", "f8"),  # of what it holds
        ("end", "f8"),  # of the first flow that it holds; below 0 if that has to be worked out
        ("seen_others", "f8"), ("seen_weight", "f8"),  # what the level was worked out from
        ("room", "i8"), ("num", "i8"),  # it holds held[room: room + num], a heap by tag
        ("crossing", "i8"),  # flows that cross it, wherever they are held
        ("place", "i8"),  # in the order, or -1
        ("low", "i8"), ("high", "i8"),  # links that share flows with it lie between
        ("is_cap", "?"),
    ],
    align=True,
)  # fmt: skip
FLOW = np.dtype(
    [
        ("first", "i8"), ("last", "i8"),  # its links are link_I[first: last]
        ("size", "f8"), ("start", "f8"), ("weight", "f8"),
        ("holder", "i4"), ("spot", "i4"),  # the link that holds it, and where in that heap
    ],
    align=True,
)  # fmt: skip


class Net(NamedTuple):
    """Flows in the order of their starts, their links, and how all of them stand at `now[0]`.

    Records and few arrays, because a compiled call takes an array as seven numbers.
    """

    links: Any
    flows: Any
    link_I: Ints32
    times_I: Floats
    """How often a class of flows crosses a link; empty where each flow stands for itself."""
    now: Floats
    counter: Ints
    """How many links stand in the order; how many are in `suspects`; whether any other may be too full."""
    order_K: Ints
    """Links that hold flows, by rising level."""
    others_K: Floats
    """Bytes per second of the flows that cross a link and are held elsewhere."""
    tag_F: Floats
    held: Ints32
    scratch: Ints32
    suspects: Ints
    """Links that hold nothing and may carry more than they can, some of them twice."""
    shared_KK: Any
    """Weight of the flows that one link holds and that cross another; no rows where links are too many for a table."""


@compiled_in_place
def clock_of(net: Net, link: int) -> float:
    elapsed = net.now[0] - net.links[link].since
    return float(net.links[link].clock + net.links[link].level * elapsed)


@compiled_in_place
def load_of(net: Net, flow: int, place: int) -> float:
    """What a flow's level is multiplied with on a link of its path."""
    if len(net.times_I) == 0:
        return float(net.flows[flow].weight)
    return float(net.flows[flow].weight * net.times_I[place])


# ---- heaps by tag


@compiled_in_place
def _sift_up(net: Net, link: int, spot: int) -> None:
    base, held, tag = net.links[link].room, net.held, net.tag_F
    flow = held[base + spot]
    while spot > 0:
        above = (spot - 1) >> 1
        if tag[held[base + above]] <= tag[flow]:
            break
        held[base + spot] = held[base + above]
        net.flows[held[base + spot]].spot = spot
        spot = above
    held[base + spot] = flow
    net.flows[flow].spot = spot


@compiled_in_place
def sift_down(net: Net, link: int, spot: int) -> None:
    base, held, tag, size = net.links[link].room, net.held, net.tag_F, net.links[link].num
    flow = held[base + spot]
    while True:
        below = 2 * spot + 1
        if below >= size:
            break
        if below + 1 < size and tag[held[base + below + 1]] < tag[held[base + below]]:
            below += 1
        if tag[flow] <= tag[held[base + below]]:
            break
        held[base + spot] = held[base + below]
        net.flows[held[base + spot]].spot = spot
        spot = below
    held[base + spot] = flow
    net.flows[flow].spot = spot


@compiled_in_place
def push(net: Net, link: int, flow: int) -> None:
    spot = net.links[link].num
    net.held[net.links[link].room + spot] = flow
    net.links[link].num += 1
    net.links[link].end = -1.0
    _sift_up(net, link, spot)


@compiled_in_place
def pull(net: Net, link: int, flow: int) -> None:
    base, spot = net.links[link].room, net.flows[flow].spot
    net.links[link].num -= 1
    net.links[link].end = -1.0
    last = net.held[base + net.links[link].num]
    if last != flow:
        net.held[base + spot] = last
        net.flows[last].spot = spot
        _sift_up(net, link, spot)
        sift_down(net, link, net.flows[last].spot)


# ---- who holds a flow


@compiled_in_place
def hold(net: Net, flow: int, link: int, sign: float) -> None:
    """Counts a flow that `link` holds (sign 1), or holds no more (sign -1), on all its links."""
    level, rows = net.links[link].level, len(net.shared_KK) > 0
    for place in range(net.flows[flow].first, net.flows[flow].last):
        other, load = net.link_I[place], sign * load_of(net, flow, place)
        if other == link:
            net.links[link].weight += load
            continue
        net.others_K[other] += load * level
        _suspect(net, other)
        if rows:
            net.shared_KK[link, other] += load


@compiled_in_place
def _take(net: Net, flow: int, giver: int, taker: int) -> None:
    """A flow goes from the link that held it to another of its path."""
    left = net.tag_F[flow] - clock_of(net, giver)
    pull(net, giver, flow)
    hold(net, flow, giver, -1.0)
    net.flows[flow].holder = taker
    net.tag_F[flow] = clock_of(net, taker) + left
    hold(net, flow, taker, 1.0)
    push(net, taker, flow)


@compiled_in_place
def _crosses(net: Net, flow: int, link: int) -> bool:
    found = False
    for place in range(net.flows[flow].first, net.flows[flow].last):
        found |= net.link_I[place] == link
    return found


@compiled_in_place
def _take_shared(net: Net, giver: int, taker: int) -> None:
    """What `giver` holds and crosses `taker` goes to `taker`."""
    if len(net.shared_KK) > 0 and net.shared_KK[giver, taker] == 0:
        return
    base, found = net.links[giver].room, 0
    for spot in range(base, base + net.links[giver].num):
        if _crosses(net, net.held[spot], taker):
            net.scratch[found] = net.held[spot]
            found += 1
    for number in range(found):
        _take(net, net.scratch[number], giver, taker)


# ---- levels


@compiled_in_place
def set_level(net: Net, link: int) -> None:
    """The level that uses up the link's capacity, or its fixed one; links that share its flows are told."""
    others, weight = net.others_K[link], net.links[link].weight
    if others == net.links[link].seen_others and weight == net.links[link].seen_weight:
        return
    net.links[link].seen_others, net.links[link].seen_weight = others, weight
    level = net.links[link].capacity if net.links[link].is_cap else (net.links[link].capacity - others) / weight
    change = level - net.links[link].level
    if change == 0.0:
        return
    net.links[link].clock = clock_of(net, link)
    net.links[link].since = net.now[0]
    net.links[link].level = level
    net.links[link].end = -1.0
    tell(net, link, change)


@compiled_in_place
def _suspect(net: Net, link: int) -> None:
    """Remembers a link that holds nothing if it carries too much now."""
    if net.links[link].num == 0 and net.others_K[link] > net.links[link].capacity and net.links[link].crossing > 0:
        if net.counter[1] < len(net.suspects):
            net.suspects[net.counter[1]] = link
            net.counter[1] += 1
        else:
            net.counter[2] = 1


@compiled_in_place
def tell(net: Net, link: int, change: float) -> None:
    """Others learn by how much the level of a link that holds some of their flows has changed."""
    width = net.links[link].high - net.links[link].low
    if len(net.shared_KK) > 0 and net.links[link].num * _FLOWS_PER_ROW > width:
        others, shared = net.others_K, net.shared_KK
        net.counter[2] = 1
        # Unsigned, because only then the loop becomes vector instructions.
        for other in range(np.uint64(net.links[link].low), np.uint64(net.links[link].high)):
            others[other] += change * shared[link, other]
    else:
        _tell_flows(net, link, change)


@compiled_in_place
def _tell_flows(net: Net, link: int, change: float) -> None:
    base = net.links[link].room
    for spot in range(base, base + net.links[link].num):
        flow = net.held[spot]
        for place in range(net.flows[flow].first, net.flows[flow].last):
            other = net.link_I[place]
            if other != link:
                net.others_K[other] += change * load_of(net, flow, place)
                _suspect(net, other)


@compiled_in_place
def raise_levels(net: Net, place: int) -> None:
    """Sets the levels of all links from a place of the order on, and keeps the order."""
    order = net.order_K
    while place < net.counter[0]:
        link = order[place]
        if net.links[link].num == 0 and not (net.links[link].is_cap and net.links[link].crossing > 0):
            _leave(net, place)
            continue
        set_level(net, link)
        first = sink(net, place)
        place = first + 1


@compiled_in_place
def sink(net: Net, place: int) -> int:
    """Moves a link in front of all that are above its level, flows that cross both included; where it now stands."""
    order = net.order_K
    link = order[place]
    while place > 0 and net.links[link].level < net.links[order[place - 1]].level * (1.0 - TIE):
        above = order[place - 1]
        order[place - 1], order[place] = link, above
        net.links[link].place, net.links[above].place = place - 1, place
        place -= 1
        before = net.links[link].num
        _take_shared(net, above, link)
        if net.links[link].num != before:
            set_level(net, link)
    return place


@compiled_in_place
def _leave(net: Net, place: int) -> None:
    """A link that holds nothing has no level."""
    order = net.order_K
    gone = order[place]
    net.links[gone].clock = clock_of(net, gone)
    net.links[gone].since = net.now[0]
    net.links[gone].level = 0.0
    net.links[gone].place = -1
    net.links[gone].weight = 0.0
    net.counter[0] -= 1
    _suspect(net, gone)
    for other in range(place, net.counter[0]):
        order[other] = order[other + 1]
        net.links[order[other]].place = other


@compiled_in_place
def join(net: Net, link: int, level: float) -> None:
    """A link that begins to hold flows stands last."""
    net.links[link].since = net.now[0]
    net.links[link].level = level
    net.links[link].end, net.links[link].seen_weight = -1.0, -1.0
    net.order_K[net.counter[0]] = link
    net.links[link].place = net.counter[0]
    net.counter[0] += 1


@compiled_in_place
def relieve(net: Net) -> None:
    """Links that carry more than they can and hold nothing begin to hold the fastest flows that cross them."""
    while net.counter[1] > 0 or net.counter[2] > 0:
        if net.counter[2] > 0:
            net.counter[1] = net.counter[2] = 0
            for link in range(len(net.links)):
                _fill_if_over(net, link)
        else:
            net.counter[1] -= 1
            _fill_if_over(net, net.suspects[net.counter[1]])


@compiled_in_place
def _fill_if_over(net: Net, link: int) -> None:
    if net.links[link].num > 0 or net.links[link].is_cap or net.links[link].crossing == 0:
        return
    if net.others_K[link] > net.links[link].capacity * (1.0 + _OVER):
        _fill_over(net, link)


@compiled_in_place
def _fill_over(net: Net, link: int) -> None:
    place, first = net.counter[0] - 1, 0
    while net.links[link].num == 0 and place >= 0:
        giver = net.order_K[place]
        net.links[link].level, net.links[link].since = net.links[giver].level, net.now[0]
        _take_shared(net, giver, link)
        first = place
        place -= 1
    level = net.links[link].level
    join(net, link, level)
    set_level(net, link)
    raise_levels(net, min(first, sink(net, net.counter[0] - 1)))
