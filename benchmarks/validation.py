"""How far off the simulator is on the machine at hand: shipped scenarios predicted, run and joined, into a table.

    moeplan calibrate --out my-host.yaml
    python benchmarks/validation.py --cost-model my-host.yaml --out benchmarks/validation.md

Each case is one call of `moeplan validate`; with `--folder` what it found is kept there and not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import moeplan as mp
from moeplan.validator.validate import document

TWO, FOUR = "tiny-moe-2-ranks", "tiny-moe-4-ranks"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one rank": (TWO, {"cluster.gpus_per_node": 1}),
    "ep": (TWO, {"choose.ep": 2, "choose.overlap_degree": 1, "choose.pp": 1, "choose.tp": 1}),
    "pp, 1F1B": (TWO, {"choose.pp": 2, "choose.schedule": "one_f_one_b"}),
    "pp, GPipe": (TWO, {"choose.pp": 2, "choose.schedule": "gpipe"}),
    "pp, interleaved": (TWO, {"choose.pp": 2, "choose.vpp": 2, "choose.schedule": "interleaved"}),
    "tp and ep": (TWO, {"choose.tp": 2, "choose.ep": 2}),
    "skewed routing": (TWO, {"routing.skew": 1.2, "choose.ep": 2, "choose.overlap_degree": 1, "choose.tp": 1}),
    "overlap 2": (TWO, {"choose.ep": 2, "choose.overlap_degree": 2, "choose.tp": 1}),
    "overlap 4": (TWO, {"choose.ep": 2, "choose.overlap_degree": 4, "choose.tp": 1}),
    "replicas": (TWO, {"choose.ep": 2, "choose.overlap_degree": 1, "choose.tp": 1, "routing.skew": 1.2}),
    "4 ranks: dp, ep, ZeRO": (FOUR, {"choose.ep": 2, "choose.dp": 4, "choose.zero_dense": 2}),
    "4 ranks: ep 4": (FOUR, {"choose.ep": 4, "choose.dp": 4, "choose.overlap_degree": 1}),
}  # fmt: skip
REPLICAS = {"experts": [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 4}
"""Two experts stand on both ranks."""


def measured(name: str, *, cost_model: str, launches: int, steps: int) -> dict[str, Any]:
    """One case."""
    origin, changes = CASES[name]
    scenario = mp.load(mp.load(origin, {"cluster.gpu": cost_model}), changes)
    plan = mp.plan(scenario).plan
    if name == "replicas":
        plan = type(plan).model_validate(plan.model_dump(mode="json", by_alias=True) | {"placement": REPLICAS})
    return document(mp.validate(scenario, plan, launches=launches, steps=steps))


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    step, memory = found["step"], next(iter(found["memory"].values()))
    share, seconds = (lambda value: f"{100 * value:+.1f} %"), (lambda value: f"{1e3 * value:.0f} ms")
    return " | ".join(
        [
            f"| {name}", seconds(step["predicted_s"]), seconds(step["measured_s"]), share(step["error"]),
            f"{100 * step['noise']:.1f} %", share(found["bias"]), share(memory["error"]),
            f"{100 * (found['speed'] or 1):.0f} %", f"{found['dropped_repetitions']} of {found['repetitions']}",
            "yes" if found["within_tolerance"] else "no", "",
        ]
    ).rstrip()  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """All lines."""
    heads = ("case", "predicted", "measured", "error", "noise", "computation", "memory", "speed", "dropped", "within")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(row(name, found) for name, found in results.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost-model", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    folder, results = given.folder or Path(tempfile.mkdtemp()), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        path = folder / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}.json"
        if name in given.only and not path.exists():
            found = measured(name, cost_model=given.cost_model, launches=given.launches, steps=given.steps)
            path.write_text(json.dumps(found))
            print(row(name, found), flush=True)
        if path.exists():
            results[name] = json.loads(path.read_text())
    if given.out:
        given.out.write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
