"""The least time of an exchange, whatever else is on the wires."""

from __future__ import annotations

from moeplan.domain.program import Program


def wire_s(program: Program, meeting: int) -> float:
    """For each phase its latency and its busiest link: sum over phases of latency + max over links of bytes / capacity.

    No sharing of the links can be faster, since every byte crosses every link of its path.
    """
    flows, total = program.flows, 0.0
    size = program.exchanges[program.meetings[meeting].exchange].size_bytes
    for phase in program.meetings[meeting].phases:
        total += phase.latency_s
        if phase.classes:
            classes = list(phase.classes)
            bytes_K = flows.share_C[classes] @ flows.crossing_CK[classes] * size
            total += float((bytes_K / flows.capacity_bytes_per_s_K).max(initial=0.0))
    return total
