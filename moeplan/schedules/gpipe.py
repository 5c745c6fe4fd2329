"""All forwards, then all backwards: simple, with every micro-batch's activations held at once.

Reference: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", NeurIPS 2019.
"""

from __future__ import annotations

from functools import lru_cache

from moeplan.schedules._legal import check_chunks, check_counts
from moeplan.schedules._one_chunk import num_virtual_stages as num_virtual_stages
from moeplan.schedules._one_chunk import virtual_stage as virtual_stage
from moeplan.schedules._order import Order, slots

CHUNKS: tuple[int, int | None] = (1, 1)
COPIES = 1


def check(num_stages: int, num_microbatches: int, *, num_chunks: int) -> None:
    """Raises PlanError unless there is a stage, a micro-batch and exactly one chunk a stage."""
    check_counts("gpipe", num_stages, num_microbatches)
    check_chunks("gpipe", num_chunks, 1)


@lru_cache(maxsize=64)
def actions(num_stages: int, num_microbatches: int, *, num_chunks: int) -> tuple[Order, ...]:
    """F of every micro-batch in order, then B of every micro-batch in order, alike on all stages."""
    check(num_stages, num_microbatches, num_chunks=num_chunks)
    return (slots("F", 0, num_microbatches) + slots("B", 0, num_microbatches),) * num_stages


def in_flight_limit(stage: int, num_stages: int, num_microbatches: int, *, num_chunks: int) -> int:
    """Every micro-batch: M."""
    return num_microbatches


def ideal_step_s(
    num_stages: int,
    num_microbatches: int,
    *,
    num_chunks: int,
    forward_s: float,
    input_gradient_s: float,
    weight_gradient_s: float,
) -> float:
    """(M + p - 1) (F + B), with B = I + W: exact for equal stages without communication.

    Reference: bubble share (p - 1) / (M + p - 1) of Huang et al. 2019, section 2.3.
    """
    return (num_microbatches + num_stages - 1) * (forward_s + input_gradient_s + weight_gradient_s)
