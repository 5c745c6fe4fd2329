"""vTrain's 1,549 measured steps of dense GPT models on A100, predicted without any refit.

    git clone https://github.com/VIA-Research/vTrain
    python benchmarks/vtrain.py vTrain/data [--every 10]

The data (MIT licence) is not shipped. What a row leaves open is as vTrain's own files state it: Megatron-DeepSpeed
(data/README.md), 16-bit floats, scores of attention through memory by a kernel of their own and full recomputation
(src/model/gpt_modeling.py, src/config.py), gradients reduced after the backward pass in 16 bits (use_gradient_bucket:
false), nodes of eight GPUs with 800 Gbit/s between them (config/validation). GPT-2's vocabulary is padded to a
multiple of 128 for each tensor-parallel rank, as Megatron does.
Reference: Bang et al., "vTrain: a simulation framework for evaluating cost-effective and compute-optimal large language
model training", MICRO 2024.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplan.accuracy import assess
from moeplan.accuracy.scores import Row, summary_of

FILES = ("ground_truth_single.csv", "ground_truth_multi.csv")
_VOCABULARY, _ALIGNED = 50257, 128


def record_of(row: Mapping[str, str], name: str) -> dict[str, Any]:
    """A row as a record of `moeplan accuracy --results`."""
    number = {key: int(row[column]) for key, column in _COLUMNS.items()}
    hidden, heads, tp = number["hidden"], number["heads"], number["tp"]
    aligned = _ALIGNED * tp
    return {
        "id": name, "kind": "training_e2e", "completeness": "A",
        "source": {"name": "VIA-Research/vTrain", "ref": "data", "table": name.rpartition(":")[0]},
        "model": {
            "name": f"GPT {number['layers']} x {hidden}", "key": "gpt", "layers": number["layers"], "hidden": hidden,
            "dense_ffn": 4 * hidden, "heads": heads, "kv_heads": heads, "head_dim": hidden // heads, "attention": "MHA",
            "vocab": -(-_VOCABULARY // aligned) * aligned, "seq_len": number["seq_len"],
        },
        "hardware": {
            "gpu": "A100 SXM 80GB", "count": number["count"], "gpus_per_node": 8,
            "inter_nic": "800 Gb/s InfiniBand per node",
        },
        "parallel": {
            "tp": tp, "dp": number["dp"], "pp": number["pp"], "vpp": 1, "ep": 1, "cp": 1, "mbs": number["mbs"],
            "gbs": number["gbs"], "precision": "FP16", "sharding": "none, fp16 gradients", "recompute": "full",
            "attention": "unfused", "sequence_parallel": False, "cuda_graphs": "none", "overlap_grad_reduce": False,
            "overlap_tp_comm": False,
        },
        "measured": {"step_time_s": float(row["iteration time (ms)"]) / 1e3},
    }  # fmt: skip


_COLUMNS = {
    "count": "# GPUs", "gbs": "global batch", "mbs": "micro batch", "hidden": "hidden size", "heads": "attention heads",
    "layers": "# layers", "seq_len": "sequence length", "tp": "tensor parallelism", "dp": "data parallelism",
    "pp": "pipeline parallelism",
}  # fmt: skip


def records(folder: Path, *, every: int) -> list[dict[str, Any]]:
    """Each `every`-th row of both files."""
    found = []
    for name in FILES:
        with (folder / name).open(encoding="utf-8-sig", newline="") as file:
            found += [record_of(row, f"{name}:{number}") for number, row in enumerate(csv.DictReader(file), 2)]
    return found[::every]


def _line(name: str, rows: Sequence[Row]) -> str:
    found = summary_of(rows)
    words = (f"{100 * share:.1f} %" for share in (found.median_error, found.p90_error))
    return f"| {name} | {found.n} | {' | '.join(words)} | {100 * found.bias:+.1f} % | {100 * found.coverage:.0f} % |"


def main() -> None:
    """A table by number of GPUs, and what was not predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="vTrain's folder data/")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th row")
    parser.add_argument("--json", type=Path, help="also write every row's prediction")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vtrain.json"
        path.write_text(json.dumps(records(options.folder, every=options.every)), encoding="utf-8")
        found = assess(path)
    if options.json:
        options.json.write_text(json.dumps(found.document()), encoding="utf-8")
    by_scale: dict[int, list[Row]] = {}
    for row in found.rows:
        by_scale.setdefault(int(row.tags["scale"]), []).append(row)
    print("| GPUs | n | median | p90 | bias | covered |\n| --- | --- | --- | --- | --- | --- |")
    for scale, rows in sorted(by_scale.items()):
        print(_line(str(scale), rows))
    print(_line("all", found.rows))
    for each in found.excluded:
        print(f"not predicted: {each.id}: {each.reason}")


if __name__ == "__main__":
    main()
