"""The least time of an exchange, whatever else is on the wires."""

from __future__ import annotations

import numpy as np

from moeplan.domain.program import Floats, Phase, Program


def wire_s(program: Program, meeting: int) -> float:
    """For each phase its delay and its busiest link: sum over phases of delay + max over links of bytes / capacity.

    No sharing of the links can be faster, since every byte crosses every link of its path.
    """
    total = 0.0
    size = program.exchanges[program.meetings[meeting].exchange].size_bytes
    for phase in program.meetings[meeting].phases:
        total += phase.delay_s(size)
        total += float(link_s_K(program, phase, size).max(initial=0.0))
    return total


def link_s_K(program: Program, phase: Phase, size_bytes: float) -> Floats:
    """Seconds for which one phase of an exchange of `size_bytes` keeps each link busy; empty if nothing is sent."""
    if not phase.classes or size_bytes <= 0:
        return np.empty(0)
    flows, classes = program.flows, list(phase.classes)
    bytes_C = np.where(
        flows.share_C[classes] > 0, flows.share_C[classes] * size_bytes + flows.extra_bytes_C[classes], 0
    )
    seconds_K: Floats = (bytes_C @ flows.crossing_CK[classes]) / flows.capacity_bytes_per_s_K
    return seconds_K
