"""The step's summary: for each lane and each kind of task where the time went, as text, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.domain.timeline import Timeline
from moeplan.exporters._files import label, suffix_of, write_atomically
from moeplan.exporters._lanes import Busy, Kind, busy, ranks_text
from moeplan.units import show

SUFFIXES = (".txt", ".csv", ".json")


def export(timeline: Timeline, path: str | Path) -> None:
    """A file of one row for each lane, and one for all GPUs; as text also one for each kind of task.

    compute + exposed + idle is the step: exposed, an exchange runs and no kernel beside it; idle, nothing runs. The
    seconds of a kind may overlap with those of another. The row "all" is the mean over GPUs. CSV and JSON are in plain
    seconds, text in readable units. Raises MoeplanError for another suffix and for a path that cannot be written.
    """
    suffix = suffix_of(path, SUFFIXES)
    found = busy(timeline)
    rows = _rows(timeline, found)
    write = {".txt": _text, ".csv": _csv, ".json": _json}[suffix]
    write_atomically(path, write(timeline, found, rows))


def _rows(timeline: Timeline, found: Busy) -> list[dict[str, Any]]:
    lanes = timeline.program.lanes
    names = ["compute_s", "exposed_s", "idle_s", *map(_column, found.kinds)]
    seconds_LN = np.column_stack([found.compute_s_L, found.exposed_s_L, found.idle_s_L, found.kind_s_LK])
    weight_L = np.array([lane.multiplicity for lane in lanes], dtype=float)
    rows: list[dict[str, Any]] = [
        {"lane": number, "stage": lane.stage, "num_gpus": lane.multiplicity, "ranks": ranks_text(lane.ranks_R)}
        | dict(zip(names, seconds_LN[number].tolist(), strict=True))
        for number, lane in enumerate(lanes)
    ]
    mean = weight_L @ seconds_LN / max(weight_L.sum(), 1.0)
    total: dict[str, Any] = {"lane": "all", "stage": "", "num_gpus": int(weight_L.sum()), "ranks": ""}
    return [*rows, total | dict(zip(names, mean.tolist(), strict=True))]


def _column(kind: Kind) -> str:
    return f"{'exchange' if kind.is_exchange else 'compute'}_{label(kind.name)}_s"


def _csv(timeline: Timeline, found: Busy, rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _json(timeline: Timeline, found: Busy, rows: list[dict[str, Any]]) -> str:
    head = {
        "schema": "moeplan.table/v1",
        "source": timeline.source,
        "step_s": timeline.step_s,
        "num_gpus": timeline.program.num_gpus,
        "tokens_per_s_per_gpu": timeline.tokens_per_s_per_gpu if timeline.step_s else None,
    }
    return json.dumps(head | {"lanes": rows[:-1], "all": rows[-1], "kinds": _kinds(timeline, found)}, indent=1) + "\n"


def _kinds(timeline: Timeline, found: Busy) -> list[dict[str, Any]]:
    """One row for each kind: its tasks, its GPU seconds and their share of all GPU seconds of the step."""
    weight_L = np.array([lane.multiplicity for lane in timeline.program.lanes], dtype=float)
    whole = max(timeline.step_s * weight_L.sum(), 1e-300)
    return [
        {
            "kind": label(kind.name),
            "is_exchange": kind.is_exchange,
            "num_tasks": int(found.num_tasks_K[k]),
            "gpu_s": float(weight_L @ found.kind_s_LK[:, k]),
            "share_of_step": float(weight_L @ found.kind_s_LK[:, k]) / whole,
        }
        for k, kind in enumerate(found.kinds)
    ]


def _text(timeline: Timeline, found: Busy, rows: list[dict[str, Any]]) -> str:
    step = show(timeline.step_s, "s")
    speed = f", {show(timeline.tokens_per_s_per_gpu, 'tokens/s')} per GPU" if timeline.step_s else ""
    exchanges = [kind for kind in found.kinds if kind.is_exchange]
    names = ["compute_s", *map(_column, exchanges), "exposed_s", "idle_s"]
    heads = ["lane", "stage", "GPUs", "ranks", "compute", *(label(kind.name) for kind in exchanges), "exposed", "idle"]
    lanes = [
        [*(str(row[key]) for key in ("lane", "stage", "num_gpus", "ranks")), *(show(row[n], "s") for n in names)]
        for row in rows
    ]
    kinds = [
        [
            row["kind"],
            "exchange" if row["is_exchange"] else "compute",
            str(row["num_tasks"]),
            show(row["gpu_s"], "s"),
            show(row["share_of_step"], "share"),
        ]
        for row in _kinds(timeline, found)
    ]
    parts = [
        f"{timeline.source} step: {step} on {timeline.program.num_gpus} GPUs{speed}",
        _aligned(heads, lanes),
        _aligned(["kind", "runs on", "tasks", "GPU time", "of the step"], kinds),
        "exposed: an exchange runs and no kernel beside it; idle: nothing runs; all: the mean over GPUs.",
    ]
    return "\n\n".join(parts) + "\n"


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heads, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
