"""ZB-V: two chunks folded into a V, so that the first stage also computes the loss; no bubble where F = I = W.

Reference: Qi, Wan, Amar, Lin, "Pipeline Parallelism with Controllable Memory", NeurIPS 2024 (arXiv:2405.15362).
"""

from __future__ import annotations

from functools import lru_cache
from math import isclose

from moeplan.schedules._legal import check_chunks, check_counts
from moeplan.schedules._order import Kind, Order, slots

CHUNKS: tuple[int, int | None] = (2, 2)
COPIES = 1


def check(num_stages: int, num_microbatches: int, *, num_chunks: int) -> None:
    """Raises PlanError unless there are two stages, a micro-batch and exactly two chunks a stage."""
    check_counts("zbv", num_stages, num_microbatches, min_stages=2)
    check_chunks("zbv", num_chunks, 2)


def num_virtual_stages(num_stages: int, num_chunks: int) -> int:
    """Two for each stage."""
    return num_stages * num_chunks


def virtual_stage(stage: int, chunk: int, *, num_stages: int, num_chunks: int) -> int:
    """Down the stages with chunk 0 and back up with chunk 1."""
    return stage if chunk == 0 else 2 * num_stages - 1 - stage


@lru_cache(maxsize=64)
def actions(num_stages: int, num_microbatches: int, *, num_chunks: int) -> tuple[Order, ...]:
    """The order for at least 2 pp - 1 micro-batches, less the micro-batches that there are not."""
    check(num_stages, num_microbatches, num_chunks=num_chunks)
    return tuple(_order(stage, num_stages, num_microbatches) for stage in range(num_stages))


def _order(stage: int, num_stages: int, num_microbatches: int) -> Order:
    total = max(num_microbatches, 2 * num_stages - 1)
    following = {(kind, chunk): iter(slots(kind, chunk, total)) for kind in _KINDS for chunk in (0, 1)}
    order = (next(following[pass_]) for pass_ in _passes(stage, num_stages, total))
    return tuple(slot for slot in order if slot[0].microbatch < num_microbatches)


_KINDS: tuple[Kind, ...] = ("F", "I", "W")
_Pass = tuple[Kind, int]


def _passes(stage: int, num_stages: int, total: int) -> list[_Pass]:
    """Kind and chunk of each action; the micro-batches of one kind and chunk come in order."""
    down: list[_Pass] = [("F", 0)]
    turn: list[_Pass] = [("F", 1), ("I", 1), ("W", 1)]
    back: list[_Pass] = [("I", 0), ("W", 0)]
    both: list[_Pass] = [("I", 0), ("I", 1)]
    below = num_stages - stage
    num_down = total - (num_stages + below - 1)
    fill = down * (2 * below - 1) + (turn[:1] + down) * stage + turn * below
    steady = (down + back + turn) * num_down + (back + turn) * (total - num_stages - num_down)
    return fill + steady + both * stage + back * below + turn[2:] * stage + back[1:] * stage


def in_flight_limit(stage: int, num_stages: int, num_microbatches: int, *, num_chunks: int) -> int:
    """min(2 M, 2 pp) passes through one chunk, on every stage what 1F1B holds on its first."""
    return min(num_microbatches, num_stages) * num_chunks


def ideal_step_s(
    num_stages: int,
    num_microbatches: int,
    *,
    num_chunks: int,
    forward_s: float,
    input_gradient_s: float,
    weight_gradient_s: float,
) -> float | None:
    """2 M (F + I + W) + (p - 1) F, exact where F = I = W and M >= 2 p - 1; else None.

    No stage has a bubble between its first and its last action; (p - 1) F is how much later the last stage starts.
    Reference: Qi et al. 2024, which counts each stage from its own first action to its own last.
    """
    alike = isclose(forward_s, input_gradient_s) and isclose(forward_s, weight_gradient_s)
    if not alike or num_microbatches < 2 * num_stages - 1:
        return None
    work_s = forward_s + input_gradient_s + weight_gradient_s
    return num_microbatches * num_chunks * work_s + (num_stages - 1) * forward_s
