"""The few constants that only whole steps can tell, fitted to measured ones: by least absolute errors of logarithms.

A constant is a mechanism's (`steps.py`): how much of their speed alone kernels of a GPU keep in a long step (one for
all GPUs, one more for each, and one for each architecture's 8-bit and 4-bit products), and the terms of an overhead
set. A GPU's own is held towards 1 by a weight of `_HELD` rows, so that a GPU that is left out gets that of the others.

Deterministic: constants are turned one after another, by steps that shrink, until none helps.
Axes: N steps, C constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.accuracy.cases import Case
from moeplan.accuracy.machines import at_full_speed, sustained
from moeplan.accuracy.overheads import TERMS, Overheads
from moeplan.accuracy.steps import Step, scores_s
from moeplan.cost.cost_model import CostModel
from moeplan.domain.cluster import Gpu

Floats = NDArray[np.float64]
NARROW = {"fp8": 8, "fp4": 4}
_HELD = 0.5
_SWEEPS = 60
_FIRST, _LAST = 0.2, 1e-3
_STARTS = {
    "exposed_routed": 0.3, "late_ranks": 1.2, "exposed_tensor": 0.3, "host_dense_s": 1e-3, "host_routed_s": 8e-3,
    "host_routed_graphs_s": 5e-3, "host_routed_old_s": 4e-3,
    "score_passes": 5.0,
}  # fmt: skip


def architecture(gpu: str) -> str:
    """GPUs whose 8-bit products are alike."""
    return "blackwell" if gpu.startswith(("b", "gb")) else "hopper"


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Constants by name: `slower`, `slower:GPU`, `slower_fp8:ARCHITECTURE`, and the terms of an overhead set."""

    values: Mapping[str, float]

    @property
    def overheads(self) -> Overheads:
        """Its terms as a set."""
        return Overheads(**{term: self.values[term] for term in TERMS})

    def slower(self, gpu: str, bits: int) -> float:
        """How much longer products take in a long step than alone."""
        own = self.values["slower"] * self.values.get(f"slower:{gpu}", 1.0)
        return own * self.values.get(f"slower_fp{bits}:{architecture(gpu)}", 1.0) if bits < 16 else own

    def gpu(self, gpu: Gpu) -> Gpu:
        """The GPU with these constants in place of its own."""
        wide, fp8, fp4 = (min(1.0, 1 / self.slower(gpu.name, bits)) for bits in (16, 8, 4))
        return sustained(gpu, wide, fp8, fp4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """A measured step, with what it is predicted from."""

    group: tuple[str, ...]
    case: Case
    step: Step
    measured_s: float
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What the fit needs of observations, column by column; see `steps.believed_s`, which it repeats."""

    names: tuple[str, ...]
    fixed_N: Floats
    wide_N: Floats
    narrow_N: Floats
    own_N: NDArray[np.int64]
    narrow_own_N: NDArray[np.int64]
    routed_N: Floats
    overlaps_routed_N: NDArray[np.bool_]
    scores_N: Floats
    tensor_N: Floats
    overlaps_tensor_N: NDArray[np.bool_]
    bubble_N: Floats
    rest_N: Floats
    dense_N: Floats
    moe_N: Floats
    host_N: NDArray[np.int64]
    measured_N: Floats
    weight_N: Floats

    def predicted(self, value_C: Floats) -> Floats:
        """Seconds of each step."""
        at = {name: number for number, name in enumerate(self.names)}
        ones = np.append(value_C, 1.0)
        slower_N = value_C[at["slower"]] * ones[self.own_N]
        device_N = self.fixed_N + slower_N * (self.wide_N + self.narrow_N * ones[self.narrow_own_N])
        shown_N = np.where(self.overlaps_routed_N, value_C[at["exposed_routed"]], value_C[at["late_ranks"]])
        device_N = device_N + self.routed_N * shown_N
        device_N = device_N + self.tensor_N * np.where(self.overlaps_tensor_N, value_C[at["exposed_tensor"]], 1.0)
        device_N = device_N + self.scores_N * value_C[at["score_passes"]]
        host_N = self.moe_N * np.append(value_C, 0.0)[self.host_N] + self.dense_N * value_C[at["host_dense_s"]]
        found: Floats = np.maximum(device_N, host_N) * (1 + self.bubble_N) + self.rest_N
        return found

    def loss(self, value_C: Floats) -> float:
        """Weighted mean of absolute errors, and what holds a GPU's own constant towards 1."""
        errors = float(self.weight_N @ np.abs(np.log(self.predicted(value_C) / self.measured_N)))
        own = [number for number, name in enumerate(self.names) if name.startswith("slower:")]
        return (errors + _HELD * float(np.abs(np.log(value_C[own])).sum())) / float(self.weight_N.sum())


def fit(observations: Sequence[Observation]) -> Constants:
    """The constants under which the observations are predicted best, from where all fits start."""
    table = table_of(observations)
    value_C = np.array([_start_of(name) for name in table.names])
    step_C, best = np.full(len(value_C), _FIRST), table.loss(value_C)
    for _ in range(_SWEEPS):
        for number in range(len(value_C)):
            value_C, best, step_C[number] = _turned(table, value_C, best, number, step_C[number])
        if step_C.max() < _LAST:
            break
    return Constants(values=dict(zip(table.names, value_C.tolist(), strict=True)))


def _start_of(name: str) -> float:
    return _STARTS.get(name, 1.2 if name == "slower" else 1.0)


def _turned(table: Table, value_C: Floats, best: float, number: int, step: float) -> tuple[Floats, float, float]:
    for sign in (1, -1):
        tried_C = value_C.copy()
        tried_C[number] *= np.exp(sign * step)
        if (found := table.loss(tried_C)) < best - 1e-12:
            return tried_C, found, step * 1.3
    return value_C, best, step * 0.6


def table_of(observations: Sequence[Observation]) -> Table:
    """The observations as columns; constants are those that one of them tells."""
    gpus = sorted({each.case.scenario.cluster.gpu.name for each in observations})
    bits = [_bits(each.case) for each in observations]
    narrow = sorted({_narrow(each.case) for each, size in zip(observations, bits, strict=True) if size < 16})
    names = ("slower", *(f"slower:{gpu}" for gpu in gpus), *narrow, *TERMS)
    at = {name: number for number, name in enumerate(names)}
    parts = [_parts(each) for each in observations]
    waits = [each.step.causes_s for each in observations]

    def column(values: Sequence[float]) -> Floats:
        return np.array(values, np.float64)

    hosts = {"some": "host_routed_graphs_s", "none": "host_routed_s", "unknown": "host_routed_old_s"}
    cases = [each.case for each in observations]
    layers = [_layers(case) for case in cases]
    return Table(
        names=names,
        fixed_N=column([part[0] for part in parts]),
        wide_N=column([part[1] for part in parts]),
        narrow_N=column([part[2] for part in parts]),
        own_N=np.array([at[f"slower:{each.case.scenario.cluster.gpu.name}"] for each in observations]),
        narrow_own_N=np.array([at.get(_narrow(each.case), len(names)) for each in observations]),
        routed_N=column([each["exposed_all_to_all"] for each in waits]),
        overlaps_routed_N=np.array([each.case.overlaps_passes for each in observations]),
        scores_N=column([scores_s(each.case) for each in observations]),
        tensor_N=column([each["tensor_traffic"] for each in waits]),
        overlaps_tensor_N=np.array([each.case.overlaps_tensor for each in observations]),
        bubble_N=column([_bubble(each.step) for each in observations]),
        rest_N=column([each["gradient_traffic"] + each["pipeline_traffic"] for each in waits]),
        dense_N=column([count * (case.graphs != "all") for case, (count, _) in zip(cases, layers, strict=True)]),
        moe_N=column([count for _, count in layers]),
        host_N=np.array([at[hosts[case.graphs]] if case.graphs in hosts else len(names) for case in cases]),
        measured_N=column([each.measured_s for each in observations]),
        weight_N=column([each.weight for each in observations]),
    )  # fmt: skip


def _bits(case: Case) -> int:
    return NARROW.get(case.plan.precision.compute, 16)


def _narrow(case: Case) -> str:
    return f"slower_fp{_bits(case)}:{architecture(case.scenario.cluster.gpu.name)}"


def _bubble(step: Step) -> float:
    return step.causes_s["pipeline_bubble"] / (
        step.device_s + step.causes_s["exposed_all_to_all"] + step.causes_s["tensor_traffic"]
    )


def _layers(case: Case) -> tuple[float, float]:
    """Layers without and with experts of a rank, times its micro-batches."""
    count, moe = len(case.scenario.model.all_layers), len(case.scenario.model.moe_layers)
    times = case.plan.num_microbatches(case.scenario.workload.global_batch) / case.plan.pp
    return (count - moe) * times, moe * times


def _parts(each: Observation) -> tuple[float, float, float]:
    """Device seconds that no constant changes, of 16-bit products, of narrow products; all at full speed."""
    gpu = each.case.scenario.cluster.gpu
    full = CostModel(gpu=at_full_speed(gpu))
    wide = narrow = 0.0
    now = CostModel(gpu=gpu)
    changed = 0.0
    for kernel, count in each.step.kernels.items():
        if kernel.kind not in ("gemm", "grouped_gemm"):
            continue
        seconds = count * full.kernel_s(kernel)
        changed += count * now.kernel_s(kernel)
        if kernel.dtype in NARROW:
            narrow += seconds
        else:
            wide += seconds
    return each.step.device_s - changed, wide, narrow
