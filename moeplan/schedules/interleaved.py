"""Interleaved 1F1B: each stage holds several chunks of the model, which divides the bubble by their number.

Reference: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
section 2.2.2.
"""

from __future__ import annotations

from functools import lru_cache

from moeplan.schedules._legal import check_counts, refuse
from moeplan.schedules._order import Kind, Order, alternate, slots

CHUNKS: tuple[int, int | None] = (2, None)
COPIES = 1


def check(num_stages: int, num_microbatches: int, *, num_chunks: int) -> None:
    """Raises PlanError unless there are two stages, two chunks, and micro-batches in multiples of the stages."""
    check_counts("interleaved", num_stages, num_microbatches, min_stages=2)
    if num_chunks < 2:
        raise refuse("interleaved", "num_chunks", num_chunks, allowed="2 or more", remedy="or use schedule one_f_one_b")
    if num_microbatches % num_stages:
        below = num_microbatches // num_stages * num_stages
        near = f"{below} or {below + num_stages}" if below else f"{num_stages}"
        allowed = f"multiples of the {num_stages} stages"
        raise refuse("interleaved", "num_microbatches", num_microbatches, allowed=allowed, remedy=f"use {near}")


def num_virtual_stages(num_stages: int, num_chunks: int) -> int:
    """One for each chunk of each stage."""
    return num_stages * num_chunks


def virtual_stage(stage: int, chunk: int, *, num_stages: int, num_chunks: int) -> int:
    """The model goes round the stages once for each chunk."""
    return chunk * num_stages + stage


@lru_cache(maxsize=64)
def actions(num_stages: int, num_microbatches: int, *, num_chunks: int) -> tuple[Order, ...]:
    """Stage s: 2 (pp - s - 1) + (chunks - 1) pp forwards, then F and B in turn, then the backwards that are left.

    Forwards take pp micro-batches through chunk 0, the same pp through chunk 1, ...; backwards likewise, last chunk
    first.
    """
    check(num_stages, num_microbatches, num_chunks=num_chunks)
    chunks = range(num_chunks)
    forwards = _rounds("F", chunks, num_stages, num_microbatches)
    backwards = _rounds("B", chunks[::-1], num_stages, num_microbatches)
    return tuple(alternate(forwards, backwards, _warm_up(stage, num_stages, num_chunks)) for stage in range(num_stages))


def _rounds(kind: Kind, chunks: range, num_stages: int, num_microbatches: int) -> Order:
    groups = range(0, num_microbatches, num_stages)
    material = {chunk: slots(kind, chunk, num_microbatches) for chunk in chunks}
    return tuple(slot for first in groups for chunk in chunks for slot in material[chunk][first : first + num_stages])


def _warm_up(stage: int, num_stages: int, num_chunks: int) -> int:
    return 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages


def in_flight_limit(stage: int, num_stages: int, num_microbatches: int, *, num_chunks: int) -> int:
    """min(M chunks, 2 (pp - s - 1) + (chunks - 1) pp + 1), in passes through one chunk."""
    return min(num_microbatches * num_chunks, _warm_up(stage, num_stages, num_chunks) + 1)


def ideal_step_s(
    num_stages: int,
    num_microbatches: int,
    *,
    num_chunks: int,
    forward_s: float,
    input_gradient_s: float,
    weight_gradient_s: float,
) -> float:
    """(M v + p - 1) (F + B), with B = I + W and v chunks: exact for equal stages without communication.

    Reference: bubble (p - 1) (F + B) / v of Narayanan et al. 2021, section 2.2.2, there in passes through all chunks.
    """
    passes = num_microbatches * num_chunks + num_stages - 1
    return passes * (forward_s + input_gradient_s + weight_gradient_s)
