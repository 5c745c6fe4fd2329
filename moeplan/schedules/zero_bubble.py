"""ZB-H1: the backward in two halves; weight gradients wait and fill part of 1F1B's bubble, at 1F1B's peak memory.

Reference: Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024 (arXiv:2401.10241), section 2.1.
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
    """Raises PlanError unless there are two stages, a micro-batch and exactly one chunk a stage."""
    check_counts("zero_bubble", num_stages, num_microbatches, min_stages=2)
    check_chunks("zero_bubble", num_chunks, 1)


@lru_cache(maxsize=64)
def actions(num_stages: int, num_microbatches: int, *, num_chunks: int) -> tuple[Order, ...]:
    """1F1B's order with I in place of B; stage s runs each W after s further I, so that it holds no more than pp."""
    check(num_stages, num_microbatches, num_chunks=num_chunks)
    return tuple(_order(stage, num_stages, num_microbatches) for stage in range(num_stages))


def _order(stage: int, num_stages: int, num_microbatches: int) -> Order:
    forwards, inputs, weights = (slots(kind, 0, num_microbatches) for kind in ("F", "I", "W"))
    warm_up = num_stages - stage - 1
    order = list(forwards[:warm_up])
    for turn in range(num_microbatches):
        order += forwards[warm_up + turn : warm_up + turn + 1]
        order.append(inputs[turn])
        order += weights[max(turn - stage, 0) : max(turn - stage + 1, 0)]
    order += weights[max(num_microbatches - stage, 0) :]
    return tuple(order)


def in_flight_limit(stage: int, num_stages: int, num_microbatches: int, *, num_chunks: int) -> int:
    """min(M, pp), on every stage what 1F1B holds on its first: from F to I it is pp - s, and s more wait for W."""
    return min(num_microbatches, num_stages)


def ideal_step_s(
    num_stages: int,
    num_microbatches: int,
    *,
    num_chunks: int,
    forward_s: float,
    input_gradient_s: float,
    weight_gradient_s: float,
) -> float | None:
    """M (F + I + W) + (p - 1) (F + I - W), exact where W is no longer than F and than I; else None.

    With fewer micro-batches than stages the first min(M, p) - 1 W fall into the bubble instead of p - 1.
    Reference: the bubble of ZB-H1 in Qi et al. 2024, whose B is I here.
    """
    if weight_gradient_s > min(forward_s, input_gradient_s):
        return None
    filled = min(num_microbatches, num_stages) - 1
    work_s = num_microbatches * (forward_s + input_gradient_s + weight_gradient_s)
    return work_s + (num_stages - 1) * (forward_s + input_gradient_s) - filled * weight_gradient_s
