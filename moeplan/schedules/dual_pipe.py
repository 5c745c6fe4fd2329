"""DualPipe: micro-batches from both ends at once, so that one's forward runs beside another's backward.

Every stage holds two chunks of parameters, so each part of the model is held by two stages.
Reference: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024 (arXiv:2412.19437), section 3.2.1; the order of phases is
that of github.com/deepseek-ai/DualPipe.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from math import isclose

from moeplan.schedules._legal import check_chunks, check_counts, refuse
from moeplan.schedules._order import Action, Kind, Order

CHUNKS: tuple[int, int | None] = (2, 2)
COPIES = 2


def check(num_stages: int, num_microbatches: int, *, num_chunks: int) -> None:
    """Raises PlanError unless there are two chunks, an even number of stages, and even micro-batches, 2 pp or more."""
    check_counts("dual_pipe", num_stages, num_microbatches, min_stages=2)
    check_chunks("dual_pipe", num_chunks, 2)
    if num_stages % 2:
        remedy = f"use {num_stages - 1} or {num_stages + 1}"
        raise refuse("dual_pipe", "num_stages", num_stages, allowed="even numbers", remedy=remedy)
    if num_microbatches % 2 or num_microbatches < 2 * num_stages:
        allowed = f"even numbers from {2 * num_stages}, twice the stages"
        remedy = f"use {max(2 * num_stages, num_microbatches + 1)}"
        raise refuse("dual_pipe", "num_microbatches", num_microbatches, allowed=allowed, remedy=remedy)


def num_virtual_stages(num_stages: int, num_chunks: int) -> int:
    """One for each stage, each held twice."""
    return num_stages


def virtual_stage(stage: int, chunk: int, *, num_stages: int, num_chunks: int) -> int:
    """Chunk 0 runs down the stages, chunk 1 up."""
    return stage if chunk == 0 else num_stages - 1 - stage


@lru_cache(maxsize=64)
def actions(num_stages: int, num_microbatches: int, *, num_chunks: int) -> tuple[Order, ...]:
    """Micro-batches 0 .. M/2 - 1 enter at stage 0 as chunk 0, M/2 .. M - 1 at the last stage as chunk 1."""
    check(num_stages, num_microbatches, num_chunks=num_chunks)
    return tuple(_order(stage, num_stages, num_microbatches // 2) for stage in range(num_stages))


def _order(stage: int, num_stages: int, half: int) -> Order:
    """The passes as slots: 0 is the direction whose entry is nearer to this stage, W takes the I that waits longest."""
    depth = min(stage, num_stages - 1 - stage)
    flip = int(stage != depth)
    done = {("F", 0): 0, ("F", 1): 0, ("B", 0): 0, ("B", 1): 0}
    split: deque[Action] = deque()

    def action(kind: Kind, direction: int) -> Action:
        if kind == "W":
            return split.popleft()
        chunk, which = direction ^ flip, "F" if kind == "F" else "B"
        microbatch = done[which, chunk] + chunk * half
        done[which, chunk] += 1
        if kind == "I":
            split.append(Action("W", chunk, microbatch))
        return Action(kind, chunk, microbatch)

    return tuple(tuple(action(*pass_) for pass_ in slot) for slot in _passes(depth, num_stages, half))


_Passes = tuple[tuple[Kind, int], ...]


def _each(kind: Kind) -> tuple[_Passes, _Passes]:
    return ((kind, 0),), ((kind, 1),)


def _passes(depth: int, num_stages: int, half: int) -> list[_Passes]:
    """Kind and direction of each action of a stage `depth` stages from its nearer end, of pp / 2."""
    (f0, f1), (b0, b1), (i0, i1), (w, _) = _each("F"), _each("B"), _each("I"), _each("W")
    f0b1, f1b0 = f0 + b1, f1 + b0
    inner = num_stages // 2 - depth - 1
    fill = [f0] * 2 * inner + [f0, f1] * (depth + 1) + [i1, w, f1] * inner
    # The two stages in the middle do not pair their first F: its result is what the other one waits for.
    steady = ([f0b1, f1b0] if inner else [f0, b1, f1b0]) + [f0b1, f1b0] * (half - num_stages + depth)
    drain = [b1, f1b0] * inner + ([b1, b0] * (depth + 1))[: depth + 1] + ([i1, i0] * (depth + 1))[depth + 1 :]
    return fill + steady + drain + [w, i0] * inner + [w] * (depth + 1)


def in_flight_limit(stage: int, num_stages: int, num_microbatches: int, *, num_chunks: int) -> int:
    """pp + 1 passes through one chunk.

    Reference: table 2 of the DeepSeek-V3 report.
    """
    return num_stages + 1


def ideal_step_s(
    num_stages: int,
    num_microbatches: int,
    *,
    num_chunks: int,
    forward_s: float,
    input_gradient_s: float,
    weight_gradient_s: float,
) -> float | None:
    """M (F + B) + (p / 2 - 1) (F&B + B - 3 W), exact where F = I >= W or p = 2, with F&B = F + B; else None.

    So nothing is hidden here in a slot of two; what is, comes off with `finish_times` and its `pair_s`.
    Reference: table 2 of the DeepSeek-V3 report, where B is the whole backward.
    """
    if num_stages > 2 and (not isclose(forward_s, input_gradient_s) or weight_gradient_s > forward_s):
        return None
    backward_s = input_gradient_s + weight_gradient_s
    pair_s = forward_s + backward_s
    return num_microbatches * pair_s + (num_stages // 2 - 1) * (pair_s + backward_s - 3 * weight_gradient_s)
