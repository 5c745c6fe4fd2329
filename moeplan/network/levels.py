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

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moeplan.jit import inlined

Ints = NDArray[np.int64]
Numbers = NDArray[np.uint32]
"""Of links and flows. Unsigned, since a number that may be negative is looked at before each use as an index."""
Floats = NDArray[np.float64]

as_number: Any = np.uint32
_index: Any = np.uint64
_signed: Callable[[Any], int] = cast("Any", np.int64)
TIE = 1e-13
"""Levels, and ends, that differ by less than this share are the same."""
_FLOWS_PER_ROW = 32
"""A row of the table takes as long as so many times fewer flows, one by one."""
_OVER = 1e-11
"""By this share a link may seem to carry more than its capacity through rounding."""


LINK = np.dtype(
    [
        ("capacity", "f8"), ("weight", "f8"),  # weight of what it holds
        ("clock", "f8"), ("since", "f8"),  # the clock showed `clock` at the time `since`
        ("tag", "f8"),  # of the first flow to end
        ("room", "i4"), ("num", "i4"),  # it holds held[room: room + num], a heap by tag
        ("crossing", "i4"),  # flows that cross it, wherever they are held
        ("place", "i4"),  # in the order, or -1
        ("low", "i4"), ("high", "i4"),  # links that share flows with it lie between
        ("is_cap", "?"),
    ],
    align=True,
)  # fmt: skip
FLOW = np.dtype(
    [
        ("size", "f8"), ("start", "f8"), ("weight", "f8"),
        ("holder", "i4"), ("spot", "i4"),  # the link that holds it, and where in that heap
    ],
    align=True,
)  # fmt: skip


class Net(NamedTuple):
    """Flows in the order of their starts, their links, and how all of them stand at `now[0]`.

    Each event looks at all links, or at all from a place of the order on, so what it looks at first is in plain
    arrays: the processor takes eight numbers at a time. The rest is in records, one cache line for each link.
    """

    links: Any
    flows: Any
    first_F1: NDArray[np.uint64]
    """Flow f crosses link_I[first_F1[f]: first_F1[f + 1]]."""
    link_I: Numbers
    load_I: Floats
    """What the flow's level is multiplied with on the link."""
    now: Floats
    num_ordered: Ints
    order_K: Numbers
    """Links that hold flows, by rising level."""
    level_K: Floats
    others_K: Floats
    """Bytes per second of the flows that cross a link and are held elsewhere."""
    seen_K: Floats
    """`others_K` as it was when the level was worked out; no number where it has to be in any case."""
    limit_K: Floats
    """What the others may carry before the link begins to hold flows."""
    end_K: Floats
    """When the first flow that a link holds ends."""
    end_bits_K: Ints
    """The same memory as whole numbers, which have the same order, and whose least is found faster."""
    tag_F: Floats
    held: Numbers
    scratch: Numbers
    shared_KK: Any
    """Weight of the flows that one link holds and that cross another; no rows where links are too many for a table."""


@inlined
def path_of(net: Net, flow: int) -> Any:
    """Where the links of a flow stand."""
    return range(net.first_F1[flow], net.first_F1[flow + as_number(1)])


@inlined
def held_by(net: Net, link: int) -> Any:
    """Where the flows that a link holds stand."""
    room = np.uint64(net.links[link].room)
    return range(room, room + np.uint64(net.links[link].num))


@inlined
def clock_of(net: Net, link: int) -> float:
    elapsed = net.now[0] - net.links[link].since
    return float(net.links[link].clock + net.level_K[link] * elapsed)


@inlined
def mark(net: Net, link: int) -> None:
    """Notes when a link's first flow ends, and, if it holds none, when it has to begin to."""
    num, capacity = net.links[link].num, net.links[link].capacity
    net.limit_K[link] = net.end_K[link] = np.inf
    if num > 0:
        left = net.links[link].tag - net.links[link].clock
        net.end_K[link] = net.links[link].since + left / net.level_K[link]
    elif net.links[link].crossing > 0 and not net.links[link].is_cap:
        net.limit_K[link] = capacity * (1.0 + _OVER)


# ---- heaps by tag


@inlined
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


@inlined
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


@inlined
def push(net: Net, link: int, flow: int) -> None:
    spot = net.links[link].num
    net.held[net.links[link].room + spot] = flow
    net.links[link].num += 1
    _sift_up(net, link, spot)
    net.links[link].tag = net.tag_F[net.held[net.links[link].room]]
    mark(net, link)


@inlined
def pull(net: Net, link: int, flow: int) -> None:
    base, spot = net.links[link].room, net.flows[flow].spot
    net.links[link].num -= 1
    last = net.held[base + net.links[link].num]
    if last != flow:
        net.held[base + spot] = last
        net.flows[last].spot = spot
        _sift_up(net, link, spot)
        sift_down(net, link, net.flows[last].spot)
    net.links[link].tag = net.tag_F[net.held[base]]
    mark(net, link)


# ---- who holds a flow


@inlined
def hold(net: Net, flow: int, link: int, sign: float) -> None:
    """Counts a flow that `link` holds (sign 1), or holds no more (sign -1), on all its links."""
    level, rows = net.level_K[link], len(net.shared_KK) > 0
    for place in path_of(net, flow):
        other, load = net.link_I[place], sign * net.load_I[place]
        if other == link:
            net.links[link].weight += load
            net.seen_K[link] = np.nan
            continue
        net.others_K[other] += load * level
        if rows:
            net.shared_KK[link, other] += load


@inlined
def _take(net: Net, flow: int, giver: int, taker: int) -> None:
    """A flow goes from the link that held it to another of its path."""
    left = net.tag_F[flow] - clock_of(net, giver)
    pull(net, giver, flow)
    hold(net, flow, giver, -1.0)
    net.flows[flow].holder = taker
    net.tag_F[flow] = clock_of(net, taker) + left
    hold(net, flow, taker, 1.0)
    push(net, taker, flow)


@inlined
def _crosses(net: Net, flow: int, link: int) -> bool:
    found = False
    for place in path_of(net, flow):
        found |= net.link_I[place] == link
    return found


@inlined
def _take_shared(net: Net, giver: int, taker: int) -> None:
    """What `giver` holds and crosses `taker` goes to `taker`."""
    if len(net.shared_KK) > 0 and net.shared_KK[giver, taker] == 0:
        return
    found = 0
    for spot in held_by(net, giver):
        if _crosses(net, net.held[spot], taker):
            net.scratch[found] = net.held[spot]
            found += 1
    for number in range(found):
        _take(net, net.scratch[number], giver, taker)


# ---- levels


@inlined
def set_level(net: Net, link: int) -> None:
    """The level that uses up the link's capacity, or its fixed one; links that share its flows are told."""
    others, level = net.others_K[link], net.links[link].capacity
    net.seen_K[link] = others
    if not net.links[link].is_cap:
        level = (level - others) / net.links[link].weight
    change = level - net.level_K[link]
    if change == 0.0:
        return
    net.links[link].clock = clock_of(net, link)
    net.links[link].since = net.now[0]
    net.level_K[link] = level
    mark(net, link)
    tell(net, link, change)


@inlined
def tell(net: Net, link: int, change: float) -> None:
    """Others learn by how much the level of a link that holds some of their flows has changed."""
    low, high, num = net.links[link].low, net.links[link].high, net.links[link].num
    if len(net.shared_KK) > 0 and num * _FLOWS_PER_ROW > high - low:
        others, shared = net.others_K, net.shared_KK
        # Unsigned, because only then the loop becomes vector instructions.
        for other in range(np.uint64(low), np.uint64(high)):
            others[other] += change * shared[link, other]
        return
    own = net.others_K[link]
    for spot in held_by(net, link):
        flow = net.held[spot]
        for place in path_of(net, flow):
            net.others_K[net.link_I[place]] += change * net.load_I[place]
    net.others_K[link] = own  # it is not among the others


@inlined
def balance(net: Net, place: int) -> None:
    """Sets all levels from a place of the order on, until no link carries more than it can."""
    while place >= 0:
        _raise_levels(net, place)
        link = _over_full(net)
        place = _relieve(net, as_number(link)) if link >= 0 else -1


@inlined
def _raise_levels(net: Net, place: int) -> None:
    while place < net.num_ordered[0]:
        link = net.order_K[_index(place)]
        if net.others_K[link] != net.seen_K[link]:
            if net.links[link].num == 0 and not (net.links[link].is_cap and net.links[link].crossing > 0):
                _leave(net, place)
                continue
            set_level(net, link)
        place = sink(net, place) + 1


@inlined
def sink(net: Net, place: int) -> int:
    """Moves a link in front of all that are above its level, flows that cross both included; where it now stands."""
    order, place = net.order_K, _index(place)
    link = order[place]
    while place > 0:
        below = place - _index(1)
        above = order[below]
        if net.level_K[link] >= net.level_K[above] * (1.0 - TIE):
            break
        order[below], order[place] = link, above
        net.links[link].place, net.links[above].place = below, place
        place = below
        before = net.links[link].num
        _take_shared(net, above, link)
        if net.links[link].num != before:
            set_level(net, link)
    return _signed(place)


@inlined
def _leave(net: Net, place: int) -> None:
    """A link that holds nothing has no level."""
    order = net.order_K
    gone = order[place]
    net.links[gone].clock = clock_of(net, gone)
    net.links[gone].since = net.now[0]
    net.level_K[gone] = 0.0
    net.links[gone].place = -1
    net.links[gone].weight = 0.0
    net.num_ordered[0] -= 1
    for other in range(place, net.num_ordered[0]):
        order[other] = order[other + 1]
        net.links[order[other]].place = other


@inlined
def join(net: Net, link: int, level: float) -> None:
    """A link that begins to hold flows stands last."""
    place = net.num_ordered[0]
    net.links[link].since = net.now[0]
    net.level_K[link], net.seen_K[link] = level, np.nan
    net.order_K[place] = link
    net.links[link].place = place
    net.num_ordered[0] += 1


@inlined
def _over_full(net: Net) -> int:
    """A link that holds nothing and carries more than it can; -1 if there is none."""
    found = False
    for link in range(np.uint64(len(net.limit_K))):
        found |= net.others_K[link] > net.limit_K[link]
    if found:
        for link in range(np.uint64(len(net.limit_K))):
            if net.others_K[link] > net.limit_K[link]:
                return _signed(link)
    return -1


@inlined
def _relieve(net: Net, link: int) -> int:
    """A link that carries too much begins to hold the fastest flows that cross it; the first place that changed."""
    place = int(net.num_ordered[0])
    while net.links[link].num == 0:
        place -= 1
        giver = net.order_K[place]
        net.level_K[link], net.links[link].since = net.level_K[giver], net.now[0]
        _take_shared(net, giver, link)
    join(net, link, net.level_K[link])
    set_level(net, link)
    return min(place, sink(net, int(net.num_ordered[0]) - 1))
