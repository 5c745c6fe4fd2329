"""How evenly is a recorded trace balanced by a placement that saw its first half only? Ours beside EPLB's idea.

    python benchmarks/held_out.py TRACE.npz [--slots N --gpus N] [--json]

The trace has ids `topk_NAME[token, layer, choice]` for each task. The first half of a task's tokens decides where
replicas stand; the second is cut into batches, 1,024 tokens in their order or 256 drawn at random. EPLB splits tokens
evenly between replicas, as it is published; ours are split anew for each batch by a maximum flow. The third column
gives EPLB's replicas the same split, which tells how much of the gain is the split's and how much the placement's.
Values are the fullest GPU over the mean one, over layers and batches. `us` are CPU microseconds of one split, from
tokens of experts to shares of replicas. Wanted is 8 % below EPLB, and a split in 100 us. Exits 1 if that is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, LayerPlacement, PlacementProblem
from moeplan.placers import eplb, local_search
from moeplan.placers._check import value
from moeplan.placers._split import best_shares

LEAST_BELOW, MOST_US = 0.08, 100.0
Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A task cut into batches: means over its layers and batches."""

    what: str
    eplb: float
    eplb_split: float
    """EPLB's replicas with our split."""
    ours: float
    us: float

    @property
    def below(self) -> float:
        """How far ours is below EPLB."""
        return 1 - self.ours / self.eplb

    @property
    def is_met(self) -> bool:
        """Whether both targets are met."""
        return self.below >= LEAST_BELOW and self.us <= MOST_US


def batches(ids_NLK: Tokens, *, size: int, at_random: bool) -> list[Tokens]:
    """Whole batches of the second half."""
    held_out = ids_NLK[len(ids_NLK) // 2 :]
    if at_random:
        held_out = np.random.default_rng(0).permutation(held_out)
    return [held_out[end - size : end] for end in range(size, len(held_out) + 1, size)]


def counts_E(ids: Tokens, experts: int) -> Floats:
    """Tokens of each expert."""
    return np.bincount(ids.ravel(), minlength=experts).astype(np.float64)


def over_mean(tokens_E: Floats, placement: LayerPlacement, gpus: int, *, slots: int) -> float:
    """The fullest GPU over the mean one, by the checker."""
    problem = PlacementProblem(tokens_SE=tokens_E, num_gpus=gpus, slots=slots, split="optimal")
    return float(value(problem, placement) * gpus / tokens_E.sum())


def resplit(tokens_E: Floats, placement: LayerPlacement, gpus: int) -> tuple[LayerPlacement, float]:
    """The same replicas with the batch's best split, and the CPU seconds that it took."""
    begin_s = time.process_time()
    share_R = best_shares(tokens_E, placement.expert_R, placement.gpu_R, gpus)
    cpu_s = time.process_time() - begin_s
    return LayerPlacement(expert_R=placement.expert_R, gpu_R=placement.gpu_R, share_SR=share_R[None, :]), cpu_s


def measured(name: str, ids_NLK: Tokens, *, slots: int, gpus: int, size: int, at_random: bool) -> Row:
    """The row of a task."""
    experts, rng = int(ids_NLK.max()) + 1, np.random.default_rng(0)
    cut, found, seconds = batches(ids_NLK, size=size, at_random=at_random), [], []
    for layer in range(ids_NLK.shape[1]):
        decides_E = counts_E(ids_NLK[: len(ids_NLK) // 2, layer], experts)
        problem = PlacementProblem(tokens_SE=decides_E, num_gpus=gpus, slots=slots)
        theirs, mine = (dish.place(problem, rng=rng, time_limit_s=10.0).placement for dish in (eplb, local_search))
        for batch in cut:
            tokens_E = counts_E(batch[:, layer], experts)
            (theirs_split, _), (mine_split, cpu_s) = (resplit(tokens_E, each, gpus) for each in (theirs, mine))
            found.append([over_mean(tokens_E, each, gpus, slots=slots) for each in (theirs, theirs_split, mine_split)])
            seconds.append(cpu_s)
    even, split, ours = np.mean(found, axis=0).tolist()
    what = f"{name}, {size} tokens {'at random' if at_random else 'in order'}"
    return Row(what=what, eplb=even, eplb_split=split, ours=ours, us=1e6 * float(np.mean(seconds)))


def rows(trace: Path, *, slots: int, gpus: int) -> Iterator[Row]:
    """Each task of the trace, cut in both ways."""
    with np.load(trace, allow_pickle=False) as arrays:
        tasks = {name.removeprefix("topk_"): arrays[name] for name in sorted(arrays.files) if name.startswith("topk_")}
    for name, ids_NLK in tasks.items():
        for size, at_random in ((1024, False), (256, True)):
            yield measured(name, ids_NLK, slots=slots, gpus=gpus, size=size, at_random=at_random)


def main() -> int:
    """The exit status: 0 if every target is met, 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="npz with topk_*[token, layer, choice]")
    parser.add_argument("--slots", type=int, default=96)
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    asked = parser.parse_args()
    best_shares(np.ones(2), np.arange(2), np.arange(2), 2)  # compiled now, not in the first row
    found = []
    if not asked.json:
        heads = f"{'EPLB':>9}{'split':>9}{'ours':>9}{'below':>8}{'wanted':>8}{'us':>6}{'wanted':>8}  met"
        print(f"{f'{asked.slots} slots on {asked.gpus} GPUs':32}{heads}")
    for row in rows(asked.trace, slots=asked.slots, gpus=asked.gpus):
        found.append(row)
        if not asked.json:
            print(
                f"{row.what:32}{row.eplb:9.4f}{row.eplb_split:9.4f}{row.ours:9.4f}{row.below:8.1%}{LEAST_BELOW:8.0%}"
                f"{row.us:6.0f}{MOST_US:8.0f}  {'yes' if row.is_met else 'NO'}",
                flush=True,
            )
    if asked.json:
        print(json.dumps([{**asdict(row), "below": row.below, "is_met": row.is_met} for row in found], indent=2))
    return int(not all(row.is_met for row in found))


if __name__ == "__main__":
    sys.exit(main())
