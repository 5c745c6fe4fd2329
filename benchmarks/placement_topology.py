"""Is placement by the cluster's shape as good, as well proven and as fast as claimed? Ours beside EPLB's idea.

    python benchmarks/placement_topology.py                made loads, two minutes
    python benchmarks/placement_topology.py --trace FILE.npz   also a recorded trace, four minutes

A trace is an npz with `topk_NAME[token, layer, choice]` for each task. Its first nodes get one task, others another.
Made loads are lognormal: 0.8 wide over experts, and 0.6 wide over the nodes of an expert where nodes differ. Prices are
of DeepSeek-V3's size: 0.147 us in an expert, 0.159 us over a node's NICs, 0.045 us over NVLink, combine twice dispatch.

EPLB's placement is given what it lacks, the best routing of tokens to its replicas ("EPLB"), and is also shown as it
is, split evenly ("even"). "below" compares ours with the first, and "could" is what the bound leaves to any placement:
where that is less than the target, nobody can meet it. Values are the checker's. Seconds are CPU seconds of one layer,
without compilation. Of a trace, the first half of each node's tokens decides, placement and routing, and "held out" is
scored on the second half; so it is for node visits, where groups aim at 1.02 times the mean load, so that tokens that
nobody has seen stay within 1.05. Exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import PlacementProblem, TokenPrices
from moeplan.domain.routing import TokenSets
from moeplan.placers import eplb
from moeplan.placers._makespan import optimal_routing, value_s
from moeplan.placers._nodes import place
from moeplan.placers._visits import grouped, visits, visits_bound

PRICES = TokenPrices(gpus_per_node=8, compute_s=0.147e-6, nic_s=0.159e-6, nvlink_s=0.045e-6, exchange_factor=3.0)
COPIES_PER_GPU = 4096 * 8
AIMED_LOAD, MOST_LOAD = 1.02, 1.05
"""Of the fullest node over the mean one: what groups are made for, and what is wanted on seen and unseen tokens."""
Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A layer, and what is claimed for it."""

    what: str
    problem: PlacementProblem
    most_gap: float
    least_below: float
    most_s: float = 10.0
    held_out: PlacementProblem | None = None
    """The same layer's tokens that did not decide."""


def made(*, experts: int, nodes: int, slots: int, differ: bool, seed: int) -> PlacementProblem:
    """A layer of made loads on nodes of 8 GPUs."""
    rng = np.random.default_rng(seed)
    tokens_SE = np.exp(0.8 * rng.standard_normal(experts))[None, :]
    if differ:
        tokens_SE = tokens_SE * np.exp(0.6 * rng.standard_normal((nodes, experts)))
    scale = COPIES_PER_GPU * PRICES.gpus_per_node * (1 if differ else nodes)
    tokens_SE = np.round(tokens_SE / tokens_SE.sum(axis=1, keepdims=True) * scale)
    return PlacementProblem(
        tokens_SE=tokens_SE, num_gpus=nodes * PRICES.gpus_per_node, slots=slots, split="optimal", prices=PRICES
    )


def made_cases() -> Iterator[Case]:
    """4 and 8 nodes, then 16 and 18, of which loads differ most in how hard they are: three of each."""
    for nodes, slots in ((4, 288), (4, 320), (8, 320), (8, 384)):
        for differ in (True, False):
            problem = made(experts=256, nodes=nodes, slots=slots, differ=differ, seed=0)
            what = f"made, {nodes} nodes{' that differ' if differ else ''}, 256 experts, {slots} slots"
            yield Case(what=what, problem=problem, most_gap=0.01, least_below=0.15 if differ else 0.03)
    for experts, nodes, slots in ((256, 18, 288), (128, 16, 128), (128, 16, 256)):
        for seed in range(3):
            problem = made(experts=experts, nodes=nodes, slots=slots, differ=True, seed=seed)
            what = f"made, {nodes} nodes that differ, {experts} experts, {slots} slots ({seed})"
            yield Case(what=what, problem=problem, most_gap=0.05, least_below=0.15)


def recorded_cases(tasks: list[Tokens], *, nodes: int = 4) -> Iterator[Case]:
    """Layers of the trace on nodes of 4 GPUs, each node with its part of one task, or all with the same mix."""
    experts = 1 + max(int(task.max()) for task in tasks)
    for layer, share in ((0, 1.0), (0, 1.5), (8, 1.5), (16, 2.0), (25, 1.0)):
        parts = [part for task in tasks for part in np.array_split(task[:, layer], nodes // len(tasks))]
        slots, prices = int(experts * share), replace(PRICES, gpus_per_node=4)
        halves = [[np.bincount(np.array_split(part, 2)[half].ravel(), minlength=experts) for part in parts]
                  for half in (0, 1)]  # fmt: skip
        decide, score = (
            PlacementProblem(
                tokens_SE=np.array(half, np.float64), num_gpus=4 * nodes, slots=slots, split="optimal", prices=prices
            )
            for half in halves
        )
        what = f"recorded layer {layer}, {nodes} nodes, {slots} slots"
        yield Case(what=f"{what}, a task each", problem=decide, most_gap=0.01, least_below=0.15, held_out=score)
        decide, score = (replace(half, tokens_SE=_mixed(half, nodes)) for half in (decide, score))
        yield Case(what=f"{what}, all alike", problem=decide, most_gap=0.01, least_below=0.03, held_out=score)


def _mixed(problem: PlacementProblem, nodes: int) -> npt.NDArray[np.float64]:
    """The same tokens, as many of each expert from every node."""
    return np.repeat(problem.tokens_E[None, :] / nodes, nodes, axis=0)


def print_case(case: Case) -> bool:
    """Prints a row; whether all targets are met."""
    begin = time.process_time()
    found = place(case.problem, rng=np.random.default_rng(0), time_limit_s=10.0)
    cpu_s = time.process_time() - begin
    theirs = eplb.place(replace(case.problem, split="even"), rng=np.random.default_rng(0), time_limit_s=10.0)
    routed = optimal_routing(case.problem, theirs.placement.expert_R, theirs.placement.gpu_R)
    eplb_s = value_s(case.problem, routed)
    below, could = 1 - found.value / eplb_s, 1 - found.lower_bound / eplb_s
    is_met = found.gap <= case.most_gap and cpu_s <= case.most_s and below >= case.least_below
    held_out = "-"
    if case.held_out is not None:
        held_out = f"{1 - value_s(case.held_out, found.placement) / value_s(case.held_out, routed):.1%}"
    seconds = "".join(f"{each * 1e6:9.0f}" for each in (theirs.value, eplb_s, found.value))
    print(
        f"{case.what:58}{seconds}{below:8.1%}{held_out:>9}{could:8.1%}"
        f"{found.gap:8.2%}{cpu_s:7.1f}  {'yes' if is_met else 'NO':5}{found.proof.split(':')[0]}",
        flush=True,
    )
    return is_met


def print_visits(tasks: list[Tokens], *, nodes: int) -> bool:
    """Prints the mean over layers of node visits on held-out tokens; whether a fifth is saved."""
    experts = 1 + max(int(task.max()) for task in tasks)
    found, begin = [], time.process_time()
    for layer in range(tasks[0].shape[1]):
        halves = [np.array_split(task[:, layer], 2) for task in tasks]
        decide, score = (TokenSets.of(np.concatenate([half[part] for half in halves])) for part in (0, 1))
        node_E = grouped(
            decide, num_experts=experts, num_nodes=nodes, rng=np.random.default_rng(0), most_load=AIMED_LOAD
        )
        loads_N = [
            np.bincount(node_E[sets.experts_UK].ravel(), np.repeat(sets.count_U, sets.experts_UK.shape[1]), nodes)
            for sets in (decide, score)
        ]
        in_turn_E = np.arange(experts) * nodes // experts
        found.append([
            visits(score, in_turn_E), visits(score, node_E), visits(decide, in_turn_E), visits(decide, node_E),
            visits_bound(decide, num_experts=experts, num_nodes=nodes), *(load.max() / load.mean() for load in loads_N),
        ])  # fmt: skip
    linear, ours, linear_in, ours_in, bound, load_in, load = np.mean(found, axis=0)
    is_met = bool(1 - ours / linear >= 0.20 and max(load_in, load) <= MOST_LOAD)
    print(
        f"{nodes:5}{linear:9.3f}{ours:8.3f}{ours / linear - 1:9.1%}{ours_in / linear_in - 1:11.1%}{bound:9.3f}"
        f"{load_in:9.3f}{load:9.3f}{time.process_time() - begin:8.1f}  {'yes' if is_met else 'NO'}",
        flush=True,
    )
    return is_met


def main() -> int:
    """The exit status: 0 if every target is met, 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a recorded trace: tokens' experts by task and layer")
    asked = parser.parse_args()
    tasks: list[Tokens] = []
    if asked.trace is not None:
        with np.load(asked.trace) as trace:
            tasks = [trace[name].astype(np.int64) for name in sorted(trace.files) if name.startswith("topk_")]
    place(made(experts=8, nodes=2, slots=20, differ=True, seed=0), rng=np.random.default_rng(0), time_limit_s=5.0)
    heads = "".join(f"{head:>9}" for head in ("even us", "EPLB us", "ours us"))
    heads += "".join(f"{head:>8}" for head in ("below", " held out", "could", "gap"))
    print(f"{'layer':58}{heads}{'CPU s':>7}  met  bound by")
    cases = [*(recorded_cases(tasks) if tasks else ()), *made_cases()]
    met = [print_case(case) for case in cases]
    if tasks:
        print(f"\n{'nodes':5}{'in turn':>9}{'ours':>8}{'held out':>9}{'in sample':>11}{'bound':>9}", end="")
        print(f"{'load':>9}{'held out':>9}{'CPU s':>8}  met")
        met += [print_visits(tasks, nodes=nodes) for nodes in (4, 8)]
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main())
