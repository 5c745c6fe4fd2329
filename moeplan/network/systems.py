"""Traffic taken apart: links that cannot be full first do not matter, flows that share no link not to each other.

Axes: F flow, K link, I place in the list of all flows' links.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeplan.jit import compiled

Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Floats = NDArray[np.float64]


class Part(NamedTuple):
    """Flows, by start, and their links, by how far from the flows' beginnings they mostly are."""

    flow_F: Ints
    link_K: Ints
    first_F1: Ints
    link_I: Ints32
    place_I: Ints
    """Where each link stood in the list of all flows' links."""
    low_K: Ints
    high_K: Ints
    """Links that share flows with link l lie between."""


def parts_of(first_F1: Ints, link_I: Ints32, num_links: int, start_F: Floats) -> Iterator[Part]:
    """The parts, in the order of their first flows."""
    if len(first_F1) < 2:
        return
    part_F, part_K = _labels(first_F1, link_I, num_links)
    order = np.lexsort((start_F, part_F))
    rank_K = _mean_hop(first_F1, link_I, num_links)
    links = np.lexsort((rank_K, part_K))
    num_parts = int(part_F.max()) + 1
    flow_bounds = np.searchsorted(part_F[order], np.arange(num_parts + 1))
    link_bounds = np.searchsorted(part_K[links], np.arange(num_parts + 1))
    new_K = np.empty(num_links, np.int32)
    for part in range(num_parts):
        flow_F = order[flow_bounds[part] : flow_bounds[part + 1]]
        link_K = links[link_bounds[part] : link_bounds[part + 1]]
        new_K[link_K] = np.arange(len(link_K), dtype=np.int32)
        own_first, place_I = _picked(first_F1, flow_F)
        own_link = new_K[link_I[place_I]]
        low_K, high_K = _spans(own_first, own_link, len(link_K))
        yield Part(flow_F, link_K, own_first, own_link, place_I, low_K, high_K)


@compiled
def first_loop(first_F1: Ints, link_I: Ints32) -> int:
    """The first flow that crosses a link twice, or -1."""
    for flow in range(len(first_F1) - 1):
        for place in range(first_F1[flow], first_F1[flow + 1]):
            for beside in range(first_F1[flow], place):
                if link_I[beside] == link_I[place]:
                    return flow
    return -1


@compiled
def needed(first_F1: Ints, link_I: Ints32, times_I: Floats, capacity_K: Floats) -> NDArray[np.bool_]:
    """Links that may be full first. Not: one whose flows all cross, as often, another that is no wider."""
    low_K, rival_J, is_rival_J = _rivals(first_F1, link_I, len(capacity_K))
    _drop_rivals(first_F1, link_I, times_I, low_K, rival_J, is_rival_J)
    found = np.zeros(len(capacity_K), np.bool_)
    for link in range(len(capacity_K)):
        found[link] = low_K[link + 1] > low_K[link]
        for place in range(low_K[link], low_K[link + 1]):
            other = rival_J[place]
            narrower = capacity_K[other] < capacity_K[link] or (capacity_K[other] == capacity_K[link] and other < link)
            if is_rival_J[place] and other != link and narrower:
                found[link] = False
    return found


@compiled
def _rivals(first_F1: Ints, link_I: Ints32, num_links: int) -> tuple[Ints, Ints32, NDArray[np.bool_]]:
    """For each link the path of the first flow that crosses it: among these are those that all its flows cross."""
    flow_K = np.full(num_links, -1)
    for flow in range(len(first_F1) - 2, -1, -1):
        for place in range(first_F1[flow], first_F1[flow + 1]):
            flow_K[link_I[place]] = flow
    low_K = np.zeros(num_links + 1, np.int64)
    for link in range(num_links):
        flow = flow_K[link]
        low_K[link + 1] = low_K[link] + (first_F1[flow + 1] - first_F1[flow] if flow >= 0 else 0)
    rival_J = np.empty(low_K[-1], np.int32)
    for link in range(num_links):
        for step in range(low_K[link + 1] - low_K[link]):
            rival_J[low_K[link] + step] = link_I[first_F1[flow_K[link]] + step]
    return low_K, rival_J, np.ones(len(rival_J), np.bool_)


@compiled
def _drop_rivals(
    first_F1: Ints, link_I: Ints32, times_I: Floats, low_K: Ints, rival_J: Ints32, is_rival_J: NDArray[np.bool_]
) -> None:
    """Strikes out what some flow of a link does not cross, or less often than the link."""
    for flow in range(len(first_F1) - 1):
        for place in range(first_F1[flow], first_F1[flow + 1]):
            link = link_I[place]
            for slot in range(low_K[link], low_K[link + 1]):
                if not is_rival_J[slot] or rival_J[slot] == link:
                    continue
                crosses = False
                for beside in range(first_F1[flow], first_F1[flow + 1]):
                    if link_I[beside] == rival_J[slot]:
                        crosses = len(times_I) == 0 or times_I[beside] >= times_I[place]
                is_rival_J[slot] = crosses


@compiled
def _root(parent: Ints, link: int) -> int:
    while parent[link] != link:
        parent[link] = parent[parent[link]]
        link = parent[link]
    return link


@compiled
def _labels(first_F1: Ints, link_I: Ints32, num_links: int) -> tuple[Ints, Ints]:
    """The part of each flow, numbered by first flow, and of each link: the number of parts for unused ones."""
    parent = np.arange(num_links)
    for flow in range(len(first_F1) - 1):
        one = _root(parent, link_I[first_F1[flow]])
        for place in range(first_F1[flow] + 1, first_F1[flow + 1]):
            other = _root(parent, link_I[place])
            if other != one:
                parent[other] = one
    number, part_F, label = 0, np.empty(len(first_F1) - 1, np.int64), np.full(num_links, -1)
    for flow in range(len(first_F1) - 1):
        root = _root(parent, link_I[first_F1[flow]])
        if label[root] < 0:
            label[root] = number
            number += 1
        part_F[flow] = label[root]
    part_K = np.empty(num_links, np.int64)
    for link in range(num_links):
        root = _root(parent, link)
        part_K[link] = label[root] if label[root] >= 0 else number
    return part_F, part_K


@compiled
def _mean_hop(first_F1: Ints, link_I: Ints32, num_links: int) -> Floats:
    total, count = np.zeros(num_links), np.zeros(num_links, np.int64)
    for flow in range(len(first_F1) - 1):
        length = first_F1[flow + 1] - first_F1[flow]
        for place in range(first_F1[flow], first_F1[flow + 1]):
            total[link_I[place]] += (place - first_F1[flow] + 0.5) / length
            count[link_I[place]] += 1
    for link in range(num_links):
        total[link] = round(total[link] / max(count[link], 1), 2)
    return total


@compiled
def _picked(first_F1: Ints, flow_F: Ints) -> tuple[Ints, Ints]:
    """Where the paths of some flows begin when they stand alone, and where each of their links stood."""
    first = np.zeros(len(flow_F) + 1, np.int64)
    for number in range(len(flow_F)):
        first[number + 1] = first[number] + first_F1[flow_F[number] + 1] - first_F1[flow_F[number]]
    places = np.empty(first[-1], np.int64)
    for number in range(len(flow_F)):
        for step in range(first[number + 1] - first[number]):
            places[first[number] + step] = first_F1[flow_F[number]] + step
    return first, places


@compiled
def _spans(first_F1: Ints, link_I: Ints32, num_links: int) -> tuple[Ints, Ints]:
    low, high = np.full(num_links, num_links), np.zeros(num_links, np.int64)
    for flow in range(len(first_F1) - 1):
        for place in range(first_F1[flow], first_F1[flow + 1]):
            for beside in range(first_F1[flow], first_F1[flow + 1]):
                if beside != place:
                    low[link_I[place]] = min(low[link_I[place]], link_I[beside])
                    high[link_I[place]] = max(high[link_I[place]], link_I[beside] + 1)
    return low, high
