"""How much slower is an all-to-all beside gradients, and does it help to let it go first?

    python benchmarks/lina.py [--json]

Lina measured that all-to-alls of the backward pass take 1.83 times as long beside gradient traffic as alone (median;
worst 4.14), and repairs it with micro-ops of 30 MB that start only while no all-to-all is on or due (Li et al.,
"Accelerating distributed MoE training and inference with Lina", USENIX ATC 2023, sections 2.3 and 4.1).

Here: its testbed, 16 A100 in 4 machines with 100 Gbit/s each, and one step of a model of 12 blocks, every other one
with 16 experts, one on each GPU. The blocks are 4,096 wide, so that kernels take long enough for a micro-op to pass
between two all-to-alls; the paper's batch is not known. A slow-down is the time of one all-to-all over its time in a
step whose gradients come behind the backward pass. In `pairwise_rounds` a GPU has one flow at a time, as NCCL has few;
`linear` has all at once, 48 through each network card. The links are shared by flow, and gradients are four flows
there, so they hardly slow it down.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WIDTH = 4096
SEQUENCES = 4
"""Of 1,024 tokens, on each GPU."""
ALGORITHMS = ("pairwise_rounds", "linear")
ARBITRATIONS = ("fair", "fifo", "a2a_first")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The slow-downs of the all-to-alls of one backward pass, from the least to the worst, and the whole step."""

    all_to_all: str
    arbitration: str
    step_s: float
    alone_s: float
    slow_down: tuple[float, ...]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    asked = parser.parse_args()
    found = [row for algorithm in ALGORITHMS for row in rows(algorithm)]
    document = {"schema": "moeplan.lina/v1", "quantiles": QUANTILES, "rows": [asdict(row) for row in found]}
    print(json.dumps(document, indent=2) if asked.json else as_table(found))
    return 0


def rows(algorithm: str) -> list[Row]:
    """One for each arbitration."""
    alone_A, _ = all_to_alls_s(algorithm, "fair", beside=False)
    found = []
    for arbitration in ARBITRATIONS:
        beside_A, step_s = all_to_alls_s(algorithm, arbitration, beside=True)
        slow_down = tuple(np.quantile(beside_A / alone_A, QUANTILES).tolist())
        alone_s = float(np.median(alone_A))
        found.append(
            Row(all_to_all=algorithm, arbitration=arbitration, step_s=step_s, alone_s=alone_s, slow_down=slow_down)
        )
    return found


def all_to_alls_s(algorithm: str, arbitration: str, *, beside: bool) -> tuple[Any, float]:
    """Seconds of each all-to-all of the backward pass, with gradients beside or behind it; and of the step."""
    import moeplan as mp
    from moeplan.domain.program import Pass, Stream

    scenario = mp.load("lina-16xa100", changes())
    zero = 2 if beside else 1
    plan = mp.Plan(
        dp=16, ep=16, stages=(12,), zero_dense=zero, zero_expert=zero, micro_batch=SEQUENCES, all_to_all=algorithm,
        arbitration=arbitration, overlap_gradients=beside, capacity=scenario.choices.capacity,
        precision=scenario.choices.precision,
    )  # fmt: skip
    timeline = mp.simulate(scenario, plan).timeline
    tasks = timeline.program.tasks
    chosen = (tasks.stream_T == Stream.EXPERT) & (tasks.pass_T == Pass.BACKWARD) & (tasks.lane_T == 0)
    return (timeline.end_s_T - timeline.start_s_T)[chosen], timeline.step_s


def changes() -> dict[str, Any]:
    """From GPT-2's shape to the one that is said above; even routing, so that nobody waits for anybody."""
    heads = WIDTH // 128
    dense = {"kind": "dense", "width": 4 * WIDTH, "gated": False, "bias": True, "norm": "layer"}
    pair = [{"mixer": "attention", "feed_forward": name} for name in ("dense", "experts")]
    return {
        "routing.router": "balanced", "workload.global_batch": 16 * SEQUENCES, "model.hidden_size": WIDTH,
        "model.parts.attention.num_heads": heads, "model.parts.attention.num_kv_heads": heads,
        "model.parts.attention.head_dim": 128, "model.parts.experts.width": 4 * WIDTH, "model.parts.dense": dense,
        "model.layers": 6 * pair,
    }  # fmt: skip


def as_table(found: list[Row]) -> str:
    """Columns for people."""
    names = ("least", "1/4", "median", "3/4", "worst")
    lines = [f"{'all-to-all':16} {'arbitration':12} {'step':>9} {'alone':>9}  " + " ".join(f"{n:>6}" for n in names)]
    for row in found:
        slow = " ".join(f"{each:6.2f}" for each in row.slow_down)
        times = f"{1e3 * row.step_s:6.0f} ms {1e3 * row.alone_s:6.1f} ms"
        lines.append(f"{row.all_to_all:16} {row.arbitration:12} {times}  {slow}")
    return "\n".join([*lines, "", "Lina's measurement: median 1.83, worst 4.14; with its micro-ops about 1"])


if __name__ == "__main__":
    sys.exit(main())
