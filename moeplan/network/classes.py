"""Flows that cannot be told apart become one class, and so do links: what happens to one happens to all.

Colour refinement of the graph of flows and links: a flow's colour is made of its size, start, weight, cap and its
links' colours, a link's of its capacity and its flows' colours. When no colour splits any more, each class of flows
crosses each link of a class equally often, so fair sharing gives all of a class the same rate at all times: exact, for
any traffic. Reference: McKay, Piperno, "Practical graph isomorphism, II" (2014), section 2.2.

Axes: F flow, K link, I place in the list of all flows' links, C class of flows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.program import Floats, Ints
from moeplan.jit import compiled
from moeplan.network.colours import Colours, bits, mix

Ints32 = NDArray[np.int32]
_SAMPLE = 8192
"""Flows among which two must start alike for a refinement to be worth trying."""
_WORTH = 0.7
"""More classes than this share of the flows are not worth having."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Classes:
    """One flow and one link of each class, and how they cross: `times_I` flows of the class cross one such link."""

    class_F: Ints
    flow_C: Ints
    link_K: Ints
    first_C1: Ints
    link_I: Ints32
    times_I: Floats


def classes_of(first_F1: Ints, link_I: Ints32, capacity_K: Floats, *, features_F: tuple[Floats, ...]) -> Classes | None:
    """The coarsest exact classes; None where they would be nearly as many as the flows.

    `features_F` are what flows differ in by themselves.
    """
    if not _may_be_alike(features_F):
        return None
    own_F = np.zeros(len(first_F1) - 1, np.uint64)
    for feature_F in features_F:
        own_F = mix(own_F + bits(feature_F))
    own_K = mix(bits(capacity_K))
    flow_F, link_K = own_F, own_K
    count = -1
    while True:
        link_K = _link_colours(first_F1, link_I, own_K, flow_F)
        flow_F = _flow_colours(first_F1, link_I, own_F, link_K)
        found = len(np.unique(link_K))
        if found == count:
            break
        count = found
    class_F, flow_C = _numbers(flow_F)
    if len(flow_C) > _WORTH * len(flow_F):
        return None
    class_K, chosen_K = _numbers(link_K)
    first_C1, path_I, times_I = _paths(
        first_F1, link_I, flow_C, np.bincount(class_F), class_K, np.bincount(class_K)
    )  # fmt: skip
    return Classes(
        class_F=class_F, flow_C=flow_C, link_K=chosen_K, first_C1=first_C1, link_I=path_I, times_I=times_I
    )  # fmt: skip


def _may_be_alike(features_F: tuple[Floats, ...]) -> bool:
    """Whether two flows of an even sample start with the same colour."""
    flows = len(features_F[0])
    chosen = np.unique(np.linspace(0, flows - 1, min(flows, _SAMPLE)).astype(np.int64))
    table = np.stack([feature_F[chosen] for feature_F in features_F])
    return flows > 1 and np.unique(table, axis=1).shape[1] < len(chosen)


@compiled
def _mixed(value: np.uint64) -> np.uint64:
    """`colours.mix` of one value."""
    z = value + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def _link_colours(first_F1: Ints, link_I: Ints32, own_K: Colours, flow_F: Colours) -> Colours:
    total = np.zeros(len(own_K), np.uint64)
    for flow in range(len(flow_F)):
        colour = _mixed(flow_F[flow])
        for place in range(first_F1[flow], first_F1[flow + 1]):
            total[link_I[place]] += colour
    for link in range(len(own_K)):
        total[link] = _mixed(own_K[link] + total[link])
    return total


@compiled
def _flow_colours(first_F1: Ints, link_I: Ints32, own_F: Colours, link_K: Colours) -> Colours:
    found = np.empty(len(own_F), np.uint64)
    for flow in range(len(own_F)):
        total = own_F[flow]
        for place in range(first_F1[flow], first_F1[flow + 1]):
            total += _mixed(link_K[link_I[place]])
        found[flow] = _mixed(total)
    return found


@compiled
def _numbers(colour_F: Colours) -> tuple[Ints, Ints]:
    """Classes 0, 1, ... in the order of their first members, and these: a hash table with open addresses."""
    size = 16
    while size < 2 * len(colour_F):
        size *= 2
    table, number_F = np.full(size, -1), np.empty(len(colour_F), np.int64)
    first, count = np.empty(len(colour_F), np.int64), 0
    for member in range(len(colour_F)):
        slot = np.int64(colour_F[member] & np.uint64(size - 1))
        while table[slot] >= 0 and colour_F[first[table[slot]]] != colour_F[member]:
            slot = (slot + 1) & (size - 1)
        if table[slot] < 0:
            table[slot] = count
            first[count] = member
            count += 1
        number_F[member] = table[slot]
    return number_F, first[:count].copy()


@compiled
def _paths(
    first_F1: Ints, link_I: Ints32, flow_C: Ints, count_C: Ints, class_K: Ints, num_K: Ints
) -> tuple[Ints, Ints32, Floats]:
    """The link classes that each class of flows crosses, each once, and how many of its flows cross one such link."""
    total = 0
    for flow in flow_C:
        total += first_F1[flow + 1] - first_F1[flow]
    first_C1, links, times = np.zeros(len(flow_C) + 1, np.int64), np.empty(total, np.int32), np.empty(total)
    last = 0
    for number in range(len(flow_C)):
        flow, begin = flow_C[number], last
        for place in range(first_F1[flow], first_F1[flow + 1]):
            link = class_K[link_I[place]]
            at = begin
            while at < last and links[at] != link:
                at += 1
            if at == last:
                links[at], times[at] = link, 0.0
                last += 1
            times[at] += count_C[number] / num_K[link]
        first_C1[number + 1] = last
    return first_C1, links[:last].copy(), times[:last].copy()
