"""Where experts stand, as SGLang loads it: the JSON file of `--init-expert-location`."""

from __future__ import annotations

from pathlib import Path

from moeplan.domain.placement import ExpertMap
from moeplan.exporters._expert_rows import full_rows
from moeplan.exporters._files import suffix_of, write_atomically

SUFFIXES = (".json",)


def export(placing: ExpertMap, path: str | Path) -> None:
    """A file with `physical_to_logical_map`: the expert in each slot, for every layer of the model, dense ones too.

    A dense layer gets SGLang's own default, slot modulo experts. The engine is started with `--ep-size` GPUs of the
    placement and `--ep-num-redundant-experts` slots less experts, and splits an expert's tokens by its own rule: shares
    are not in the file. Reference: SGLang 0.5, `expert_location.py`.
    """
    suffix_of(path, SUFFIXES)
    trivial = tuple(slot % placing.num_experts for slot in range(placing.num_slots))
    rows = [", ".join(map(str, trivial if row is None else row)) for row in full_rows(placing)]
    lines = ",\n".join(f"  [{row}]" for row in rows)
    write_atomically(path, f'{{"physical_to_logical_map": [\n{lines}\n]}}\n')
