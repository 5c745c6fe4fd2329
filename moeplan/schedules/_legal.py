"""The sentences with which schedules refuse what they cannot run."""

from __future__ import annotations

from moeplan.errors import PlanError


def refuse(schedule: str, field: str, found: int, *, allowed: str, remedy: str) -> PlanError:
    """The error for one number that a schedule cannot take."""
    return PlanError(f"schedule {schedule}: {field}: {found} is not allowed, only {allowed}; {remedy}")


def check_counts(schedule: str, num_stages: int, num_microbatches: int, *, min_stages: int = 1) -> None:
    """Refuses fewer than `min_stages` stages, or no micro-batch."""
    if num_stages < min_stages:
        remedy = "use 1 or more" if min_stages == 1 else f"use {min_stages} or more, or schedule one_f_one_b"
        raise refuse(schedule, "num_stages", num_stages, allowed=f"{min_stages} or more", remedy=remedy)
    if num_microbatches < 1:
        raise refuse(schedule, "num_microbatches", num_microbatches, allowed="1 or more", remedy="use 1 or more")


def check_chunks(schedule: str, num_chunks: int, allowed: int) -> None:
    """Refuses every number of chunks but one."""
    if num_chunks != allowed:
        other = "interleaved" if num_chunks > 1 else "one_f_one_b"
        remedy = f"use {allowed}, or schedule {other}" if num_chunks > 0 else f"use {allowed}"
        raise refuse(schedule, "num_chunks", num_chunks, allowed=str(allowed), remedy=remedy)
