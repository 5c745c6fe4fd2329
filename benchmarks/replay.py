"""When is it worth placing experts anew? Each policy over a trace of routing, against an oracle that knows each step.

    python benchmarks/replay.py [--trace FILE [--array NAME] [--batch-tokens N]] [--gpus N --slots N] [--json]

Without a file the trace is drawn by the law of the router `drifting`: a model without balancing loss, 4 layers of 32
experts, every 100th iteration from 51 to 1051. Each step is scored under a placement that was found on earlier ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import moeplan as mp
from moeplan import menu

CASES: tuple[dict[str, int], ...] = ({}, {"window": 4}, {"max_moves": 8}, {"max_moves": 8, "window": 4})
"""What the policies that place anew are told."""


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="counts [step, layer, expert], or expert ids [token, layer, pick]")
    parser.add_argument("--array", help="which array of the .npz")
    parser.add_argument("--batch-tokens", type=int, help="the file holds expert ids; cut them into steps of so many")
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--slots", type=int, default=48)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    asked = parser.parse_args()
    trace: Any = drawn() if asked.trace is None else asked.trace
    found = [
        mp.replay(trace, array=asked.array, batch_tokens=asked.batch_tokens, gpus=asked.gpus, slots=asked.slots, **case)
        for case in CASES
    ]
    rows = [policy.record() for each in found for policy in each.policies if policy.options or each is found[0]]
    print(json.dumps(rows, indent=2) if asked.json else as_table(rows, found[0]))
    return 0


def drawn() -> Any:
    """Counts [step, layer, source, expert] of one run."""
    route = menu.load("routers", "drifting", "route")
    size = {"num_layers": 4, "num_experts": 32, "top_k": 2, "num_sources": 1, "tokens_per_source": 32768}
    return np.array(
        [route(**size, rng=np.random.default_rng(0), iteration=at).tokens_LSE for at in range(51, 1052, 100)]
    )


def as_table(rows: list[dict[str, Any]], replay: mp.Replay) -> str:
    """A line for each policy and what it was told, least regret first."""
    lines = [
        f"{replay.slots} replicas on {replay.num_gpus} GPUs, {replay.num_steps} steps of {len(replay.numbers)} layers",
        f"{'policy':<32}{'over mean':>11}{'95th of 100':>13}{'moves':>9}{'regret':>10}",
    ]
    for row in sorted(rows, key=lambda row: (row["regret"], row["moves"])):
        told = " ".join([row["policy"], *(f"{key}={value}" for key, value in row["options"].items())])
        figures = f"{row['mean_ratio']:>11.4f}{row['p95_ratio']:>13.4f}{row['moves']:>9,}{row['regret']:>10.2%}"
        lines.append(f"{told:<32}{figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
