"""Rings, as many as a group has members in each node, so that each member's network card carries its part.

Every member sends (G - 1) / G of the buffer to the next for a gather or a reduce-scatter, twice that for an all-reduce,
in G - 1 (twice as many) dependent steps. A broadcast is a chain, along which pieces follow one another. An all-to-all
is forwarded: a step takes all that is not yet where it is for one member on. Reference: Thakur, Rabenseifner,
Gropp, "Optimization of collective communication operations in MPICH" (2005), sections 4.1 and 4.5; several rings:
NCCL's channels.
"""

from __future__ import annotations

import numpy as np

from moeplan.collectives._places import places
from moeplan.collectives._waves import nothing, shares
from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Ints, Wave

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all")


def applies(groups_NG: Ints, cluster: Cluster) -> bool:
    """Always."""
    return True


def waves(exchange: Exchange, cluster: Cluster) -> list[Wave]:
    """One wave: the steps of a ring are alike, so their bytes are one flow and their latencies add up before it. An
    all-to-all has a wave for each step.
    """
    rings_CNG = _rings(exchange.groups_NG, cluster)
    if exchange.operation == "all_to_all":
        return _forwarded(exchange, rings_CNG)
    if exchange.operation == "broadcast":
        rings_CNG = _from_first(rings_CNG, exchange.groups_NG[:, 0])
    channels, num_groups, size = rings_CNG.shape
    target_CNG = np.roll(rings_CNG, -1, axis=2)
    steps, share = size - 1, (size - 1) / size / channels
    if exchange.operation == "all_reduce":
        steps, share = 2 * steps, 2 * share
    elif exchange.operation == "broadcast":
        rings_CNG, target_CNG, share = rings_CNG[:, :, :-1], target_CNG[:, :, :-1], 1.0 / channels
    ring = np.repeat(np.arange(channels * num_groups), rings_CNG.shape[2])
    return [
        Wave(
            source_F=rings_CNG.ravel(), target_F=target_CNG.ravel(), share_F=np.full(rings_CNG.size, share),
            group_F=ring % num_groups, bundle_F=ring, steps=float(steps), messages=float(steps),
        )
    ]  # fmt: skip


def _rings(groups_NG: Ints, cluster: Cluster) -> Ints:
    """[C, N, G] the rings: each enters every node at another member. A single one in a node, and where nodes differ."""
    ordered_NG = np.sort(groups_NG, axis=1)
    where = places(groups_NG, cluster)
    if where.num_nodes == 1 or not where.local:
        return ordered_NG[None]
    blocks_NBL = ordered_NG.reshape(len(ordered_NG), -1, where.local)
    return np.stack([np.roll(blocks_NBL, -turn, axis=2).reshape(ordered_NG.shape) for turn in range(where.local)])


def _from_first(rings_CNG: Ints, first_N: Ints) -> Ints:
    """The rings turned so that each begins with the first member."""
    size = rings_CNG.shape[2]
    at_CN1 = (rings_CNG == first_N[:, None]).argmax(axis=2)[:, :, None]
    return np.take_along_axis(rings_CNG, (at_CN1 + np.arange(size)) % size, axis=2)


def _forwarded(exchange: Exchange, rings_CNG: Ints) -> list[Wave]:
    """Step r takes what set out r - 1 members behind and is for r members or more from there on by one."""
    channels, num_groups, size = rings_CNG.shape
    member_CNG = np.argsort(exchange.groups_NG, axis=1)[
        np.arange(num_groups)[:, None], np.argsort(np.argsort(rings_CNG, axis=2), axis=2)
    ]
    place = np.arange(size)
    ahead_GG = (place[:, None] + place) % size
    farther_CNGG = shares(exchange)[member_CNG[..., None], member_CNG[..., ahead_GG]]
    farther_CNGG = farther_CNGG[..., ::-1].cumsum(axis=-1)[..., ::-1] / channels
    found = []
    for step in range(1, size):
        share_CNG = np.roll(farther_CNGG[..., step], step - 1, axis=2)
        some = share_CNG > 0
        target_CNG = np.roll(rings_CNG, -1, axis=2)
        group_CNG = np.arange(num_groups)[:, None] + np.zeros_like(rings_CNG)
        found.append(
            Wave(
                source_F=rings_CNG[some], target_F=target_CNG[some], share_F=share_CNG[some], group_F=group_CNG[some],
                bundle_F=np.arange(int(some.sum())),
            )
        )  # fmt: skip
    return found or [nothing(exchange.groups_NG)]
