"""How well are experts placed, and how much of that is proven? Ours beside the usual placers and EPLB.

    python benchmarks/placement.py                          the rows of balance: some minutes
    python benchmarks/placement.py --trace counts.npz       also recorded loads: ids `topk_*[token, layer, choice]`
    python benchmarks/placement.py --eplb eplb.py           also the published balancer, from where you have it
    python benchmarks/placement.py --only hard --json       rows whose name has `hard`, as JSON

Each row is a family of layers. Values are ratios, tokens of the fullest GPU over the mean, as moeplan's checker works
them out, whoever placed. `gap` is ours over our bound. Seconds are CPU seconds of ours for one layer, compilation left
out. All is in sample: placements are scored on the loads that they were made for. Exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.domain.placement import Floats, LayerPlacement, PlacementProblem
from moeplan.errors import PlanError
from moeplan.placers import block, eplb, ilp, lpt, shadow_code, shadow_paper, smartmoe_greedy
from moeplan.placers._check import value
from moeplan.routers.drifting import route

OTHERS = {
    "block": block, "lpt": lpt, "smartmoe": smartmoe_greedy, "shadow_paper": shadow_paper, "shadow_code": shadow_code,
    "eplb": eplb,
}  # fmt: skip
BELOW_EPLB = 0.10
"""How far below EPLB the hard row wants ours to be, in the mean."""
Load = Callable[[int], Floats]
Raw = Callable[[PlacementProblem], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A family of layers, and what is wanted of each."""

    name: str
    load: Load
    number: int
    slots: int
    gpus: int
    gap: float
    limit_s: float
    all_s: float | None = None
    """CPU seconds for all layers together, where that is the target."""
    below_eplb: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came out of a row. Ratios are means over its layers; None where a placer cannot."""

    name: str
    number: int
    seconds: float
    most_s: float
    value: float
    bound: float
    gap: float
    most_gap: float
    others: dict[str, float | None]
    is_met: bool


def lognormal(sigma: float, experts: int = 256) -> Load:
    """Loads whose logarithms have this deviation: 0.6 to 1.0 in recorded ones of DeepSeek's models."""
    return lambda seed: np.exp(np.random.default_rng(seed).normal(0.0, sigma, experts))


def zipf(skew: float, experts: int) -> Load:
    """400,000 tokens by rank ** -skew; layer 0 has the law itself."""
    share_E = np.arange(1.0, experts + 1) ** -skew
    share_E /= share_E.sum()
    return lambda seed: (
        share_E if seed == 0 else np.random.default_rng(seed).multinomial(400_000, share_E).astype(float)
    )


def drifting() -> Load:
    """GPT training without a balancing loss, by the law of the router `drifting`, which holds its source.

    24 layers each at iterations 51, 501, 2501 and 5001 of a run.
    """
    size = {"num_layers": 24, "num_experts": 32, "top_k": 2, "num_sources": 1, "tokens_per_source": 131_072}

    @cache
    def layers_LE(iteration: int) -> Floats:
        tokens_LSE = route(**size, rng=np.random.default_rng(0), iteration=iteration).tokens_LSE
        return tokens_LSE.sum(axis=1).astype(np.float64)

    return lambda seed: layers_LE((51, 501, 2501, 5001)[seed // 24])[seed % 24]


def recorded(path: Path) -> Load:
    """Loads of one task and layer of a trace, one task after the other."""
    with np.load(path, allow_pickle=False) as trace:
        ids = [trace[name] for name in sorted(trace.files) if name.startswith("topk_")]
    experts = 1 + max(int(some.max()) for some in ids)
    places = [(some, layer) for layer in range(ids[0].shape[1]) for some in ids]
    return lambda seed: np.bincount(
        places[5 * seed % len(places)][0][:, places[5 * seed % len(places)][1]].ravel(), minlength=experts
    ).astype(float)


def rows(trace: Path | None) -> Iterator[Row]:
    """The rows of balance."""
    for slots, gpus in ((288, 32), (320, 64), (288, 72), (288, 96), (384, 128)):
        yield from model(f"lognormal 0.8, {slots}/{gpus}", lognormal(0.8), slots=slots, gpus=gpus)
    yield from model("lognormal 1.0, 288/96", lognormal(1.0), slots=288, gpus=96)
    yield from model("lognormal 0.8, 512 experts, 576/128", lognormal(0.8, 512), slots=576, gpus=128)
    for sigma in (0.6, 0.8, 1.0):
        yield pairs(f"two slots, lognormal {sigma}, 288/144", lognormal(sigma))
    yield pairs("two slots, Zipf 0.6, 288/144", zipf(0.6, 256))
    for slots, gpus, below in ((48, 16, BELOW_EPLB), (40, 8, 0.0)):
        yield Row(
            name=f"hard, {slots}/{gpus}", load=drifting(), number=96, slots=slots, gpus=gpus, gap=0.01, limit_s=10.0,
            below_eplb=below,
        )  # fmt: skip
    for slots, gpus, experts in ((288, 96, 256), (576, 192, 512)):
        yield Row(
            name=f"Zipf 0.6, {slots}/{gpus}", load=zipf(0.6, experts), number=3, slots=slots, gpus=gpus, gap=0.01,
            limit_s=60.0,
        )  # fmt: skip
    yield Row(name="uneven slots, 288/64", load=lognormal(0.8), number=10, slots=288, gpus=64, gap=0.001, limit_s=0.1)
    if trace is not None:
        for slots, gpus in ((96, 32), (72, 24), (80, 16)):
            yield from model(f"recorded, {slots}/{gpus}", recorded(trace), slots=slots, gpus=gpus)


def model(name: str, load: Load, *, slots: int, gpus: int) -> Iterator[Row]:
    """The layers of a model, all of them: two gaps, and the time for all."""
    for gap, all_s in ((0.003, 5.0), (0.01, 0.2)):
        yield Row(name=name, load=load, number=58, slots=slots, gpus=gpus, gap=gap, limit_s=10.0, all_s=all_s)


def pairs(name: str, load: Load) -> Row:
    """A row of two slots on a GPU."""
    return Row(name=name, load=load, number=3, slots=288, gpus=144, gap=0.001, limit_s=10.0)


def measured(row: Row, published: Raw | None, *, patience: float) -> Result:
    """All layers of a row, placed by everyone. Ours gets `patience` times the row's seconds by the clock."""
    seconds, values, bounds = [], [], []
    others: dict[str, list[float | None]] = {name: [] for name in (*OTHERS, *(["published"] if published else []))}
    for seed in range(row.number):
        tokens_E = row.load(seed)
        problem = PlacementProblem(tokens_SE=tokens_E * row.gpus / tokens_E.sum(), num_gpus=row.gpus, slots=row.slots)
        start = time.process_time()
        placed = ilp.place(problem, rng=np.random.default_rng(seed), time_limit_s=patience * row.limit_s, gap=row.gap)
        seconds.append(time.process_time() - start)
        values.append(placed.value)
        bounds.append(placed.lower_bound)
        for name, placer in OTHERS.items():
            others[name].append(attempted(placer.place, problem))
        if published:
            others["published"].append(published(problem) if row.slots % row.gpus == 0 else None)
    gaps = np.array(values) / np.array(bounds) - 1
    means = {n: None if None in each else float(np.array(each, float).mean()) for n, each in others.items()}
    below = [1 - ours / theirs for theirs, ours in zip(others["eplb"], values, strict=True) if theirs is not None]
    is_below = not below or float(np.mean(below)) >= row.below_eplb
    is_quick = sum(seconds) <= row.all_s if row.all_s else max(seconds) <= row.limit_s
    return Result(
        name=row.name, number=row.number, seconds=float(np.mean(seconds)), most_s=max(seconds),
        value=float(np.mean(values)), bound=float(np.mean(bounds)), gap=float(gaps.mean()), most_gap=float(gaps.max()),
        others=means,
        is_met=bool(gaps.max() <= row.gap * (1 + 1e-9) and is_quick and is_below),
    )  # fmt: skip


def attempted(place: Callable[..., Any], problem: PlacementProblem) -> float | None:
    """The placer's value, or None where it says that it cannot."""
    try:
        return float(place(problem, rng=np.random.default_rng(0), time_limit_s=10.0).value)
    except PlanError:
        return None


def published_eplb(path: Path) -> Raw:
    """The published balancer in global mode. Two replicas of an expert on one GPU are counted as they fall."""
    spec = importlib.util.spec_from_file_location("published_eplb", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch

    def place(problem: PlacementProblem) -> float:
        load = torch.tensor(problem.tokens_E[None, :], dtype=torch.float32)
        expert_LR, _, _ = module.rebalance_experts(load, problem.slots, 1, 1, problem.num_gpus)
        gpu_R = np.arange(problem.slots) // problem.slots_per_gpu
        return value(problem, LayerPlacement.even(expert_LR[0].numpy(), gpu_R))

    return place


def line(result: Result) -> str:
    """A row of the table."""
    others = " ".join(f"{'-' if ratio is None else format(ratio, '.4f'):>12}" for ratio in result.others.values())
    return (
        f"{result.name:36} {result.number:3} {result.seconds:7.3f} {result.most_s:7.2f} {result.value:8.4f} "
        f"{result.bound:8.4f} {result.gap:7.3%} {result.most_gap:7.3%} {others}  {'met' if result.is_met else 'MISSED'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="npz with topk_*[token, layer, choice]")
    parser.add_argument("--eplb", type=Path, help="the published eplb.py")
    parser.add_argument("--only", default="", help="part of the names of the rows wanted")
    parser.add_argument("--patience", type=float, default=3.0, help="clock seconds given, over the CPU seconds wanted")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    published = published_eplb(asked.eplb) if asked.eplb else None
    warm = PlacementProblem(tokens_SE=drifting()(1), num_gpus=16, slots=48)
    ilp.place(warm, rng=np.random.default_rng(0), time_limit_s=60.0, gap=1e-3)
    names = [*OTHERS, *(["published"] if published else [])]
    if not asked.json:
        print(f"{'layers':36} {'n':>3} {'CPU s':>7} {'most':>7} {'ours':>8} {'bound':>8} {'gap':>7} {'most':>7}", *(
            f"{name:>12}" for name in names
        ))  # fmt: skip
    results = []
    for row in rows(asked.trace):
        if asked.only in row.name:
            results.append(measured(row, published, patience=asked.patience))
            if not asked.json:
                print(line(results[-1]), flush=True)
    if asked.json:
        slots = [{name: getattr(result, name) for name in Result.__slots__} for result in results]
        print(json.dumps(slots, indent=1))
    return 0 if all(result.is_met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
