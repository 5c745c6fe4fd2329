"""What is printed beside a step: its interval and what that rests on; `--strict`; and bad rows of one's own."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moeplan.cli import app

MEASURED, ASSUMED = ["small-4-gpus"], ["small-4-gpus", "--set", "cluster.gpu=mi300x"]
_SIZE = r"(\d+(?:\.\d+)? \w+)"
STEP = re.compile(rf"{_SIZE} \({_SIZE} \.\. {_SIZE}, tier: (\w+)\)")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_step_is_printed_with_its_interval_and_its_tier(command: str) -> None:
    found = run(command, *MEASURED)
    assert found.exit_code == 0, found.output
    step = STEP.search(" ".join(found.stdout.split()))
    assert step is not None, found.stdout
    assert step[4] == "interpolated"
    document = json.loads(run(command, *MEASURED, "--json").stdout)
    low_s, high_s = document["step_interval_s"]
    assert 0 < low_s < document["step_s"] < high_s
    assert document["tier"] == "interpolated"


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_strict_lets_pass_what_was_measured(command: str) -> None:
    assert run(command, *MEASURED, "--strict").exit_code == 0


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_strict_refuses_what_is_only_assumed(command: str) -> None:
    assert "tier: assumed" in " ".join(run(command, *ASSUMED).stdout.split())
    found = run(command, *ASSUMED, "--strict")
    assert found.exit_code == 2
    assert found.stdout == ""
    words = " ".join(found.stderr.split())
    assert "--strict: nothing of mi300x was measured" in words
    assert "leave --strict out" in words


# ---- rows of one's own


ROW: dict[str, Any] = {
    "kind": "training_e2e", "completeness": "A", "source": {"name": "here"},
    "model": {
        "name": "small", "layers": 2, "moe_layers": 2, "hidden": 1024, "moe_ffn": 1024, "experts": 8, "top_k": 2,
        "heads": 8, "attention": "MHA", "vocab": 32000, "seq_len": 1024,
    },
    "hardware": {"gpu": "H100 SXM 80GB", "count": 8},
    "parallel": {
        "tp": 1, "pp": 1, "ep": 4, "mbs": 1, "gbs": 64, "precision": "BF16", "recompute": "none", "sharding": "ZeRO-1",
        "dispatcher": "alltoall", "routing": "force-balanced", "cuda_graphs": "full_iteration",
    },
    "measured": {"step_time_s": 0.02},
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-gpu": ({"hardware": {"gpu": "TPU v9"}}, "unknown GPU 'TPU v9'"),
    "does-not-fit": ({"model": {"moe_ffn": 65536, "hidden": 16384, "layers": 64, "moe_layers": 64}}, "does not fit"),
    "does-not-divide": ({"parallel": {"tp": 3}}, "does not divide 8 GPUs"),
    "experts-do-not-divide": ({"parallel": {"ep": 3}}, "ep 3"),
    "zero": ({"measured": {"step_time_s": 0.0}}, "found 0.0, which nothing measures"),
    "nan": ({"measured": {"step_time_s": math.nan}}, "found nan, which nothing measures"),
    "tokens-as-seconds": ({"measured": {"step_time_s": 3.3e6}}, "is it in another unit"),
}


def changed(changes: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    row = copy.deepcopy(ROW) | {"id": name}
    for section, fields in changes.items():
        row[section] |= fields
    return row


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps({"records": rows}), encoding="utf-8")
    return str(path)


def test_bad_rows_are_named_and_left_out_after_all_that_is_right(tmp_path: Path) -> None:
    rows = [changed({}, "good"), *(changed(changes, name) for name, (changes, _) in BAD.items())]
    path = written(tmp_path, rows)
    found = run("accuracy", "--results", path, "--json")
    assert found.exit_code == 1
    document = json.loads(found.stdout)
    assert [row["id"] for row in document["rows"]] == ["good"]
    assert document["summary"]["training_e2e"]["A"]["n"] == 1
    reasons = {each["id"]: each["reason"] for each in document["excluded"]}
    assert reasons.keys() == BAD.keys()
    for name, (_, words) in BAD.items():
        assert words in reasons[name], (name, reasons[name])
    shown = run("accuracy", "--results", path)
    assert shown.exit_code == 1
    assert "constants are fitted" in shown.stdout  # the last line: the output is whole
    assert all(name in shown.stdout for name in ("good", *BAD))


@pytest.mark.parametrize("changes", [{"completeness": "B"}, {"scorable": False}])
def test_bad_rows_that_need_not_count_are_no_failure(tmp_path: Path, changes: dict[str, Any]) -> None:
    rows = [changed({}, "good"), changed(BAD["unknown-gpu"][0], "bad") | changes]
    found = run("accuracy", "--results", written(tmp_path, rows), "--json")
    assert found.exit_code == 0
    assert [each["id"] for each in json.loads(found.stdout)["excluded"]] == ["bad"]
