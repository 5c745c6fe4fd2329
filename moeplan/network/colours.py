"""Colour refinement's tools: 64-bit hashes as colours, with which what cannot be told apart is found and numbered.

Two different colours are taken for one with a chance below 1e-9 for a million things.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeplan.domain.program import Ints

Colours = NDArray[np.uint64]


def unsigned(values: Ints | int) -> Colours:
    """Whole numbers as colours."""
    return np.asarray(values).astype(np.uint64)


def bits(values: NDArray[np.float64]) -> Colours:
    """Floats as integers; the last 12 bits are dropped, so that rounding does not split what is equal."""
    return (np.ascontiguousarray(values).view(np.uint64) + unsigned(1 << 11)) >> unsigned(12)


def mix(values: Colours) -> Colours:
    """Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (2014): the finaliser of splitmix64."""
    z = values + unsigned(0x9E3779B97F4A7C15)
    z = (z ^ (z >> unsigned(30))) * unsigned(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> unsigned(27))) * unsigned(0x94D049BB133111EB)
    return z ^ (z >> unsigned(31))


def summed(values: Colours, index: Ints, size: int) -> Colours:
    """What is summed over things of one index does not depend on their order."""
    total = np.zeros(size, np.uint64)
    np.add.at(total, index, values)
    return total


def numbered(colour: Colours) -> Ints:
    """Classes 0, 1, ... in the order of their first member."""
    _, first, inverse = np.unique(colour, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first, kind="stable")] = np.arange(len(first))
    return order[inverse]


def distinct(colour: Colours) -> int:
    """How many colours there are."""
    return len(np.unique(colour))
