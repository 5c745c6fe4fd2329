"""One forward, one backward in turn: GPipe's time with at most pp - s micro-batches held by stage s.

Reference: Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (PipeDream-Flush), ICML 2021.
"""

from __future__ import annotations

from functools import lru_cache

from moeplan.schedules._legal import check_chunks, check_counts
from moeplan.schedules._one_chunk import num_virtual_stages as num_virtual_stages
from moeplan.schedules._one_chunk import virtual_stage as virtual_stage
from moeplan.schedules._order import Order, alternate, slots

CHUNKS: tuple[int, int | None] = (1, 1)
COPIES = 1


def check(num_stages: int, num_microbatches: int, *, num_chunks: int) -> None:
    """Raises PlanError unless there is a stage, a micro-batch and exactly one chunk a stage."""
    check_counts("one_f_one_b", num_stages, num_microbatches)
    check_chunks("one_f_one_b", num_chunks, 1)


@lru_cache(maxsize=64)
def actions(num_stages: int, num_microbatches: int, *, num_chunks: int) -> tuple[Order, ...]:
    """Stage s: pp - s - 1 forwards to fill the pipeline, then F and B in turn, then the backwards that are left."""
    check(num_stages, num_microbatches, num_chunks=num_chunks)
    forwards, backwards = slots("F", 0, num_microbatches), slots("B", 0, num_microbatches)
    return tuple(alternate(forwards, backwards, num_stages - stage - 1) for stage in range(num_stages))


def in_flight_limit(stage: int, num_stages: int, num_microbatches: int, *, num_chunks: int) -> int:
    """min(M, pp - s)."""
    return min(num_microbatches, num_stages - stage)


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

    Reference: bubble (p - 1) (F + B) of Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
    Clusters Using Megatron-LM", SC 2021, section 2.2.1.
    """
    return (num_microbatches + num_stages - 1) * (forward_s + input_gradient_s + weight_gradient_s)
