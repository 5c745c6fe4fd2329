"""Is the network exact, and as fast as we claim? Ours beside SimGrid's, on the same flows in the same run.

    python benchmarks/network.py                          everything, about five minutes; SimGrid where it is installed
    python benchmarks/network.py --long                   also SimGrid at 256 GPUs, skewed: half an hour
    python benchmarks/network.py --gpus 64 --pattern zipf --json       one run of ours, and SimGrid is never started

Seconds are CPU seconds of the solver: compilation, reading the workload and building SimGrid's platform are left out.
The workload is described in `network_workload.py`. `--fidelity batched` changes rates no more often than each
`--tolerance` of the elapsed time. Ours is measured three times where that takes under two seconds, and the median told.
Exits 1 if a target is missed or a flow differs from SimGrid's by more than 1e-9.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from network_workload import (
    NIC_BYTES_PER_S,
    NODE_GPUS,
    PORT_BYTES_PER_S,
    Workload,
    as_job,
    capacities,
    leaf,
    paths,
    workload,
    zipf,
    zipf_rows,
)
from simgrid_runs import Run, interpreter
from simgrid_runs import run as run_simgrid

from moeplan.domain.cluster import ClusterSpec, build_cluster
from moeplan.domain.cluster_spec import Gpu
from moeplan.network import FlowSet, finish_times
from moeplan.network.matrix import PortTraffic, matrix_finish_times
from moeplan.network.uniform import flows_of, pairs_of

CLOSE = 1e-9
POD_NODES = 8
MEAN_BYTES = 1048576.0
MOST_LISTED = 1024
"""GPUs up to which the flows of an even exchange are listed."""
BATCH, COARSE = 0.007, 0.05
"""Tolerances of the rows that ask for 0.1 % and for 0.5 %."""
Numbers = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table: what was measured, and the target that it has to keep."""

    what: str
    value: float
    unit: str
    target: float | None = None
    more_is_better: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.more_is_better else self.value <= self.target


# ---- ours


def flow_set(flows: Workload) -> FlowSet:
    """The flows of a workload, listed."""
    return FlowSet(
        capacity_bytes_per_s_K=flows.capacity_bytes_per_s_K, link_I=flows.link_I, first_F1=flows.first_F1,
        size_bytes_F=flows.size_bytes_F, start_s_F=flows.start_s_F,
    )  # fmt: skip


def ports(gpus: int, oversub: float, seed: int) -> tuple[PortTraffic, FlowSet]:
    """The skewed exchange as a matrix between nodes, by leaves, and what stays in the nodes as flows."""
    under_G, node_G = leaf(np.arange(gpus), POD_NODES), np.arange(gpus) // NODE_GPUS
    total_G, near = np.zeros(gpus), []
    for source, row_H in enumerate(_rows(gpus, seed)):
        total_G += np.where(node_G == node_G[source], 0.0, np.insert(row_H, source, 0.0))
        near.append(np.delete(np.insert(row_H, source, 0.0)[node_G == node_G[source]], source % NODE_GPUS))
    order = np.lexsort((-total_G, under_G if oversub > 1 else under_G * 0))
    place_G = np.argsort(order)
    table_GG = np.zeros((gpus, gpus))
    for source, row_H in enumerate(_rows(gpus, seed)):
        far_G = np.where(node_G == node_G[source], 0.0, np.insert(row_H, source, 0.0))
        table_GG[place_G[source], place_G] = far_G
    size_B = np.bincount(under_G) if oversub > 1 else np.array([gpus])
    pipe_B = size_B * NIC_BYTES_PER_S / oversub if oversub > 1 else np.array([np.inf])
    port_G = np.full(gpus, NIC_BYTES_PER_S)
    traffic = PortTraffic(
        bytes_GG=table_GG, out_bytes_per_s_G=port_G, in_bytes_per_s_G=port_G,
        first_B1=np.concatenate([[0], np.cumsum(size_B)]), up_bytes_per_s_B=pipe_B, down_bytes_per_s_B=pipe_B,
    )  # fmt: skip
    return traffic, _inside(gpus, np.concatenate(near))


def _rows(gpus: int, seed: int) -> Iterator[Any]:
    return zipf_rows(gpus, seed=seed, mean_bytes=MEAN_BYTES, zipf_s=0.5)


def _inside(gpus: int, size_F: Any) -> FlowSet:
    """What each GPU sends to the others of its node."""
    source_F = np.repeat(np.arange(gpus, dtype=np.int32), NODE_GPUS - 1)
    other_F = np.tile(np.arange(NODE_GPUS - 1, dtype=np.int32), gpus)
    local_F = source_F % NODE_GPUS
    target_F = source_F - local_F + other_F + (other_F >= local_F)
    link_I, first_F1 = paths(source_F, target_F, gpus=gpus, pod_nodes=POD_NODES)
    return FlowSet(
        capacity_bytes_per_s_K=np.full(2 * gpus, PORT_BYTES_PER_S), link_I=link_I, first_F1=first_F1,
        size_bytes_F=size_F,
    )  # fmt: skip


def cluster(gpus: int, oversub: float) -> Any:
    """The same platform as a cluster, for what is not listed."""
    gpu = Gpu(
        name="any", memory_bytes=1.0, usable_memory_bytes=1.0, memory_bandwidth_bytes_per_s=1.0,
        peak_flops_per_s={"bf16": 1.0}, num_sms=1, l2_cache_bytes=1.0, tdp_w=1.0, kernel_launch_s=0.0,
        **dict.fromkeys(
            [name for name in Gpu.__dataclass_fields__ if name.endswith(("efficiency", "exchange", "compute"))], 1.0
        ),
    )  # fmt: skip
    spec = ClusterSpec.model_validate({
        "name": "rails", "gpu": gpu, "nodes": gpus // NODE_GPUS, "gpus_per_node": NODE_GPUS,
        "links": {"port": {"bandwidth_bytes_per_s": PORT_BYTES_PER_S}, "slot": {"bandwidth_bytes_per_s": 1e15}},
        "wiring": [{"from": "gpu*", "to": "switch", "link": "port"}, {"from": "nic*", "to": "gpu*", "link": "slot"}],
        "nic": {"per_node": NODE_GPUS, "bandwidth_bytes_per_s": NIC_BYTES_PER_S},
        "fabric": {"kind": "rail_optimised", "nodes_per_leaf": POD_NODES, "oversubscription": oversub},
    })  # fmt: skip
    return build_cluster(spec)


def timed(solve: Callable[[], Any]) -> tuple[Any, float]:
    """What it answers, and the median CPU seconds; it has run before, so that nothing is compiled."""
    spent: list[float] = []
    while len(spent) < 3 and sum(spent) < 2.0:
        begin = time.process_time()
        answer = solve()
        spent.append(time.process_time() - begin)
    return answer, statistics.median(spent)


def run(gpus: int, pattern: str, *, seed: int, oversub: float, fidelity: str, tolerance: float) -> Numbers:
    """One run of ours. `finish_s_F` is in the order of the workload's flows, where they are listed."""
    if fidelity == "batched" and pattern == "zipf":
        return _batched(gpus, seed=seed, oversub=oversub, tolerance=tolerance)
    if pattern == "uniform" and gpus > MOST_LISTED:
        return _even(gpus, oversub)
    flows = flow_set(workload(gpus, pattern, seed=seed, oversub=oversub, pod_nodes=POD_NODES, mean_bytes=MEAN_BYTES))
    given = tolerance if fidelity == "batched" else 0.0
    _warm(pattern)
    found, cpu_s = timed(lambda: finish_times(flows, tolerance=given))
    figures = _numbers(found.finish_s_F, np.ones(len(flows)), cpu_s, events=found.events)
    return figures | {"finish_s_F": found.finish_s_F}


def _warm(pattern: str) -> None:
    for gpus in (16, 24):
        finish_times(flow_set(workload(gpus, pattern)))


def _warm_ports(tolerance: float) -> None:
    traffic, near = ports(16, 1.0, 1)
    matrix_finish_times(traffic, tolerance=tolerance)
    finish_times(near)


def _even(gpus: int, oversub: float) -> Numbers:
    wanted = cluster(gpus, oversub)

    def solve() -> Any:
        pairs = pairs_of(wanted)
        return pairs, finish_times(flows_of(pairs, wanted, np.full(len(pairs.source_C), MEAN_BYTES)))

    solve()
    (pairs, found), cpu_s = timed(solve)
    return _numbers(found.finish_s_F, pairs.count_C, cpu_s, events=found.events)


def _batched(gpus: int, *, seed: int, oversub: float, tolerance: float) -> Numbers:
    _warm_ports(tolerance)
    traffic, near = ports(gpus, oversub, seed)
    bound_s = max(traffic.bytes_GG.sum(axis=0).max(), traffic.bytes_GG.sum(axis=1).max()) / NIC_BYTES_PER_S
    (far, inside), cpu_s = timed(
        lambda: (matrix_finish_times(traffic, tolerance=tolerance), finish_times(near).finish_s_F)
    )
    # Summed without a list of all flows, which would need more memory than the solver.
    count = int((traffic.bytes_GG > 0).sum()) + len(inside)
    figures = _numbers(inside, np.ones(len(inside)), cpu_s, events=far.steps, bound_s=float(bound_s))
    return figures | {
        "completion_s": max(float(far.finish_s_GG.max()), float(inside.max())),
        "finish_sum": float(far.finish_s_GG.sum() + inside.sum()), "flows": count,
    }  # fmt: skip


def _numbers(finish_s_F: Any, count_F: Any, cpu_s: float, **more: Any) -> Numbers:
    return {
        "completion_s": float(finish_s_F.max()), "finish_sum": float((finish_s_F * count_F).sum()), "cpu_s": cpu_s,
        "flows": int(count_F.sum()), "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    } | more  # fmt: skip


def apart(function: Callable[..., Numbers], *args: Any, **given: Any) -> Numbers:
    """In a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **given).result()


# ---- the table


def beside_simgrid(gpus: int, pattern: str, oversub: float, target: float | None) -> Iterator[Row]:
    """Ours and the faster of SimGrid's two modes, flow by flow."""
    ours = apart(run, gpus, pattern, seed=1, oversub=oversub, fidelity="flow", tolerance=0.0)
    what = f"{pattern} {gpus}, {oversub:g}:1"
    if interpreter() is None:
        yield Row(what=f"{what}: ours", value=ours["cpu_s"], unit="s", note=f"{ours['flows']} flows; no SimGrid here")
        return
    job = as_job(workload(gpus, pattern, seed=1, oversub=oversub, pod_nodes=POD_NODES, mean_bytes=MEAN_BYTES))
    modes = ("Full",) if gpus >= 256 and pattern == "zipf" else ("Full", "Lazy")
    runs = {mode: found for mode in modes if (found := run_simgrid(job, optim=mode)) is not None}
    best = min(runs, key=lambda mode: runs[mode].cpu_s)
    peer: Run = runs[best]
    worst = float(np.abs(ours["finish_s_F"] / np.array(peer.finish_s_F) - 1).max())
    note = (
        f"ours {ours['cpu_s']:.4f} s, SimGrid {peer.cpu_s:.3f} s ({best}); memory {_mb(ours['peak_memory_bytes'])} "
        f"and {_mb(peer.peak_memory_bytes)}"
    )
    yield Row(what=f"{what}: worst flow, relative", value=worst, unit="", target=CLOSE)
    yield Row(
        what=f"{what}: speed", value=peer.cpu_s / ours["cpu_s"], unit="x", target=target, more_is_better=True, note=note
    )


def exact_sizes() -> Iterator[Row]:
    """What SimGrid cannot do in reasonable time."""
    found = apart(run, 512, "zipf", seed=1, oversub=1.0, fidelity="flow", tolerance=0.0)
    yield Row(what="zipf 512, exact", value=found["cpu_s"], unit="s", target=40.0, note=f"{found['events']} events")
    found = apart(run, 16384, "uniform", seed=1, oversub=1.0, fidelity="flow", tolerance=0.0)
    yield Row(
        what="uniform 16,384, not listed", value=found["cpu_s"], unit="s", target=0.01, note=f"{found['flows']} flows"
    )
    found = apart(groups, 16384)
    yield Row(
        what="16,384 in skewed groups of 64", value=found["cpu_s"], unit="s", target=0.1, note=f"{found['flows']} flows"
    )
    found = apart(run, 1024, "uniform", seed=1, oversub=1.0, fidelity="flow", tolerance=0.0)
    yield Row(
        what="uniform 1,024, listed", value=found["cpu_s"], unit="s", target=0.1,
        note="ASTRA-sim, congestion-aware, one switch: 16 s and 952 MB",
    )  # fmt: skip


def groups(gpus: int) -> Numbers:
    """Groups of 64 neighbours, each with the same skewed matrix."""
    source_F, target_F, size_F = zipf(64, seed=1, mean_bytes=MEAN_BYTES, zipf_s=0.5)
    base = 64 * np.arange(gpus // 64, dtype=np.int32)[:, None]
    sources, targets = (base + source_F).ravel(), (base + target_F).ravel()
    link_I, first_F1 = paths(sources, targets, gpus=gpus, pod_nodes=POD_NODES)
    capacity_K = capacities(gpus, oversub=1.0, pod_nodes=POD_NODES)
    flows = FlowSet(
        capacity_bytes_per_s_K=capacity_K, link_I=link_I, first_F1=first_F1,
        size_bytes_F=np.tile(size_F, gpus // 64),
    )  # fmt: skip
    finish_times(flows)
    found, cpu_s = timed(lambda: finish_times(flows))
    return _numbers(found.finish_s_F, np.ones(len(flows)), cpu_s)


def bounded() -> Iterator[Row]:
    """What batching costs and saves; against the exact answer as far as there is one."""
    for gpus, most in ((128, None), (256, None)):
        found = apart(_accuracy, gpus, BATCH)
        note = f"exact {found['exact_cpu_s']:.3f} s; worst flow {found['worst']:.2%}"
        yield Row(what=f"zipf {gpus}, batched {BATCH:.2%}", value=found["cpu_s"], unit="s", target=most, note=note)
        yield Row(
            what=f"zipf {gpus}, batched: completion off by", value=100 * found["completion"], unit="%", target=0.1
        )
        yield Row(what=f"zipf {gpus}, batched: mean flow off by", value=100 * found["mean"], unit="%", target=0.015)
    for gpus, tolerance, most in ((1024, BATCH, 0.6), (1024, COARSE, 0.25), (4096, COARSE, 6.0)):
        found = apart(run, gpus, "zipf", seed=1, oversub=1.0, fidelity="batched", tolerance=tolerance)
        note = (
            f"{found['events']} steps, {_mb(found['peak_memory_bytes'])}, completion "
            f"{found['completion_s'] / found['bound_s'] - 1:+.4%} of the port bound"
        )
        yield Row(
            what=f"zipf {gpus:,}, batched {tolerance:.2%}", value=found["cpu_s"], unit="s", target=most, note=note
        )
    yield Row(
        what="zipf 4,096: memory in all", value=found["peak_memory_bytes"] / 1e9, unit="GB", target=1.0,
        note=f"{found['peak_memory_bytes'] / found['flows']:.0f} B for each flow, Python and the workload included",
    )  # fmt: skip
    yield Row(
        what="zipf 4,096: memory per flow", value=_per_flow(), unit="B", target=40.0,
        note="what 4,096 GPUs take beyond 1,024; SimGrid takes 2,400",
    )  # fmt: skip


def _per_flow() -> float:
    small, large = (
        apart(run, gpus, "zipf", seed=1, oversub=1.0, fidelity="batched", tolerance=0.5) for gpus in (1024, 4096)
    )
    return float(large["peak_memory_bytes"] - small["peak_memory_bytes"]) / (large["flows"] - small["flows"])


def _accuracy(gpus: int, tolerance: float) -> Numbers:
    exact = run(gpus, "zipf", seed=1, oversub=1.0, fidelity="flow", tolerance=0.0)
    flows = workload(gpus, "zipf", seed=1, pod_nodes=POD_NODES, mean_bytes=MEAN_BYTES)
    table_GG = np.zeros((gpus, gpus))
    table_GG[flows.source_F, flows.target_F] = exact["finish_s_F"]
    _warm_ports(tolerance)
    traffic, _ = ports(gpus, 1.0, 1)
    found, cpu_s = timed(lambda: matrix_finish_times(traffic, tolerance=tolerance))
    sums_G = np.where(np.arange(gpus)[:, None] // NODE_GPUS == np.arange(gpus) // NODE_GPUS, 0.0, _sizes(flows, gpus))
    order = np.lexsort((-sums_G.sum(axis=0), np.zeros(gpus)))
    wanted_F = table_GG[np.ix_(order, order)][traffic.bytes_GG > 0]
    off_F = np.abs(found.finish_s_GG[traffic.bytes_GG > 0] / wanted_F - 1)
    completion = abs(found.finish_s_GG.max() / wanted_F.max() - 1)
    return {"cpu_s": cpu_s, "exact_cpu_s": exact["cpu_s"], "mean": float(off_F.mean()), "worst": float(off_F.max()),
            "completion": float(completion)}  # fmt: skip


def _sizes(flows: Workload, gpus: int) -> Any:
    table_GG = np.zeros((gpus, gpus))
    table_GG[flows.source_F, flows.target_F] = flows.size_bytes_F
    return table_GG


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def rows(long: bool) -> Iterator[Row]:
    """The whole table."""
    for gpus, pattern, oversub, target in (
        (16, "uniform", 1.0, None), (64, "uniform", 2.0, None), (128, "uniform", 1.0, None),
        (16, "zipf", 1.0, None), (64, "zipf", 1.0, None), (64, "zipf", 2.0, None), (128, "zipf", 1.0, 60.0),
        (128, "zipf", 2.0, 60.0), (128, "sparse", 1.0, 20.0), (256, "sparse", 1.0, 80.0),
    ):  # fmt: skip
        yield from beside_simgrid(gpus, pattern, oversub, target)
    if long:
        yield from beside_simgrid(256, "zipf", 1.0, 400.0)
    yield from exact_sizes()
    yield from bounded()


def main() -> int:
    """Prints one run, or the table row by row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="a multiple of 8; without it, the whole table")
    parser.add_argument("--pattern", choices=("uniform", "zipf", "sparse"), default="uniform")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--oversub", type=float, default=1.0)
    parser.add_argument("--fidelity", choices=("flow", "batched"), default="flow")
    parser.add_argument("--tolerance", type=float, default=BATCH)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--long", action="store_true")
    asked = parser.parse_args()
    if asked.gpus is None and not asked.json:
        return _table(asked.long)
    gpus = 64 if asked.gpus is None else asked.gpus
    if gpus < NODE_GPUS or gpus % NODE_GPUS or asked.oversub < 1 or not 0 < asked.tolerance < 1 or asked.seed < 0:
        parser.error("--gpus is a multiple of 8, --oversub 1 or more, --tolerance between 0 and 1, --seed 0 or more")
    found = run(
        gpus, asked.pattern, seed=asked.seed, oversub=asked.oversub, fidelity=asked.fidelity, tolerance=asked.tolerance
    )  # fmt: skip
    shown = {name: value for name, value in found.items() if name != "finish_s_F"}
    print(json.dumps(shown) if asked.json else "\n".join(f"{name:20} {value}" for name, value in shown.items()))
    return 0


def _table(long: bool) -> int:
    missed = 0
    for row in rows(long):
        word = {None: "", True: "yes", False: "NO"}[row.is_met]
        target = "" if row.target is None else f"{'>=' if row.more_is_better else '<='} {row.target:g}"
        print(f"{row.what:42} {row.value:>11.4g} {row.unit:3} {target:>10} {word:4} {row.note}", flush=True)
        missed += row.is_met is False
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
