"""Where the chunks lie in schedules that hold one chunk a stage."""

from __future__ import annotations


def num_virtual_stages(num_stages: int, num_chunks: int) -> int:
    """One for each stage."""
    return num_stages


def virtual_stage(stage: int, chunk: int, *, num_stages: int, num_chunks: int) -> int:
    """The stage's own number."""
    return stage
