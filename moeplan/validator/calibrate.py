"""The devices at hand, measured into a cost model that extends their sheet."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from moeplan.cost.cost_model import CostModel
from moeplan.cost.measured import product_s
from moeplan.domain.measured import Measured, Table, Terms
from moeplan.domain.program import Floats, Stream, Work
from moeplan.domain.scenario import Scenario
from moeplan.executor.execute import RANKS_PER_CORE, Execution, Job, check_device, execute_all
from moeplan.partition.footprint import footprint
from moeplan.validator.cases import Case, of_many_ranks, of_one_rank, overlapping
from moeplan.validator.device import device_name, environment
from moeplan.validator.fit import Residual, fit_table, fit_terms, table_errors
from moeplan.validator.samples import Run, Sample, jitter, meetings

Progress = Callable[[str, float, float | None], None]
_STEPS, _WATCHED = 9, 6
"""Of each case, and of each case once more with its products noted one by one."""
_LEAST_SHARE = 0.02
"""Where threads that exchange come first nothing is left beside them; but kernels that stand still never end."""
_OF_MANY = frozenset({"router"})
"""Tasks that one rank alone does not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was measured, as a figure of the device, and how well it fits what was measured."""

    base: str
    """The sheet that it extends."""
    measured: Measured
    compute_share: float
    """Of a kernel's speed, beside an exchange."""
    residuals: tuple[Residual, ...]
    environment: str
    date: str
    dropped: int
    """Repetitions that others disturbed."""
    repetitions: int


def calibrate(
    scenario: Scenario, *, quick: bool = False, device: str = "auto", progress: Progress | None = None
) -> Calibration:
    """Measures this machine's devices in small plans on the scenario's kind of cluster; about ten minutes, or two.

    Raises ExecutionError where nothing can be run.
    """
    told = progress or (lambda message, done, whole: None)
    whole, found = float(len(_worlds()) + 2), _Found()
    where = check_device(next(of_one_rank(scenario, dtype="fp32", quick=True)).plan, device)
    told("products and tasks of one rank", 0, whole)
    for dtype in ("fp32",) if quick else ("fp32", "bf16"):
        cases = list(of_one_rank(scenario, dtype=dtype, quick=quick))
        jobs = [_job(each, watches) for each in cases for watches in (False, True)]
        runs = execute_all(jobs, device=where)
        found.add(zip([each for each in cases for _ in range(2)], runs, strict=True))
    for done, ranks in enumerate(_worlds(), 1):
        told(f"exchanges of {ranks} ranks", done, whole)
        cases = list(of_many_ranks(scenario, ranks, quick=quick))
        found.add(zip(cases, execute_all([_job(each) for each in cases], device=where), strict=True))
    told("exchanges beside experts", whole - 1, whole)
    beside = list(overlapping(scenario, 2)) if _worlds() else []
    if beside:
        found.beside = execute_all([_job(each) for each in beside], device=where)
    return found.calibration(scenario, where)


def _worlds() -> list[int]:
    """The numbers of ranks whose exchanges are measured: two, and more than there are cores if those are few."""
    cores = os.cpu_count() or 1
    return [ranks for ranks in (2, 4) if ranks <= min(4, RANKS_PER_CORE * cores)]


def _job(case: Case, watches: bool = False) -> Job:
    return Job(scenario=case.scenario, plan=case.plan, steps=_WATCHED if watches else _STEPS, watches=watches)


class _Found:
    """Executions, and what is fitted to them."""

    def __init__(self) -> None:
        self.runs: list[tuple[Case, Execution]] = []
        self.beside: list[Execution] = []
        self.first: list[Execution] = []
        """Of each launch."""
        self.residuals: list[Residual] = []

    def add(self, runs: Iterable[tuple[Case, Execution]]) -> None:
        """Those of one launch."""
        launch = list(runs)
        self.runs += launch
        self.first += [found for _, found in launch[:1]]

    @property
    def all(self) -> list[Execution]:
        """Every execution."""
        return [found for _, found in self.runs] + self.beside

    def calibration(self, scenario: Scenario, device: str) -> Calibration:
        """All figures."""
        reference_s = float(
            np.median(np.concatenate([each.repetitions.yardstick_s_SR[1:].ravel() for each in self.all]))
        )
        runs = [Run(found=each, reference_s=reference_s, is_held_out=case.is_held_out) for case, each in self.runs]
        beside = [Run(found=each, reference_s=reference_s) for each in self.beside]
        products = self._products(runs)
        tasks = self._tasks(runs, products)
        exchanges = self._exchanges(runs)
        cores = os.cpu_count() or 1
        measured = Measured(
            device=device_name(device), processors=cores if device == "cpu" else 10**6, reference_s=reference_s,
            process_memory_bytes=float(np.median([_own_memory_bytes(each) for each in self.first])),
            products=products, tasks=tasks, exchanges=exchanges,
            jitter=jitter([run for run in (*runs, *beside) if len(run.program.lanes) > 1]),
        )  # fmt: skip
        alone_s = None if device == "cpu" else CostModel(gpu=replace(scenario.cluster.gpu, measured=measured))
        clean = [each.repetitions.is_clean_S[1:] for each in self.all]
        return Calibration(
            base=scenario.cluster.gpu.name, measured=measured, compute_share=compute_share(beside, alone_s),
            residuals=tuple(self.residuals), environment=environment(device),
            date=datetime.now(UTC).strftime("%Y-%m-%d"), dropped=sum(int((~each).sum()) for each in clean),
            repetitions=sum(len(each) for each in clean),
        )  # fmt: skip

    def _products(self, runs: Sequence[Run]) -> dict[str, dict[str, Terms]]:
        samples = [each for run in runs if len(run.found.repetitions.operations) for each in run.product_samples()]
        found: dict[str, dict[str, Terms]] = defaultdict(dict)
        for (dtype, name), group in _grouped(samples).items():
            terms = fit_terms(group)
            found[dtype][name] = terms
            predicted = [
                terms.seconds(flops=each.flops, size_bytes=each.size_bytes, count=each.calls) for each in group
            ]
            self._note(f"{name} {dtype}", group, predicted)
        return dict(found)

    def _tasks(self, runs: Sequence[Run], products: Mapping[str, Mapping[str, Terms]]) -> dict[str, dict[str, Terms]]:
        """What tasks take beside their products."""
        pairs: list[tuple[Sample, Work]] = []
        for run in runs:
            if not len(run.found.repetitions.operations):
                alone = len(run.program.lanes) == 1
                pairs += [pair for pair in run.task_samples() if (pair[1].kind in _OF_MANY) != alone]
        found: dict[str, dict[str, Terms]] = defaultdict(dict)
        works = {id(sample): work for sample, work in pairs}
        for (dtype, name), group in _grouped([sample for sample, _ in pairs]).items():
            beside_s = [_products_s(works[id(each)], products) for each in group]
            terms = fit_terms(group, beside_s=beside_s)
            found[dtype][name] = replace(terms, peak_flops_per_s=None)
            pairs_s = zip(group, beside_s, strict=True)
            self._note(f"task {name} {dtype}", group, [
                known + terms.seconds(flops=0.0, size_bytes=each.size_bytes) for each, known in pairs_s
            ])  # fmt: skip
        return dict(found)

    def _exchanges(self, runs: Sequence[Run]) -> dict[str, Table]:
        samples = [each for run in runs if len(run.program.lanes) > 1 for each in run.exchange_samples()]
        found: dict[str, Table] = {}
        by_name: dict[str, list[Sample]] = defaultdict(list)
        for each in samples:
            if each.size_bytes > 0:
                by_name[each.name].append(each)
        for name, group in sorted(by_name.items()):
            found[name] = fit_table(group)
            self.residuals.append(Residual.of(name, group, table_errors(group)))
        return found

    def _note(self, name: str, samples: Sequence[Sample], predicted: Sequence[float]) -> None:
        errors = [each / sample.seconds - 1 for each, sample in zip(predicted, samples, strict=True)]
        self.residuals.append(Residual.of(name, samples, errors))


def _own_memory_bytes(found: Execution) -> float:
    """What a process takes beside the tensors of its job: the interpreter, libraries, and what these keep."""
    tensors = max(stage.total for stage in footprint(found.plan, found.scenario))
    return float(found.repetitions.memory_bytes_RM[0, 1]) - tensors


def _grouped(samples: Iterable[Sample]) -> dict[tuple[str, str], list[Sample]]:
    found: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for each in samples:
        if each.name:
            found[each.dtype, each.name].append(each)
    return found


def _products_s(work: Work, products: Mapping[str, Mapping[str, Terms]]) -> float:
    from moeplan.cost.measured import product_class

    return sum(
        product_s(kernel, products[kernel.dtype][product_class(kernel)])
        for kernel in work.kernels
        if kernel.kind != "elementwise"
    )


def compute_share(runs: Sequence[Run], model: CostModel | None) -> float:
    """What is left of a kernel's speed beside an exchange: the least squares of

        took = factor x alone + (1 - share) x seconds of exchanges beside

    over the tasks of all runs, where the factor is what `alone` is off by without any exchange.
    """
    rows = [_beside_exchanges(run, model) for run in runs]
    if not rows:
        return 1.0
    took_N, alone_N, beside_N = np.concatenate(rows).T
    lost = np.linalg.lstsq(np.stack([alone_N, beside_N], axis=1), took_N, rcond=None)[0][1]
    return float(np.clip(1.0 - lost, _LEAST_SHARE, 1.0))


def _beside_exchanges(run: Run, model: CostModel | None) -> Floats:
    """For each task that computes what it took, what it would alone, and how long exchanges were on beside it.

    Alone it takes the time of its thread's processor, or what a cost model says. Before its last member has come to it
    an exchange takes nothing.
    """
    tasks, start_s_ST = run.program.tasks, np.array(run.start_s_ST)
    for members in meetings(run.program).values():
        start_s_ST[:, members] = start_s_ST[:, members].max(axis=1, keepdims=True)
    rows = []
    for task in np.flatnonzero(tasks.stream_T == Stream.COMPUTE).tolist():
        others = np.flatnonzero((tasks.lane_T == tasks.lane_T[task]) & (tasks.stream_T != Stream.COMPUTE))
        start_S, end_S = start_s_ST[:, task, None], run.end_s_ST[:, task, None]
        both_SX = np.minimum(run.end_s_ST[:, others], end_S) - np.maximum(start_s_ST[:, others], start_S)
        beside_S, took_S = np.maximum(both_SX, 0.0).sum(axis=1), (end_S - start_S)[:, 0]
        work = run.program.works[int(tasks.unit_T[task])]
        alone_S = run.own_s_ST[:, task] if model is None else model.cost(work).seconds / run.speed_S
        rows.append([run.mean_s(each) for each in (took_S, alone_S, beside_S)])
    return np.array(rows)
