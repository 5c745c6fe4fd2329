"""Where experts stand, as TensorRT-LLM loads it: the load balancer of `moe_config` in its YAML of options."""

from __future__ import annotations

from pathlib import Path

from moeplan.domain.placement import ExpertMap
from moeplan.exporters._expert_rows import full_rows
from moeplan.exporters._files import suffix_of, write_atomically

SUFFIXES = (".yaml", ".yml")


def export(placing: ExpertMap, path: str | Path) -> None:
    """A file with `num_slots` and, for every layer with experts, the expert in each slot.

    `layer_updates_per_iter: 0` keeps experts where they are put. The engine splits an expert's tokens by its own rule:
    shares are not in the file. Reference: TensorRT-LLM, `examples/wide_ep/ep_load_balancer`.
    """
    suffix_of(path, SUFFIXES)
    rows = [(layer, row) for layer, row in enumerate(full_rows(placing)) if row is not None]
    lines = "".join(f"      {layer}: [{', '.join(map(str, row))}]\n" for layer, row in rows)
    write_atomically(
        path,
        "moe_config:\n  load_balancer:\n"
        f"    num_slots: {placing.num_slots}\n    initial_global_assignments:\n{lines}    layer_updates_per_iter: 0\n",
    )
