"""Plans on an emulated network: is what is predicted what happens, and is the plan that should be faster faster?

    sudo python benchmarks/emulation.py two four faster

`two`, `four`: so many nodes of one rank; `faster`: two nodes of two ranks, the planner's choice against the naive one.
An all-to-all lasts from when its last rank comes to it until its last rank leaves it. Predicted is the same program in
virtual time. All is printed as rows of a Markdown table, launch by launch: the median, and in brackets the coefficient
of variation of the launches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import moeplan as mp
from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.plan import Plan
from moeplan.domain.program import Program, Stream
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.emulator.emulate import Network, emulated
from moeplan.executor.execute import Job, execute_all
from moeplan.simulator.simulate import simulate
from moeplan.units import parse

LAUNCHES, STEPS = 3, 4
LONG_S = 0.010
MODEL = {
    "hidden_size": 256, "vocab_size": 256,
    "parts": {
        "attention": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
        "experts": {"kind": "experts", "num_experts": 16, "top_k": 4, "width": 64},
    },
    "layers": [{"repeat": 2, "mixer": "attention", "feed_forward": "experts"}],
}  # fmt: skip
FP32 = dict.fromkeys(
    ("compute", "weights", "activations", "gradients", "moments", "dispatch", "combine", "cache"), "fp32"
) | {"master_weights": None}


def scenario(cluster: str, ranks: int, sequence: int, choose: Mapping[str, Any]) -> Scenario:
    """Ranks on fewer cores than there are of them share these."""
    share = min(1.0, (os.cpu_count() or 1) / ranks)
    changes = {
        "cluster.gpu.peak_fp32": f"{95 * share} GFLOP/s", "cluster.gpu.memory_bandwidth": f"{23 * share} GB/s",
    }  # fmt: skip
    document = dict(catalogue.document("tiny-moe-2-ranks", {"cluster": cluster}))
    document |= {"model": MODEL, "routing": {"router": "multinomial"}}
    document["workload"] = {"phase": "train", "global_batch": ranks, "sequence": sequence}
    document["choose"] = {"capacity": {"rule": "dropless"}, "precision": FP32, **choose}
    return catalogue.load(document, changes=changes)


def plan(ranks: int, all_to_all: str) -> Plan:
    return Plan(dp=ranks, ep=ranks, stages=(2,), precision=FP32, all_to_all=all_to_all, zero_dense=1, zero_expert=0)


def exchanges_s(timeline: Timeline) -> np.ndarray:
    """Of each dispatch and combine, in the order of the program."""
    program = timeline.program
    return np.array([_lasts_s(timeline, tasks) for tasks in _together(program)])


def _together(program: Program) -> Iterator[np.ndarray]:
    """The tasks of the lanes of each dispatch and combine: the n-th of each lane."""
    of_lane = [
        [task for task in np.flatnonzero(program.tasks.lane_T == lane).tolist()
         if program.tasks.stream_T[task] == Stream.EXPERT] for lane in range(len(program.lanes))
    ]  # fmt: skip
    return (np.array(tasks) for tasks in zip(*of_lane, strict=True))


def _lasts_s(timeline: Timeline, tasks: np.ndarray) -> float:
    return float(timeline.end_s_T[tasks].max() - timeline.start_s_T[tasks].max())


def measured(given: Scenario, chosen: Plan) -> list[tuple[float, np.ndarray]]:
    """Step and all-to-alls of each launch."""
    found = []
    for _ in range(LAUNCHES):
        (run,) = execute_all([Job(scenario=given, plan=chosen, steps=STEPS)], device="cpu")
        found.append((run.timeline.step_s, exchanges_s(run.timeline)))
    return found


def predicted(given: Scenario, chosen: Plan) -> tuple[float, np.ndarray]:
    timeline = simulate(compile_plan(chosen, given, folded=False), CostModel(gpu=given.cluster.gpu))
    return timeline.step_s, exchanges_s(timeline)


def row(name: str, given: Scenario, chosen: Plan) -> tuple[float, float, float, float]:
    """Prints one; step and all-to-alls, predicted and measured."""
    launches, (step_s, each_s) = measured(given, chosen), predicted(given, chosen)
    steps, sums = np.array([s for s, _ in launches]), np.array([e.sum() for _, e in launches])
    is_long = each_s > LONG_S
    errors = [each_s[is_long] / np.median([e for _, e in launches], axis=0)[is_long] - 1]
    words = [
        name, chosen.all_to_all, f"{is_long.sum()}", f"{1e3 * each_s[is_long].mean():.1f}",
        f"{1e3 * np.median(sums) / len(each_s):.1f} ({100 * noise(sums):.1f} %)",
        f"{100 * np.mean(errors):+.1f}", f"{100 * np.abs(errors).mean():.1f} ({100 * np.abs(errors).max():.1f})",
        f"{1e3 * step_s:.0f}", f"{1e3 * np.median(steps):.0f} ({100 * noise(steps):.1f} %)",
        f"{100 * (step_s / np.median(steps) - 1):+.1f}",
    ]  # fmt: skip
    print("| " + " | ".join(words) + " |", flush=True)
    return step_s, float(np.median(steps)), float(each_s.sum()), float(np.median(sums))


def noise(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / values.mean())


def nodes(count: int, algorithms: tuple[str, ...], rates: tuple[str, ...], sequence: int) -> None:
    for rate in rates:
        network = Network(nodes=count, rate_bytes_per_s=parse(rate, "B/s"))
        with emulated(network) as file:
            given = scenario(str(file), count, sequence, {})
            for algorithm in algorithms:
                row(f"{count} x 1 at {rate}, {sequence} tokens", given, plan(count, algorithm))


def faster() -> None:
    """The planner's choice among all-to-alls, placement and layout given, against `linear`."""
    network, ranks = Network(nodes=2, rate_bytes_per_s=parse("100Mbit/s", "B/s"), ranks_per_node=2), 4
    with emulated(network) as file:
        layout = {"pp": 1, "tp": 1, "cp": 1, "ep": ranks, "etp": 1, "micro_batch": 1, "overlap_degree": 1,
                  "zero_dense": 1, "zero_expert": 0, "recompute": "none", "arbitration": "fair",
                  "all_to_all": ["linear", "two_stage", "node_dedup"]}  # fmt: skip
        given = scenario(str(file), ranks, 512, layout)
        chosen = mp.plan(given).plan
        print(f"the planner prefers {chosen.all_to_all}", file=sys.stderr)
        ours = row("2 x 2 at 100Mbit/s, 512 tokens", given, plan(ranks, chosen.all_to_all))
        naive = row("2 x 2 at 100Mbit/s, 512 tokens", given, plan(ranks, "linear"))
    for what, at in (("step", 0), ("all-to-alls", 2)):
        said, was = naive[at] / ours[at], naive[at + 1] / ours[at + 1]
        print(f"{what}: {said:.2f} times as fast predicted, {was:.2f} measured, {100 * (said / was - 1):+.1f} %")


def main() -> None:
    print("| network | all-to-all | over 10 ms | predicted, ms | measured, ms | bias, % | error (most), % "
          "| step predicted, ms | step measured, ms | error, % |")  # fmt: skip
    print("|" + "---|" * 10)
    for word in sys.argv[1:] or ["two", "four", "faster"]:
        if word == "two":
            nodes(2, ("linear",), ("1Gbit/s", "200Mbit/s", "100Mbit/s"), 1024)
        elif word == "four":
            nodes(4, ("linear", "pairwise_rounds"), ("200Mbit/s",), 512)
        else:
            faster()


if __name__ == "__main__":
    main()
