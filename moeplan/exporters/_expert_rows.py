"""What all formats of expert maps ask: an expert in every slot."""

from __future__ import annotations

from moeplan.domain.placement import EMPTY, ExpertMap
from moeplan.errors import MoeplanError


def full_rows(placing: ExpertMap) -> tuple[tuple[int, ...] | None, ...]:
    """The rows of a map without empty slots. MoeplanError if there are some, since engines know none."""
    if any(row is not None and EMPTY in row for row in placing.rows):
        per_gpu = -(-placing.num_experts // placing.num_gpus)
        slots = " or ".join(str(placing.num_gpus * (per_gpu + more)) for more in range(2))
        raise MoeplanError(
            f"placing: {placing.num_slots} slots on {placing.num_gpus} GPUs are not all full, and engines want an "
            f"expert in each; place with slots that the GPUs divide, such as {slots}"
        )
    return placing.rows
