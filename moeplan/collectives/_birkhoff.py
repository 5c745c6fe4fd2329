"""A table of who sends what to whom, taken apart into rounds in which each sends to one and gets from one.

Axes: G ports that send or receive.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moeplan.collectives._places import Flags
from moeplan.domain.program import Floats, Ints

_GRAIN = 1 << 40
"""The busiest port's load in whole numbers: rounds are taken off exactly, so that nothing is left over."""


def rounds(moved_GG: Floats) -> list[tuple[Ints, Ints, Floats]]:
    """Senders, receivers and bytes of each round; the longest bytes of the rounds add up to the busiest port's load.

    The table is filled up until all rows and columns have the busiest one's sum; then it is a sum of at most G^2 - 2 G
    + 2 permutations. Of those that are left each round takes one whose least entry is at least half of the largest
    possible, and takes that entry off. Reference: Birkhoff, "Tres observaciones sobre el algebra lineal" (1946).
    """
    size = len(moved_GG)
    found = []
    for row, taken in _permutations(np.ascontiguousarray(moved_GG).tobytes(), size):
        i = np.flatnonzero((moved_GG[np.arange(size), row] > 0) & (taken > 0))
        if len(i):
            found.append((i, row[i], moved_GG[i, row[i]] * taken[i]))
    return found


@lru_cache(maxsize=256)
def _permutations(table: bytes, size: int) -> tuple[tuple[Ints, Floats], ...]:
    """Receiver of each sender, and what part of the pair's bytes goes now."""
    whole_GG = _filled(np.frombuffer(table).reshape(size, size))
    left_GG, found = whole_GG.copy(), []
    receiver_G = np.full(size, -1)
    least = int(left_GG.max())
    senders = np.arange(size)
    while left_GG.any():
        while not _matched(left_GG >= least, receiver_G):
            least //= 2
        taken = left_GG[senders, receiver_G].min()
        left_GG[senders, receiver_G] -= taken
        found.append((receiver_G.copy(), taken / whole_GG[senders, receiver_G]))
    return tuple(found)


def _filled(moved_GG: Floats) -> Ints:
    """Whole numbers in the table's proportions, filled up so that all rows and columns have one sum."""
    most = max(float(moved_GG.sum(axis=0).max()), float(moved_GG.sum(axis=1).max()))
    whole_GG = np.ceil(moved_GG * (_GRAIN / most)).astype(np.int64) if most else np.zeros(moved_GG.shape, np.int64)
    target = max(int(whole_GG.sum(axis=0).max()), int(whole_GG.sum(axis=1).max()))
    row, column = target - whole_GG.sum(axis=1), target - whole_GG.sum(axis=0)
    i = j = 0
    while i < len(row) and j < len(column):
        fits = min(row[i], column[j])
        whole_GG[i, j] += fits
        row[i] -= fits
        column[j] -= fits
        i, j = i + (row[i] == 0), j + (row[i] > 0)
    return whole_GG


def _matched(allowed_GG: Flags, receiver_G: Ints) -> bool:
    """Whether each sender has got a receiver of its own among the allowed; `receiver_G` keeps what it can.

    Reference: Kuhn, "The Hungarian method for the assignment problem" (1955), for augmenting paths.
    """
    size = len(receiver_G)
    senders = np.arange(size)
    receiver_G[(receiver_G >= 0) & ~allowed_GG[senders, receiver_G]] = -1
    sender_G = np.full(size, -1)
    sender_G[receiver_G[receiver_G >= 0]] = senders[receiver_G >= 0]
    return all(_augmented(allowed_GG, receiver_G, sender_G, int(free)) for free in np.flatnonzero(receiver_G < 0))


def _augmented(allowed_GG: Flags, receiver_G: Ints, sender_G: Ints, free: int) -> bool:
    """Finds a receiver for a sender without one, moving others over; breadth first."""
    asked_by = np.full(len(sender_G), -1)
    queue = [free]
    for sender in queue:
        for receiver in np.flatnonzero(allowed_GG[sender] & (asked_by < 0)).tolist():
            asked_by[receiver] = sender
            if sender_G[receiver] < 0:
                while receiver >= 0:
                    sender = int(asked_by[receiver])
                    sender_G[receiver], receiver_G[sender], receiver = sender, receiver, int(receiver_G[sender])
                return True
            queue.append(int(sender_G[receiver]))
    return False
