"""A plan on real devices: what is asked, the processes that do it, and what they measured as one timeline.

Axes: S steps, T tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan import menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.domain._frozen import Frozen
from moeplan.domain.feed_forward import DenseFeedForward, Experts
from moeplan.domain.mixers import Attention, LatentAttention
from moeplan.domain.model import Layer, Model
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Ints, Program
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.errors import ExecutionError
from moeplan.executor.conditions import MEANS, TICK_S
from moeplan.executor.launch import PATIENCE_S, folder_of_a_run, run_ranks
from moeplan.partition.route import Tokens

Bools = NDArray[np.bool_]
MOST_SHARE = 0.01
"""Of the processors' time; a step of which others had more is contaminated."""
_TICKS = 2
"""Of the clock, by which the sums of all processors may be off at both ends of a step."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Repetitions:
    """All steps of a run as they were measured, and under which conditions; the first, too, which warms up."""

    start_s_ST: Floats
    end_s_ST: Floats
    processor_s_ST: Floats
    delay_share_S: Floats
    """Of the step, the part for which threads of a rank could have run and had no processor; the worst rank's."""
    others_share_S: Floats
    """Of all processors' time, the part that others than the ranks had, and the host of a virtual machine."""
    yardstick_s_SR: Floats
    """Seconds of a fixed piece of work around each step, by rank: the mean of before and behind."""
    memory_bytes_RM: Ints
    """By rank: before the job; the most that tensors took (of a processor: that the process took); that was held."""
    means: Mapping[str, bool]
    """Whether ranks could have memory kept, and be preferred."""
    operations: Floats
    """What a watch noted of rank 0, one row each; see `executor.watched`."""

    @property
    def is_clean_S(self) -> Bools:
        """Steps that nobody disturbed, the first apart. That the threads of ranks wait for one another is their own
        affair and part of what is measured, so only what others had counts.
        """
        found_S: Bools = self.others_share_S <= MOST_SHARE
        return found_S & (np.arange(len(found_S)) > 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Execution:
    """Some steps of one plan on real devices."""

    scenario: Scenario
    plan: Plan
    device: str
    timeline: Timeline
    """Of the step that took as long as half of them do; of several the first, which warms up, is not counted."""
    processor_s_T: Floats
    """What each task of that step took of its own thread's processor; on a GPU only its launch."""
    losses: tuple[float, ...]
    step_s_S: Floats
    sent_bytes: Ints
    """Task, receiver and bytes, a row each, of one step: also what goes in tasks that are no exchanges."""
    gradients: tuple[tuple[Floats, ...], ...]
    """By rank and unit what the first step's optimizer got, where that was asked for."""
    repetitions: Repetitions


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A plan to be run for some steps."""

    scenario: Scenario
    plan: Plan
    steps: int = 3
    seed: int = 0
    """Of the weights and the batches."""
    keeps_gradients: bool = False
    watches: bool = False
    """Whether products and attentions are noted one by one, which takes its own time."""


def execute(scenario: Scenario, plan: Plan, *, steps: int = 3, seed: int = 0, device: str = "auto") -> Execution:
    """The plan run by PyTorch, a process for each rank. Raises ExecutionError for what cannot be run, or fails."""
    (found,) = execute_all([Job(scenario=scenario, plan=plan, steps=steps, seed=seed)], device=device)
    return found


def execute_all(jobs: Sequence[Job], *, device: str = "auto", patience_s: float = PATIENCE_S) -> list[Execution]:
    """Several jobs of one number of ranks in one launch, one after another."""
    sizes = {job.plan.world_size for job in jobs}
    if len(sizes) != 1:
        raise ExecutionError(f"execute: the plans have {sorted(sizes)} ranks; run those of one size together")
    for job in jobs:
        if job.steps < 1:
            raise ExecutionError(f"execute: steps: {job.steps} is none; use 1 or more")
        check(job.plan, job.scenario)
    programs = [compile_plan(job.plan, job.scenario, folded=False) for job in jobs]
    where = check_device(jobs[0].plan, device)
    with folder_of_a_run([document_of(job, where) for job in jobs]) as folder:
        run_ranks(folder, programs, sizes.pop(), patience_s=patience_s)
        return [
            joined(folder, number, scenario=job.scenario, plan=job.plan, program=program, device=where)
            for number, (job, program) in enumerate(zip(jobs, programs, strict=True))
        ]


def document_of(job: Job, device: str) -> dict[str, Any]:
    """A job as its ranks read it."""
    return {
        "scenario": dict(job.scenario.document), "plan": job.plan.model_dump(mode="json", by_alias=True),
        "steps": job.steps, "seed": job.seed, "keeps_gradients": job.keeps_gradients, "watches": job.watches,
        "device": device,
    }  # fmt: skip


def joined(folder: Path, number: int, *, scenario: Scenario, plan: Plan, program: Program, device: str) -> Execution:
    """What all ranks left of one job, as one."""
    ranks = [read_rank(folder, number, rank) for rank in range(plan.world_size)]
    times = {name: _by_task(ranks, name, len(program.tasks)) for name in ("start_s_ST", "end_s_ST", "processor_s_ST")}
    for each in ranks:  # a send ends where it arrives
        times["end_s_ST"][:, each["mail"]] = np.maximum(times["end_s_ST"][:, each["mail"]], each["arrived_s_SM"])
    start_S = times["start_s_ST"].min(axis=1)
    step_s_S = times["end_s_ST"].max(axis=1) - start_S
    counted = step_s_S[1:] if len(step_s_S) > 1 else step_s_S
    step = int(np.argsort(counted, kind="stable")[(len(counted) - 1) // 2]) + len(step_s_S) - len(counted)
    timeline = Timeline(
        program=program, start_s_T=_kept(times["start_s_ST"][step] - start_S[step]),
        end_s_T=_kept(times["end_s_ST"][step] - start_S[step]), launch_s_T=_kept(np.zeros(len(program.tasks))),
        source="measured",
    )  # fmt: skip
    return Execution(
        scenario=scenario, plan=plan, device=device, timeline=timeline,
        processor_s_T=_kept(times["processor_s_ST"][step]),
        losses=tuple(float(each) for each in np.sum([each["losses"] for each in ranks], axis=0)),
        step_s_S=_kept(step_s_S), sent_bytes=np.concatenate([each["sent"] for each in ranks]),
        gradients=tuple(_gradients(each) for each in ranks), repetitions=_repetitions(ranks, times),
    )  # fmt: skip


def _repetitions(ranks: Sequence[Mapping[str, np.ndarray]], times: Mapping[str, Floats]) -> Repetitions:
    readings_RSQ = np.stack([each["readings_SQ"] for each in ranks])
    wall_RS, process_RS, delay_RS, busy_RS, steal_RS = readings_RSQ.transpose(2, 0, 1)
    wall_S, cores = wall_RS.max(axis=0), os.cpu_count() or 1
    others_s_S = np.maximum(busy_RS.max(axis=0) - process_RS.sum(axis=0) - _TICKS * TICK_S, 0.0) + steal_RS.max(axis=0)
    yardstick_s = np.stack([each["yardstick_s"] for each in ranks], axis=1)
    return Repetitions(
        **{name: _kept(values) for name, values in times.items()}, delay_share_S=_kept(delay_RS.max(axis=0) / wall_S),
        others_share_S=_kept(others_s_S / (wall_S * cores)),
        yardstick_s_SR=_kept((yardstick_s[1:] + yardstick_s[:-1]) / 2),
        memory_bytes_RM=np.stack([each["memory_bytes"] for each in ranks]),
        means={name: bool(value) for name, value in zip(MEANS, ranks[0]["means"], strict=True)},
        operations=ranks[0]["operations"],
    )  # fmt: skip


def read_rank(folder: Path, number: int, rank: int) -> dict[str, np.ndarray]:
    """What a rank left of the job of that number."""
    with np.load(folder / f"result-{number}-{rank}.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _by_task(ranks: Sequence[Mapping[str, np.ndarray]], name: str, size: int) -> Floats:
    found_ST = np.zeros((len(ranks[0][name]), size))
    for each in ranks:
        found_ST[:, each["tasks"]] = each[name]
    return found_ST


def _kept(values: Floats) -> Floats:
    values.setflags(write=False)
    return values


def _gradients(rank: Mapping[str, np.ndarray]) -> tuple[Floats, ...]:
    return tuple(rank[f"gradient{unit}"] for unit in range(sum(name.startswith("gradient") for name in rank)))


def summary(found: Execution) -> dict[str, Any]:
    """What came out, in plain numbers: losses, seconds, bytes by kind of exchange."""
    program, busy_s = found.timeline.program, _busy_s(found)
    sent: dict[str, int] = {}
    for task, _, size in found.sent_bytes.tolist():
        kind = program.kind(task)
        sent[kind] = sent.get(kind, 0) + size
    return {
        "step_s": found.timeline.step_s, "step_s_of_each": found.step_s_S.tolist(), "losses": list(found.losses),
        "tokens_per_s_per_gpu": found.timeline.tokens_per_s_per_gpu, "device": found.device, "busy_s": busy_s,
        "sent_bytes": sent,
    }  # fmt: skip


def _busy_s(found: Execution) -> dict[str, float]:
    """Seconds of each kind of task on the busiest rank; exchanges with their waiting."""
    timeline = found.timeline
    program, lane = timeline.program, timeline.busiest_lane
    total: dict[str, float] = {}
    for task in np.flatnonzero(program.tasks.lane_T == lane).tolist():
        kind = program.kind(task)
        total[kind] = total.get(kind, 0.0) + float(timeline.end_s_T[task] - timeline.start_s_T[task])
    return dict(sorted(total.items(), key=lambda each: -each[1]))


# ---- what cannot be run

RANKS_PER_CORE = 4
"""More processes than that on one core wait for each other most of the time."""
_DTYPES = ("fp32", "bf16")
_ATTENTION = ("output_bias", "gate", "shared_key_value", "cross", "relative_buckets", "post_norm")
_LATENT = ("indexer", "down_bias", "output_bias", "post_norm")
_DENSE = ("bias", "post_norm")
_EXPERTS = ("bias", "router_bias", "router_scale", "expert_scale", "zero_experts", "latent_size", "dense_branch",
            "post_norm")  # fmt: skip
_BRANCH = ("bias", "token_gate", "mixing", "norms")
_MODEL = ("encoder_layers", "learned_positions", "patches", "head_bias", "tied_embeddings")


def check(plan: Plan, scenario: Scenario) -> None:
    """Raises ExecutionError for the first thing that would have to be left out or done otherwise."""
    for problem in problems(plan, scenario):
        raise ExecutionError(f"execute: {problem}")


def check_device(plan: Plan, device: str, *, processes: int | None = None) -> str:
    """The device that `auto` means, or the one asked for. Raises ExecutionError where it cannot run the plan.

    `processes` run at a time: without a number, all ranks.
    """
    processes = processes or plan.world_size
    if find_spec("torch") is None:
        raise ExecutionError("execute: PyTorch is not installed; pip install 'moeplan[executor]'")
    if device not in ("auto", "cpu", "cuda"):
        raise ExecutionError(f"execute: device {device!r} is unknown; use auto, cpu or cuda")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and count == 0:
        raise ExecutionError("execute: device cuda: this machine has no CUDA device that PyTorch can use; use cpu")
    chosen = "cuda" if device == "cuda" or (device == "auto" and count >= processes) else "cpu"
    _check_room(processes, chosen, count)
    if chosen == "cuda" and processes > 1 and not torch.distributed.is_nccl_available():
        raise ExecutionError("execute: this PyTorch is built without NCCL; install one with it, or use device cpu")
    if chosen == "cuda" and plan.precision.compute == "bf16" and not torch.cuda.is_bf16_supported():
        raise ExecutionError("execute: precision bf16: this GPU has none; use fp32 (--set choose.precision=...)")
    return chosen


def gpu_name() -> str:
    """What the first GPU is called."""
    import torch

    return torch.cuda.get_device_name(0)


def _check_room(ranks: int, device: str, gpus: int) -> None:
    cores = os.cpu_count() or 1
    if device == "cuda" and ranks > gpus:
        found = f"the plan has {ranks} ranks, but this machine has {gpus} GPUs"
        raise ExecutionError(f"execute: {found}; use torchrun on more machines, or a plan of at most {gpus} ranks")
    if device == "cpu" and ranks > RANKS_PER_CORE * cores:
        found = f"the plan has {ranks} ranks, but {cores} cores can take {RANKS_PER_CORE * cores}"
        raise ExecutionError(f"execute: {found}; use a smaller cluster, such as --set cluster.gpus_per_node={cores}")


def problems(plan: Plan, scenario: Scenario) -> Iterator[str]:
    """Everything of a legal plan and its scenario that is not run, with what is."""
    if not scenario.workload.is_training:
        yield f"workload.phase {scenario.workload.phase!r} is not run; use train"
    yield from _model_problems(scenario)
    yield from _precision_problems(plan)
    yield from _plan_problems(plan, scenario)


def _model_problems(scenario: Scenario) -> Iterator[str]:
    model = scenario.model
    yield from _set(model, _MODEL, "model")
    if not model.head:
        yield "model.head false is not run; use a model with a head, such as tiny-moe"
    if model.embedding_norm != "none":
        yield f"model.embedding_norm {model.embedding_norm!r} is not run; use none"
    if model.mtp and scenario.workload.train_mtp:
        yield "multi-token prediction is not run; use --set workload.train_mtp=false"
    for number, layer in enumerate(model.layers):
        if layer is not (model.layers[number - 1] if number else None):
            yield from _layer_problems(layer, f"model.layers.{number}")


def _layer_problems(layer: Layer, where: str) -> Iterator[str]:
    mixer, block = layer.mixer, layer.feed_forward
    yield from _set(layer, ("cross_attention", "hyper_streams"), where)
    if isinstance(mixer, Attention):
        yield from _set(mixer, _ATTENTION, f"{where}.mixer")
        if not mixer.causal or mixer.qk_norm == "full":
            yield f"{where}.mixer: attention that is not causal, or qk_norm 'full', is not run; use none or head"
    elif isinstance(mixer, LatentAttention):
        yield from _set(mixer, _LATENT, f"{where}.mixer")
    else:
        found = "no mixer" if mixer is None else f"mixer {mixer.kind!r}"
        yield f"{where}: {found} is not run; use attention or latent_attention"
    if isinstance(block, DenseFeedForward):
        yield from _set(block, _DENSE, f"{where}.feed_forward")
    elif isinstance(block, Experts):
        yield from _set(block, _EXPERTS, f"{where}.feed_forward")
        if block.shared:
            yield from _set(block.shared, _BRANCH, f"{where}.feed_forward.shared")


def _set(part: Frozen | Model, names: tuple[str, ...], where: str) -> Iterator[str]:
    """The fields that are not as they are in a plain model."""
    for name in names:
        value = getattr(part, name)
        if value and value != "none":
            shown = "" if isinstance(value, Frozen | tuple) else f" {value!r}"
            yield f"{where}.{name}{shown} is not run; use a model without it, such as tiny-moe"


def _precision_problems(plan: Plan) -> Iterator[str]:
    precision = plan.precision
    for name in ("compute", "weights", "activations", "dispatch", "combine", "gradients"):
        if getattr(precision, name) not in _DTYPES:
            yield f"precision.{name} {getattr(precision, name)!r} is not run; use {' or '.join(_DTYPES)}"
    if not precision.compute == precision.weights == precision.activations:
        found = f"{precision.compute}, {precision.weights}, {precision.activations}"
        yield f"precision: compute, weights and activations are {found}; use one format for all three"
    if precision.kept not in (None, precision.activations):
        yield f"precision.kept {precision.kept!r} is not run; leave it out"
    updated = precision.master_weights or precision.weights
    if updated not in _DTYPES or precision.moments != updated:
        found = f"moments are {precision.moments}, the weights that are updated {updated}"
        yield f"precision: {found}; use one format for both, fp32 or bf16"


def _plan_problems(plan: Plan, scenario: Scenario) -> Iterator[str]:
    if plan.recompute == "selective":
        yield "recompute 'selective' is not run; use none or full"
    if plan.arbitration != "fair":
        yield f"arbitration {plan.arbitration!r} has no effect on real wires, which share as they do; use fair"
    if plan.ep > 1 and getattr(menu.module("collectives", plan.all_to_all), "COUNTS_COPIES", False):
        if plan.all_to_all != "node_dedup":
            yield f"all_to_all {plan.all_to_all!r} is not run; use node_dedup, linear or two_stage"
        if plan.overlap_degree > 1:
            found = f"all_to_all {plan.all_to_all!r} with overlap_degree {plan.overlap_degree}"
            yield f"{found} is not run, as a token's choices go in different parts; use overlap_degree 1, or linear"
    tokens, length = Tokens.of(plan, scenario.workload), scenario.workload.query_length
    if plan.tp > 1 and tokens.group % plan.tp:
        yield f"tp {plan.tp} does not divide the {tokens.group} tokens of a micro-batch; use a tp that does"
    if plan.tp > 1 and scenario.model.vocab_size % plan.tp:
        yield f"tp {plan.tp} does not divide the vocabulary of {scenario.model.vocab_size}; use a tp that does"
    heads = [mixer.num_kv_heads for mixer in _mixers(scenario) if isinstance(mixer, Attention)]
    if any(count % plan.tp for count in heads):
        yield f"tp {plan.tp} does not divide {min(heads)} key-value heads, and copies of one are not run; use a divisor"
    if plan.cp > 1 and length % (2 * plan.cp):
        yield f"cp {plan.cp}: {2 * plan.cp} pieces do not divide a sequence of {length} tokens; use a multiple"


def _mixers(scenario: Scenario) -> Iterator[object]:
    yield from (layer.mixer for layer in dict.fromkeys(scenario.model.layers))
