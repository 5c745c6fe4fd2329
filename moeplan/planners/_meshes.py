"""Submeshes and their logical shapes, and what it takes to change how a tensor is divided over one.

A submesh of n whole nodes, or of part of a node, is seen as a grid of two axes, the second among neighbours. Over each
axis a tensor is in one of five states: T tokens divided, F features divided, R whole on each, P on its way to a sum (as
an output: partial sums; as an input: whole, its gradient a partial sum), E experts divided.
Reference: Zheng et al., "Alpa" (OSDI 2022), section 4.1, tables 1 to 3.

Axes: O states of the producer over both axes, I states of the consumer (25 each).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from moeplan.domain.cluster import Cluster
from moeplan.domain.program import Exchange, Floats
from moeplan.network.expand import expand
from moeplan.planners._wires import Wire, busiest

T, F, R, P, E = range(5)
STATES = 5
_MOST_FLOWS = 1 << 16
_DIVIDED = (True, True, False, False, True)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mesh:
    """A submesh in one logical shape. Resharding x bytes takes `latency_s_OI + x * per_byte_s_OI`, there and back."""

    shape: tuple[int, int]
    gathers: tuple[Wire, Wire]
    latency_s_OI: Floats
    per_byte_s_OI: Floats

    @property
    def num_gpus(self) -> int:
        """Of both axes."""
        return self.shape[0] * self.shape[1]


def submeshes(cluster: Cluster) -> list[int]:
    """GPUs of each submesh: powers of two inside a node, then whole nodes by powers of two, and all of them.

    Such submeshes always tile the cluster if their sizes sum to it (Alpa, theorem 1 of its appendix).
    """
    inside, nodes = cluster.gpus_per_node, cluster.num_nodes
    small = [1 << k for k in range(inside.bit_length()) if inside % (1 << k) == 0 and 1 << k < inside]
    return sorted({*small, *(inside << k for k in range(nodes.bit_length()) if 1 << k <= nodes), inside * nodes})


def shapes(num_gpus: int, gpus_per_node: int) -> list[tuple[int, int]]:
    """The logical shapes of a submesh: 2, 4, ... neighbours on the second axis, up to a node."""
    inside = min(num_gpus, gpus_per_node)
    near = [b for b in range(2, inside + 1) if inside % b == 0 and num_gpus % b == 0 and b & (b - 1) == 0]
    return [(num_gpus // b, b) for b in near or (1,)]


@lru_cache(maxsize=256)
def mesh_of(cluster: Cluster, shape: tuple[int, int]) -> Mesh:
    """The first GPUs of the cluster as a grid; all groups of a node that move at once share its wires."""
    wires = [_wires(cluster, shape[0], shape[1]), _wires(cluster, shape[1], 1)]
    latency_s, per_byte_s = (np.zeros((STATES,) * 4) for _ in range(2))
    for states in product(range(STATES), repeat=4):
        latency_s[states], per_byte_s[states] = _reshard(states, shape, wires)
    size = STATES**2
    return Mesh(
        shape=shape, gathers=(wires[0][0], wires[1][0]), latency_s_OI=latency_s.reshape(size, size),
        per_byte_s_OI=per_byte_s.reshape(size, size),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _wires(cluster: Cluster, count: int, stride: int) -> tuple[Wire, Wire]:
    """An all-gather of a byte, and an all-to-all of which each member has a byte, along an axis; where there are too
    many members for that, an all-to-all is an all-gather of everything.
    """
    if count == 1:
        return (Wire(latency_s=0.0, per_byte_s=0.0),) * 2
    starts = [s for s in range(min(count * stride, cluster.gpus_per_node)) if s // stride % count == 0]
    gather = _wire(cluster, "all_gather", "ring", count, stride, starts)
    if count**2 > _MOST_FLOWS:
        return gather, Wire(latency_s=gather.latency_s, per_byte_s=gather.per_byte_s * count)
    return gather, _wire(cluster, "all_to_all", "linear", count, stride, starts[: _MOST_FLOWS // count**2])


def _wire(cluster: Cluster, operation: str, algorithm: str, count: int, stride: int, starts: list[int]) -> Wire:
    groups_NG = np.array([[start + stride * k for k in range(count)] for start in starts], np.int64)
    exchange = Exchange(kind="", operation=operation, algorithm=algorithm, groups_NG=groups_NG, size_bytes=1.0)
    return busiest(expand(exchange, cluster), cluster)


def _reshard(states: tuple[int, ...], shape: tuple[int, int], wires: list[tuple[Wire, Wire]]) -> tuple[float, float]:
    """Seconds, and seconds a byte of the whole tensor: one axis after the other, in the better order."""
    out, into = states[:2], states[2:]
    found = []
    for first in (0, 1):
        latency_s = per_byte_s = 0.0
        for axis in (first, 1 - first):
            other = out[1 - axis] if axis == first else into[1 - axis]
            share = 1 / shape[1 - axis] if _DIVIDED[other] else 1.0
            gathers, exchanges = _moves(out[axis], into[axis])
            gather, exchange = wires[axis]
            latency_s += gathers * gather.latency_s + exchanges * exchange.latency_s
            per_byte_s += share * (gathers * gather.per_byte_s + exchanges * exchange.per_byte_s / shape[axis])
        found.append((per_byte_s, latency_s))
    return min(found)[1], min(found)[0]


def _moves(out: int, into: int) -> tuple[int, int]:
    """All-gathers (or reduce-scatters) and all-to-alls of a forward and a backward pass along one axis.

    Backwards the consumer's state is the producer's: a whole input has a whole gradient, a P input a partial one.
    """
    there, back = _move(out, R if into == P else into), _move(into, R if out == P else out)
    return there[0] + back[0], there[1] + back[1]


def _move(source: int, target: int) -> tuple[int, int]:
    if source in (R, target) and source != P:
        return 0, 0
    if source == P:
        return (2, 0) if target == R else (1, 0)
    return (1, 0) if target == R else (0, 1)
