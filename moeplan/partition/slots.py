"""What a placement makes of tokens, weights and gradients. Slots then stand where experts stood: a column of a load is
a slot, and equal blocks of slots are the places of a group.

Axes: S sources, E experts, C slots of a group, G places, B blocks of places.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moeplan.domain.placement import EMPTY, Placement
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Ints


def slots_per_place(num_experts: int, plan: Plan) -> int:
    """Experts whose weights a place has room for: an empty slot takes as much as a full one."""
    return (num_experts if plan.placement is None else plan.placement.num_slots) // plan.ep


def tokens_of_slots(tokens_SE: Floats, placement: Placement, layer: int) -> Floats:
    """tokens_SC: what each source sends to each slot; all slots of an expert together get what the expert gets.

    Whole tokens stay whole: each slot gets its share rounded down, and what is left goes to the largest remainders. Of
    equal ones another slot is first for each source, so that no replica gets what all sources have left.
    """
    expert_C, share_C = np.array(placement.experts[layer]), placement.share_C(layer)
    exact_SC = tokens_SE[:, expert_C] * share_C
    count_E = np.bincount(expert_C + 1, minlength=tokens_SE.shape[1] + 1)[1:]
    if count_E.max() == 1 or (tokens_SE % 1).any():
        return exact_SC
    slot_R = np.flatnonzero((expert_C != EMPTY) & (count_E[expert_C] > 1))
    slot_R = slot_R[np.argsort(expert_C[slot_R], kind="stable")]
    exact_SC[:, slot_R] = _whole(exact_SC[:, slot_R], tokens_SE, expert_C[slot_R])
    return exact_SC


def _whole(exact_SR: Floats, tokens_SE: Floats, expert_R: Ints) -> Floats:
    """Whole numbers that sum to each expert's tokens; replicas R are sorted by expert."""
    sources, replicas = np.arange(len(exact_SR))[:, None], np.arange(expert_R.size)
    first_R, count_R = np.searchsorted(expert_R, expert_R), np.bincount(expert_R)[expert_R]
    whole_SR = np.floor(exact_SR + 1e-9)
    turn_SR = (replicas - first_R - sources) % count_R
    rest_SR = np.round(exact_SR - whole_SR, 9)
    order_SR = np.lexsort((turn_SR, -rest_SR, np.broadcast_to(expert_R, exact_SR.shape)))
    rank_SR = np.empty_like(order_SR)
    np.put_along_axis(rank_SR, order_SR, np.broadcast_to(replicas - first_R, order_SR.shape), axis=1)
    start_R = np.unique(first_R)
    left_SK = tokens_SE[:, expert_R[start_R]] - np.add.reduceat(whole_SR, start_R, axis=1)
    return np.asarray(whole_SR + (rank_SR < np.repeat(left_SK, count_R[start_R], axis=1)))


def part_of_blocks(placement: Placement, layer: int, block_G: tuple[int, ...], *, num_experts: int) -> Floats:
    """part_BE: what part of each expert's tokens goes to block b of places."""
    part_BE = np.zeros((max(block_G) + 1, num_experts + 1))
    block_C = np.repeat(block_G, placement.num_slots // len(block_G))
    np.add.at(part_BE, (block_C, np.array(placement.experts[layer])), placement.share_C(layer))
    return np.minimum(part_BE[:, :num_experts], 1.0)


@lru_cache(maxsize=1024)
def ring_GG(placement: Placement, layer: int, num_places: int) -> Floats | None:
    """What goes from place to place, of one expert's gradients, until all replicas have their sum; None: no replicas.

    The r places of an expert are a ring, on which each sends 2 (r - 1) / r of the gradients to the next: an all-reduce.
    All rings run at once, and pay one latency. Reference: Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms
    for clusters of workstations", J. Parallel Distrib. Comput. 69, 2009.
    """
    found_GG = np.zeros((num_places, num_places))
    expert_C, per_place = np.array(placement.experts[layer]), placement.num_slots // num_places
    count_E = np.bincount(expert_C + 1)[1:]
    for expert in np.flatnonzero(count_E > 1):
        places = np.flatnonzero(expert_C == expert) // per_place
        found_GG[places, np.roll(places, -1)] += 2 * (len(places) - 1) / len(places)
    return found_GG if found_GG.any() else None
