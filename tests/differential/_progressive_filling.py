"""Flows that share links max-min fairly, in the plainest way: the reference that faster programs are held against.

Axes: F flows, K links, A the flows that are under way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def finish_times(
    paths: Sequence[Sequence[int]],
    *,
    size_bytes_F: Sequence[float] | Array,
    start_s_F: Sequence[float] | Array,
    weight_F: Sequence[float] | Array,
    cap_F: Sequence[float] | Array,
    capacity_K: Sequence[float] | Array,
) -> Array:
    """Seconds at which each flow ends; each has at least one link or a finite cap.

    From one start or end of a flow to the next, each flow moves at the rate that filling from nothing gives it. Flows
    that end together by the book may end in several steps here, with next to no time between them.
    """
    crossing_FK = incidence(paths, len(capacity_K))
    start_s_F, weight_F, cap_F = (np.asarray(each, float) for each in (start_s_F, weight_F, cap_F))
    left_bytes_F, capacity_K = np.array(size_bytes_F, float), np.asarray(capacity_K, float)
    finish_s_F, now_s = np.full(len(paths), np.inf), 0.0
    while np.isinf(finish_s_F).any():
        under_way_A = np.flatnonzero((start_s_F <= now_s) & np.isinf(finish_s_F))
        rate_A = filled(crossing_FK[under_way_A], weight_F[under_way_A], cap_F[under_way_A], capacity_K)
        end_s_A = now_s + left_bytes_F[under_way_A] / rate_A
        next_s = min(start_s_F[start_s_F > now_s].min(initial=np.inf), end_s_A.min(initial=np.inf))
        left_bytes_F[under_way_A] -= rate_A * (next_s - now_s)
        finish_s_F[under_way_A[end_s_A <= next_s]] = next_s
        now_s = next_s
    return finish_s_F


def filled(crossing_AK: Array, weight_A: Array, cap_A: Array, capacity_K: Array) -> Array:
    """The rate of each flow: raise all in step with their weights; who meets a full link or its own cap stops there."""
    rate_A, rises_A = np.zeros(len(weight_A)), np.ones(len(weight_A), bool)
    while rises_A.any():
        weight_K = (weight_A * rises_A) @ crossing_AK
        free_K = capacity_K - (rate_A * ~rises_A) @ crossing_AK
        level_K = np.divide(free_K, weight_K, out=np.full(len(capacity_K), np.inf), where=weight_K > 0)
        level_A = np.minimum(cap_A / weight_A, np.where(crossing_AK > 0, level_K, np.inf).min(axis=1, initial=np.inf))
        lowest = level_A[rises_A].min()
        stops_A = rises_A & (level_A <= lowest)
        rate_A[stops_A] = weight_A[stops_A] * lowest
        rises_A &= ~stops_A
    return rate_A


def incidence(paths: Sequence[Sequence[int]], num_links: int) -> Array:
    """1 where a flow crosses a link, else 0."""
    crossing_FK = np.zeros((len(paths), num_links))
    for flow, path in enumerate(paths):
        crossing_FK[flow, list(path)] = 1.0
    return crossing_FK
