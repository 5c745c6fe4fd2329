"""The few constants that only whole steps can tell, fitted to measured ones: by least absolute errors of logarithms.

A constant is a mechanism's (`steps.py`): how much of their speed alone kernels of a GPU keep in a long step, and the
terms of an overhead set. In a long step a GPU may draw no more than its TDP, so that products take

    max(1, energy of a FLOP x peak / TDP)

times as long as in a benchmark's moment. The energy is an architecture's; 8-bit products take half of it, and have
twice the peak. Products of 4 bits are not held up by it: their multipliers are smaller than in proportion.

Deterministic: constants are turned one after another, by steps that shrink, until none helps.
Axes: N steps, C constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.accuracy.cases import Case
from moeplan.accuracy.machines import at_full_speed, sustained
from moeplan.accuracy.overheads import FITTED, Overheads, overheads_of
from moeplan.accuracy.steps import Step, host_rounds, scores_s
from moeplan.cost.cost_model import CostModel
from moeplan.domain.cluster import Gpu

Floats = NDArray[np.float64]
_SWEEPS = 60
_FIRST, _LAST = 0.2, 1e-3
_STARTS = {
    "energy_pj:hopper": 1.0, "energy_pj:blackwell": 0.7,
    "exposed_routed": 0.3, "late_ranks": 1.2, "exposed_tensor": 0.3, "host_routed_s": 8e-3,
    "host_routed_graphs_s": 5e-3,
    "score_passes": 5.0,
}  # fmt: skip


_AMPERE = 1 / 0.7
"""Energy of a FLOP on Ampere (7 nm) over that on Hopper (4 nm, of the 5 nm family).
Reference: TSMC, "5nm technology" (2020): 30 % less power than 7 nm at the same speed.
"""


def architecture(gpu: str) -> str:
    """GPUs whose products take as much energy, but for `_AMPERE`."""
    return "blackwell" if gpu.startswith(("b", "gb")) else "hopper"


def drawn(gpu: Gpu) -> float:
    """Peak of 16-bit products over TDP, in FLOP a pJ, times the energy of a FLOP over the architecture's."""
    peak = dict(gpu.peak_flops_per_s)["bf16"] / gpu.tdp_w / 1e12
    return peak * (_AMPERE if gpu.name.startswith("a100") else 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Constants by name: `energy_pj:ARCHITECTURE` and the terms of an overhead set."""

    values: Mapping[str, float]

    @property
    def overheads(self) -> Overheads:
        """Its terms as a set."""
        return replace(overheads_of(), **{term: self.values[term] for term in FITTED})

    def slower(self, gpu: Gpu, bits: int) -> float:
        """How much longer products take in a long step than alone."""
        return max(1.0, self._energy_pj(architecture(gpu.name)) * drawn(gpu)) if bits > 4 else 1.0

    def _energy_pj(self, kind: str) -> float:
        """Of a FLOP; an architecture that nobody tells of has that of another."""
        told = {name: value for name, value in self.values.items() if name.startswith("energy_pj:")}
        return told.get(f"energy_pj:{kind}") or next(iter(told.values()), 1.0)

    def gpu(self, gpu: Gpu) -> Gpu:
        """The GPU with these constants in place of its own."""
        wide, fp8, fp4 = (min(1.0, 1 / self.slower(gpu, bits)) for bits in (16, 8, 4))
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
    limited_N: Floats
    energy_N: NDArray[np.int64]
    drawn_N: Floats
    routed_N: Floats
    overlaps_routed_N: NDArray[np.bool_]
    scores_N: Floats
    tensor_N: Floats
    overlaps_tensor_N: NDArray[np.bool_]
    bubble_N: Floats
    rest_N: Floats
    dense_s_N: Floats
    moe_N: Floats
    host_N: NDArray[np.int64]
    measured_N: Floats
    weight_N: Floats

    def predicted(self, value_C: Floats) -> Floats:
        """Seconds of each step."""
        at = {name: number for number, name in enumerate(self.names)}
        device_N = self.fixed_N + self.limited_N * np.maximum(1.0, value_C[self.energy_N] * self.drawn_N)
        shown_N = np.where(self.overlaps_routed_N, value_C[at["exposed_routed"]], value_C[at["late_ranks"]])
        device_N = device_N + self.routed_N * shown_N
        device_N = device_N + self.tensor_N * np.where(self.overlaps_tensor_N, value_C[at["exposed_tensor"]], 1.0)
        device_N = device_N + self.scores_N * value_C[at["score_passes"]]
        host_N = self.moe_N * np.append(value_C, [0.0, overheads_of().host_routed_old_s])[self.host_N] + self.dense_s_N
        found: Floats = np.maximum(device_N, host_N) * (1 + self.bubble_N) + self.rest_N
        return found

    def loss(self, value_C: Floats) -> float:
        """Weighted mean of absolute errors."""
        return float(self.weight_N @ np.abs(np.log(self.predicted(value_C) / self.measured_N)) / self.weight_N.sum())


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
    return _STARTS.get(name, 1.0)


def _turned(table: Table, value_C: Floats, best: float, number: int, step: float) -> tuple[Floats, float, float]:
    for sign in (1, -1):
        tried_C = value_C.copy()
        tried_C[number] *= np.exp(sign * step)
        if (found := table.loss(tried_C)) < best - 1e-12:
            return tried_C, found, step * 1.3
    return value_C, best, step * 0.6


def table_of(observations: Sequence[Observation]) -> Table:
    """The observations as columns; constants are those that one of them tells."""
    energies = sorted({_energy(each.case) for each in observations})
    names = (*energies, *FITTED)
    at = {name: number for number, name in enumerate(names)}
    parts = [_parts(each) for each in observations]
    waits = [each.step.causes_s for each in observations]

    def column(values: Sequence[float]) -> Floats:
        return np.array(values, np.float64)

    hosts = {"some": at["host_routed_graphs_s"], "none": at["host_routed_s"], "all": len(names)}
    cases = [each.case for each in observations]
    rounds = [host_rounds(case) for case in cases]
    dense_s = overheads_of().host_dense_s
    return Table(
        names=names,
        fixed_N=column([part[0] for part in parts]),
        limited_N=column([part[1] for part in parts]),
        energy_N=np.array([at[_energy(case)] for case in cases]),
        drawn_N=column([drawn(case.scenario.cluster.gpu) for case in cases]),
        routed_N=column([each["exposed_all_to_all"] for each in waits]),
        overlaps_routed_N=np.array([each.case.overlaps_passes for each in observations]),
        scores_N=column([scores_s(each.case) for each in observations]),
        tensor_N=column([each["tensor_traffic"] for each in waits]),
        overlaps_tensor_N=np.array([each.case.overlaps_tensor for each in observations]),
        bubble_N=column([_bubble(each.step) for each in observations]),
        rest_N=column([each["gradient_traffic"] + each["pipeline_traffic"] for each in waits]),
        dense_s_N=column([count * dense_s for count, _ in rounds]),
        moe_N=column([count for _, count in rounds]),
        host_N=np.array([hosts.get(case.graphs, len(names) + 1) for case in cases]),
        measured_N=column([each.measured_s for each in observations]),
        weight_N=column([each.weight for each in observations]),
    )  # fmt: skip


def _energy(case: Case) -> str:
    return f"energy_pj:{architecture(case.scenario.cluster.gpu.name)}"


def _bubble(step: Step) -> float:
    return step.causes_s["pipeline_bubble"] / (
        step.device_s + step.causes_s["exposed_all_to_all"] + step.causes_s["tensor_traffic"]
    )


def _parts(each: Observation) -> tuple[float, float]:
    """Device seconds that no constant changes, and those of products that the power limit slows, at full speed."""
    gpu = each.case.scenario.cluster.gpu
    full, now = CostModel(gpu=at_full_speed(gpu)), CostModel(gpu=gpu)
    fixed_s, limited_s = each.step.device_s, 0.0
    for kernel, count in each.step.kernels.items():
        if kernel.kind in ("gemm", "grouped_gemm"):
            fixed_s -= count * now.kernel_s(kernel)
            if kernel.dtype == "fp4":
                fixed_s += count * full.kernel_s(kernel)
            else:
                limited_s += count * full.kernel_s(kernel)
    return fixed_s, limited_s
