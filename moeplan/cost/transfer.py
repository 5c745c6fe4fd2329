"""The least time of an exchange, whatever else is on the wires."""

from __future__ import annotations

import numpy as np

from moeplan.domain.program import Program


def wire_s(program: Program, meeting: int) -> float:
    """For each phase its delay and its busiest link: sum over phases of delay + max over links of bytes / capacity.

    No sharing of the links can be faster, since every byte crosses every link of its path.
    """
    flows, total = program.flows, 0.0
    size = program.exchanges[program.meetings[meeting].exchange].size_bytes
    for phase in program.meetings[meeting].phases:
        total += phase.delay_s(size)
        if phase.classes and size > 0:
            classes = list(phase.classes)
            bytes_C = np.where(
                flows.share_C[classes] > 0, flows.share_C[classes] * size + flows.extra_bytes_C[classes], 0
            )
            bytes_K = bytes_C @ flows.crossing_CK[classes]
            total += float((bytes_K / flows.capacity_bytes_per_s_K).max(initial=0.0))
    return total
