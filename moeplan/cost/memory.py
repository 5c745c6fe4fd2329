"""Bytes of a GPU's memory: what is there all the time, what a micro-batch leaves behind, what is there for a moment.

Who keeps what is said in `domain/operators.py`. A layer keeps its input and what it makes, but not its output, which
the next layer keeps as its input. Fragmentation, the context of the device and buffers of communication libraries are
no part of this: a GPU's `usable_memory` leaves them room.

Axes: P pipeline rank, K moment of a rank's order, C what a rank holds for its chunks (what forward passes left there,
chunk by chunk, then what weight gradients wait with, then what is made again), G place in the expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from moeplan.domain.operators import Operator
from moeplan.domain.plan import DTYPE_BYTES, Precision, Recompute
from moeplan.domain.program import Floats, Ints

ACCUMULATOR_BYTES = 4
_MATRIX = ("gemm", "grouped_gemm")
_LAYERS_AHEAD = 2
"""Layers whose weights are there at once under ZeRO 3: the one at work and the one that is gathered meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peak bytes of one GPU of each pipeline rank, by what they are for; the parts sum to `total_P`."""

    weights_P: Floats
    gradients_P: Floats
    optimizer_P: Floats
    activations_P: Floats
    buffers_P: Floats
    logits_P: Floats
    cache_P: Floats

    def __post_init__(self) -> None:
        for field in fields(self):
            getattr(self, field.name).setflags(write=False)

    @property
    def total_P(self) -> Floats:
        """The sum of the parts."""
        states_P: Floats = self.weights_P + self.gradients_P + self.optimizer_P
        return states_P + self.activations_P + self.buffers_P + self.logits_P + self.cache_P

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


class States(NamedTuple):
    """Bytes that stay for the whole training."""

    weights: Floats
    gradients: Floats
    optimizer: Floats


def state_bytes(parameters: Floats, *, replicas: int, zero: int, precision: Precision) -> States:
    """Weights w, gradients g, master weights and two moments m + 2 v bytes a parameter, over `replicas` as ZeRO says.

    ZeRO 1 divides m + 2 v, ZeRO 2 also g, ZeRO 3 also w. A share is not rounded up to whole parameters.
    Reference: Rajbhandari et al., "ZeRO" (SC 2020), section 3.1 and figure 1: 2 + 2 + 12 bytes with gradients in fp16.
    """
    share = parameters / replicas
    master = DTYPE_BYTES[precision.master_weights] if precision.master_weights else 0.0
    return States(
        weights=(share if zero >= 3 else parameters) * DTYPE_BYTES[precision.weights],
        gradients=(share if zero >= 2 else parameters) * DTYPE_BYTES[precision.gradients],
        optimizer=(share if zero >= 1 else parameters) * (master + 2 * DTYPE_BYTES[precision.moments]),
    )


def gathered_bytes(
    parameters: Floats, *, largest_layer: Floats, ends: Floats, replicas: int, zero: int, precision: Precision
) -> Floats:
    """What ZeRO 2 and 3 hold whole for a moment: gradients of one layer, weights of two; all of the model's ends.

    At most what sharding saved, for then nothing is left to gather.
    """
    saved = parameters - parameters / replicas
    found = np.zeros_like(saved)
    if zero >= 2:
        found += np.minimum(saved, ends + largest_layer) * DTYPE_BYTES[precision.gradients]
    if zero >= 3:
        found += np.minimum(saved, ends + _LAYERS_AHEAD * largest_layer) * DTYPE_BYTES[precision.weights]
    return found


class Kept(NamedTuple):
    """Bytes that a forward pass leaves for the backward pass; `dropped` are those that are cheap to make again."""

    whole: float
    dropped: float
    accumulators: float
    """In fp32, such as scores over the vocabulary; part of `whole`."""


def kept_bytes(operators: Iterable[Operator], precision: Precision) -> Kept:
    """Sum over operators of kept elements in the format they are kept in, and of kept accumulators in fp32."""
    element = precision.kept_bytes
    whole = dropped = accumulators = 0.0
    for operator in operators:
        fp32 = operator.kept_accumulator_elements * ACCUMULATOR_BYTES
        size = operator.kept_elements * element + fp32
        whole, accumulators = whole + size, accumulators + fp32
        dropped += size if operator.recompute else 0.0
    return Kept(whole, dropped, accumulators)


def weight_input_bytes(operators: Iterable[Operator], precision: Precision) -> tuple[float, float]:
    """What a weight gradient needs: input of each product and gradient of its output; and what of it is in fp32.

    With it W holds 32 s b h of a GPT layer where the forward pass left 34 s b h (with dropout masks).
    Reference: Qi et al., "Zero Bubble Pipeline Parallelism" (ICLR 2024), table 1.
    """
    element = precision.kept_bytes
    half = fp32 = 0.0
    for operator in operators:
        if operator.kind in _MATRIX:
            half += operator.input_elements * element
            if operator.precision == "accumulator":
                fp32 += operator.output_elements * ACCUMULATOR_BYTES
            else:
                half += operator.output_elements * element
    return half + fp32, fp32


def work_bytes(operators: Iterable[Operator], precision: Precision) -> float:
    """Gradients at the widest kernel while it runs: of its input and its output. Attention works in place, by tiles."""
    element = DTYPE_BYTES[precision.activations]
    found = 0.0
    for operator in operators:
        if operator.kind != "attention":
            result = ACCUMULATOR_BYTES if operator.precision == "accumulator" else element
            found = max(found, operator.input_elements * element + operator.output_elements * result)
    return found


def by_policy(recompute: Recompute, *, inputs: Floats, kept: Floats, dropped: Floats) -> tuple[Floats, Floats]:
    """What stays of a layer between its passes, and what is there again for a moment while its backward pass runs.

    none: all stays. selective: all but what is cheap to make again. full: the layer's input.
    Reference: Korthikanti et al., "Reducing activation recomputation in large transformer models" (MLSys 2023), s. 5.
    """
    stays = {"none": kept, "selective": kept - dropped, "full": inputs}[recompute]
    return stays, kept - stays


def transit_bytes(*, sent: Floats, received: Floats, element_bytes: tuple[float, float], overlap_degree: int) -> Floats:
    """Send and receive buffers of dispatch and combine; `sent`, `received` are elements, `element_bytes` of the two.

    Undivided, dispatch and combine D and C take turns: max(D, C). In n parts with buffers of their own, some parts are
    dispatched while others are combined, and the one between is both: max(D, C) + min(D, C) / n.
    """
    dispatch, combine = (element * (sent + received) for element in element_bytes)
    most: Floats = np.maximum(dispatch, combine)
    return most if overlap_degree == 1 else most + np.minimum(dispatch, combine) / overlap_degree


def cache_bytes(elements: float, *, state_elements: float, cp: int, precision: Precision) -> float:
    """Cache of one sequence: its tokens are divided over context-parallel ranks, states of recurrent mixers are not."""
    return DTYPE_BYTES[precision.cache] * ((elements - state_elements) / cp + state_elements)


def moments(order: Iterable[Iterable[tuple[str, int, int]]], *, num_chunks: int) -> Ints:
    """The moments of one rank's order at which it may hold most: how many micro-batches of each kind, (K, 3 chunks).

    F takes, B and I free, I leaves what W frees; a slot of two takes before it frees. While B or I runs, a layer of its
    chunk is made again. A moment is left out if at another one as much of everything is held.
    """
    counts = [0] * (3 * num_chunks)
    found = {tuple(counts)}
    for slot in order:
        before, after = counts[:], counts[:]
        for kind, chunk, _ in slot:
            before[chunk] += kind == "F"
            after[chunk] += {"F": 1, "B": -1, "I": -1, "W": 0}[kind]
            after[num_chunks + chunk] += {"F": 0, "B": 0, "I": 1, "W": -1}[kind]
            before[2 * num_chunks + chunk] += kind in "BI"
        found |= {tuple(before), tuple(after)}
        counts = after
    return _undominated(np.array(sorted(found), np.int64))


def _undominated(counts_KC: Ints) -> Ints:
    left_KC = counts_KC[np.argsort(-counts_KC.sum(axis=1), kind="stable")]
    chosen: list[Ints] = []
    while len(left_KC):
        chosen.append(left_KC[0])
        left_KC = left_KC[(left_KC > left_KC[0]).any(axis=1)]
    return np.array(chosen, np.int64)


def peak_bytes(moments_PKC: Floats, kept_PCG: Floats) -> tuple[Floats, Ints]:
    """max over moments of sum over C of count * bytes, by rank and place; and at which moment that is."""
    held_PKG = moments_PKC @ kept_PCG
    return held_PKG.max(axis=1), held_PKG.argmax(axis=1)
