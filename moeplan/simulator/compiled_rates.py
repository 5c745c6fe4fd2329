"""Max-min fair rates as in `network.py`, on arrays and compiled; those of a set of flow classes are worked out once."""

from __future__ import annotations

import numpy as np

from moeplan.jit import compiled_in_place
from moeplan.simulator.packed import FULL, Machine

_FACTOR = 1_099_511_628_211
"""Of the FNV hash. Reference: Fowler, Noll, Vo, RFC 9923."""


@compiled_in_place
def find_rates(m: Machine) -> None:
    """Bytes per second of one flow of each listed entry's class."""
    world = m.world[0]
    size = world.num_listed
    if size == 0:
        return
    if 2 * world.num_known >= len(m.memo) or world.known_end + size > len(m.known):
        _forget(m)
    code = _code(m)
    place = _place(m, code)
    known = m.memo[place]
    if known.length == size:
        for number in range(size):
            m.entries.rate[number] = m.known[known.first + number].rate
        return
    _fill(m)
    if world.known_end + size <= len(m.known):
        known.code, known.first, known.length = code, world.known_end, size
        for number in range(size):
            m.known[known.first + number].flows = m.entries[m.entries.listed[number]].flows
            m.known[known.first + number].rate = m.entries.rate[number]
        world.known_end += size
        world.num_known += 1


# ---- memory


@compiled_in_place
def _forget(m: Machine) -> None:
    for place in range(len(m.memo)):
        m.memo[place].length = 0
    m.world[0].num_known, m.world[0].known_end = 0, 0


@compiled_in_place
def _code(m: Machine) -> int:
    code = 0
    for number in range(m.world[0].num_listed):
        code = (code ^ m.entries[m.entries.listed[number]].flows) * _FACTOR
    return code


@compiled_in_place
def _place(m: Machine, code: int) -> int:
    """Where the listed classes are remembered, or would be."""
    place = (code ^ (code >> 32)) & (len(m.memo) - 1)
    while m.memo[place].length > 0 and not (m.memo[place].code == code and _is_known(m, place)):
        place = (place + 1) & (len(m.memo) - 1)
    return place


@compiled_in_place
def _is_known(m: Machine, place: int) -> bool:
    known = m.memo[place]
    if known.length != m.world[0].num_listed:
        return False
    for number in range(known.length):
        if m.known[known.first + number].flows != m.entries[m.entries.listed[number]].flows:
            return False
    return True


# ---- progressive filling


@compiled_in_place
def _fill(m: Machine) -> None:
    """All rates grow alike until a link is full; its flows stop, the others go on."""
    growing = _begin(m)
    while growing > 0:
        _load_links(m)
        lowest = np.inf
        for place in range(m.world[0].num_used):
            link = m.links[m.links.used[place]]
            if link.load > 0:
                lowest = min(lowest, link.left / link.load)
        for place in range(m.world[0].num_used):
            link = m.links[m.links.used[place]]
            link.is_full = link.load > 0 and link.left / link.load <= lowest * FULL
            link.load = 0.0
        growing -= _stop(m, lowest)
        for place in range(m.world[0].num_used):
            link = m.links[m.links.used[place]]
            link.left = max(link.left - lowest * link.load, 0.0)
    for place in range(m.world[0].num_used):
        m.links[m.links.used[place]].is_used = False


@compiled_in_place
def _begin(m: Machine) -> int:
    """Sets out with no rate at all and all links empty; how many classes grow: those that cross a link."""
    m.world[0].num_used, growing = 0, 0
    for number in range(m.world[0].num_listed):
        entry = m.entries[m.entries.listed[number]]
        first, last = entry.crossing, entry.last_crossing
        m.entries.rate[number], m.entries.grows[number] = np.inf, last > first
        growing += last > first
        for place in range(first, last):
            link = m.links[m.crossings[place].link]
            if not link.is_used:
                link.is_used, link.left = True, link.capacity
                m.links.used[m.world[0].num_used] = m.crossings[place].link
                m.world[0].num_used += 1
    return growing


@compiled_in_place
def _load_links(m: Machine) -> None:
    for place in range(m.world[0].num_used):
        m.links[m.links.used[place]].load = 0.0
    for number in range(m.world[0].num_listed):
        if m.entries.grows[number]:
            _load(m, number)


@compiled_in_place
def _load(m: Machine, number: int) -> None:
    entry = m.entries[m.entries.listed[number]]
    for place in range(entry.crossing, entry.last_crossing):
        m.links[m.crossings[place].link].load += m.crossings[place].times


@compiled_in_place
def _stop(m: Machine, rate: float) -> int:
    """Ends the growth of classes that cross a full link; how many. The links' load is what they weigh."""
    count = 0
    for number in range(m.world[0].num_listed):
        if not m.entries.grows[number]:
            continue
        entry = m.entries[m.entries.listed[number]]
        for place in range(entry.crossing, entry.last_crossing):
            if m.links[m.crossings[place].link].is_full:
                m.entries.rate[number], m.entries.grows[number] = rate, False
                _load(m, number)
                count += 1
                break
    return count
