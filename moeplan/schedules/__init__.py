"""Pipeline schedules: in which order each stage runs the passes of its micro-batches.

One file is one schedule. It has

    CHUNKS: tuple[int, int | None]      fewest and most chunks a stage may hold (None: no limit)
    COPIES: int                         how many stages of a pipeline hold each part of the model
    check(num_stages, num_microbatches, *, num_chunks) -> None              PlanError on what is illegal
    num_virtual_stages(num_stages, num_chunks) -> int                       parts that the model is cut into
    virtual_stage(stage, chunk, *, num_stages, num_chunks) -> int           position of a chunk in model order
    actions(num_stages, num_microbatches, *, num_chunks) -> tuple[Order, ...]                  one order per stage
    in_flight_limit(stage, num_stages, num_microbatches, *, num_chunks) -> int                 passes held, F to B or W
    ideal_step_s(num_stages, num_microbatches, *, num_chunks, forward_s, input_gradient_s, weight_gradient_s)
        -> float | None          equal stages, no communication, seconds per pass; None where no formula is exact

An order is a tuple of slots, a slot one `Action(kind, chunk, microbatch)` or two that run together. A slot of two has
its F first. Micro-batches are numbered 0 .. M - 1 and each passes each virtual stage once.

The law (tests/contracts/test_schedules.py), for every legal number of stages, micro-batches and chunks: each virtual
stage sees each micro-batch in exactly one F and either one B or one I and, later, one W; the orders never deadlock; no
stage holds more than `in_flight_limit` says; the step is never shorter than the work of a stage; and where
`ideal_step_s` is a number, `finish_times` arrives at exactly that.

A complete schedule, one micro-batch at a time and therefore slow:

    from moeplan.schedules._legal import check_chunks, check_counts
    from moeplan.schedules._one_chunk import num_virtual_stages, virtual_stage
    from moeplan.schedules._order import slots

    CHUNKS, COPIES = (1, 1), 1

    def check(num_stages, num_microbatches, *, num_chunks):
        check_counts("in_turn", num_stages, num_microbatches)
        check_chunks("in_turn", num_chunks, 1)

    def actions(num_stages, num_microbatches, *, num_chunks):
        check(num_stages, num_microbatches, num_chunks=num_chunks)
        pairs = zip(slots("F", 0, num_microbatches), slots("B", 0, num_microbatches), strict=True)
        return (tuple(slot for pair in pairs for slot in pair),) * num_stages

    def in_flight_limit(stage, num_stages, num_microbatches, *, num_chunks):
        return 1

    def ideal_step_s(num_stages, num_microbatches, *, num_chunks, forward_s, input_gradient_s, weight_gradient_s):
        return num_microbatches * num_stages * (forward_s + input_gradient_s + weight_gradient_s)
"""

from moeplan.schedules._order import (
    Action,
    Kind,
    Order,
    Paths,
    Slot,
    Times,
    awaiting_weight_gradient,
    finish_times,
    in_flight,
    peak_held,
)

__all__ = [
    "Action",
    "Kind",
    "Order",
    "Paths",
    "Slot",
    "Times",
    "awaiting_weight_gradient",
    "finish_times",
    "in_flight",
    "peak_held",
]
