"""Peak memory of a plan, one GPU for each pipeline rank, the hottest under uneven routing; and whether it fits.

Two factors, computed apart and cached by what they depend on, for a planner asks tens of thousands of times: `states`
are there all the time, `held` comes and goes with micro-batches. Their sum is the `footprint`.

Counted at the peak: what micro-batches left behind and the layer that is made again, at the worst moment of the rank's
real order, and on top of it the gradients at the widest kernel and the buffers of the largest exchanges of a layer. An
upper bound, as those need not meet. A rank that runs two passes at once has the latter twice.

Left out: what a framework holds beside tensors (the GPU's `usable_memory` leaves room for it), copies of weights in
FP8, a copy of the scores over the vocabulary in half precision.

Axes: P pipeline rank, V virtual stage, R row of bytes (the embedding, each layer, the head), G place in the
expert-parallel group, K moment, C what is held, by kind and chunk (see cost/memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeplan import menu
from moeplan.cost import memory
from moeplan.cost.memory import Memory
from moeplan.domain.model import Layer
from moeplan.domain.plan import DTYPE_BYTES, Plan
from moeplan.domain.program import Floats, Ints
from moeplan.domain.result import StageMemory
from moeplan.domain.scenario import Scenario
from moeplan.partition.legal import problems
from moeplan.partition.micro_batch import TOKENS, Asked, Rows, asked_of, rows_of
from moeplan.partition.stages import VirtualStage, pipeline
from moeplan.partition.weights import weights_of
from moeplan.units import show

_WEIGHTS = ("tp", "ep", "etp", "placement")
_STAGES = ("dp", "pp", "vpp", "stages", "schedule")
_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "logits", "cache")


def footprint(plan: Plan, scenario: Scenario) -> tuple[StageMemory, ...]:
    """Peak bytes of each pipeline rank of a legal plan, by what they are for."""
    total = states(plan, scenario) + held(plan, scenario)
    columns = {name: getattr(total, f"{name}_P").tolist() for name in _PARTS}
    usable = scenario.cluster.gpu.usable_memory_bytes
    return tuple(
        StageMemory(stage=stage, usable=usable, total=sum(values), **dict(zip(_PARTS, values, strict=True)))
        for stage, values in enumerate(zip(*columns.values(), strict=True))
    )


def states(plan: Plan, scenario: Scenario) -> Memory:
    """Weights, gradients and optimizer of each pipeline rank, and what ZeRO gathers of them (in `buffers_P`)."""
    return _states(asked_of(plan, scenario, *_WEIGHTS, "cp", "zero_dense", "zero_expert", "precision", *_STAGES))


def held(plan: Plan, scenario: Scenario, *, evened: bool = False) -> Memory:
    """Activations, buffers, scores over the vocabulary and cache of each pipeline rank, at its hottest place.

    `evened`: as if all places got the same, which is no more than the hottest one has wherever experts stand.
    """
    return _held(asked_of(plan, scenario, "recompute", "overlap_degree", *TOKENS, *_STAGES, evened=evened))


# ---- virtual stages


@lru_cache(maxsize=1024)
def _virtual(schedule: str, pp: int, vpp: int) -> Ints:
    """Virtual stage of each pipeline rank and chunk, shape (P, chunks)."""
    position = menu.load("schedules", schedule, "virtual_stage")
    chunks = [[position(rank, chunk, num_stages=pp, num_chunks=vpp) for chunk in range(vpp)] for rank in range(pp)]
    return np.array(chunks, np.int64)


def _bounds(plan: Plan) -> Ints:
    """First row of each virtual stage, and the number of rows: the embedding is row 0, the head the last."""
    bounds = np.concatenate([[0], np.cumsum(plan.stages) + 1])
    bounds[-1] += 1
    return bounds


def _until(rows_RG: Floats) -> Floats:
    """Sums of the rows before each row, and of all. Exact: bytes are whole or halves, far below 2 ** 52."""
    return np.concatenate([np.zeros_like(rows_RG[:1]), np.cumsum(rows_RG, axis=0)])


def _between(until_RG: Floats, bounds: Ints) -> Floats:
    """Sum over the rows of each virtual stage."""
    found_VG: Floats = until_RG[bounds[1:]] - until_RG[bounds[:-1]]
    return found_VG


def _largest(rows_RG: Floats, bounds: Ints) -> Floats:
    """Largest row of each virtual stage, 0 for one without rows."""
    found_VG: Floats = np.maximum.reduceat(rows_RG, bounds[:-1], axis=0)
    found_VG[bounds[1:] == bounds[:-1]] = 0.0
    return found_VG


# ---- states


@lru_cache(maxsize=256)
def _weight_rows(asked: Asked, num_stages: int) -> tuple[Floats, Floats]:
    """Weights of one rank by row, dense and of experts. Tied to the embedding in the same stage, the head has none."""
    model = asked.scenario.model
    last = pipeline(model, asked.plan, asked.scenario.workload).stages[-1]

    def stage(layers: tuple[Layer, ...], *, embedding: bool, head: bool) -> VirtualStage:
        return VirtualStage(
            number=0, layers=layers, first_layer=0, moe=(0,) * len(layers), has_embedding=embedding, has_head=head,
            prediction=last.prediction if head else (), holders=(),
        )  # fmt: skip

    alone = num_stages == 1
    first = [stage((), embedding=not alone, head=False)]
    layers = [stage((layer,), embedding=False, head=False) for layer in model.all_layers]
    rows = [
        list(weights_of(each, model, asked.plan)) for each in (*first, *layers, stage((), embedding=alone, head=True))
    ]
    dense = np.array([sum(weights.dense for weights in row) for row in rows], np.float64)
    return dense, np.array([sum(weights.expert for weights in row) for row in rows], np.float64)


@lru_cache(maxsize=4096)
def _states(asked: Asked) -> Memory:
    plan, training = asked.plan, asked.scenario.workload.is_training
    copies = menu.load("schedules", plan.schedule, "COPIES") if training else 1
    rows = _weight_rows(asked.only(*_WEIGHTS), len(plan.stages))
    kinds = (
        _kind_states(rows[0], plan, replicas=plan.dp * plan.cp * copies, zero=plan.zero_dense, training=training),
        _kind_states(rows[1], plan, replicas=plan.edp * copies, zero=plan.zero_expert, training=training),
    )
    return kinds[0] + kinds[1]


def _kind_states(rows_R: Floats, plan: Plan, *, replicas: int, zero: int, training: bool) -> Memory:
    """States of one of the two kinds of weights; serving has the weights alone, whole."""
    virtual, bounds = _virtual(plan.schedule, plan.pp, plan.vpp), _bounds(plan)
    parameters_P = _between(_until(rows_R), bounds)[virtual].sum(axis=1)
    weights_P, gradients_P, optimizer_P = memory.state_bytes(
        parameters_P, replicas=replicas, zero=zero if training else 0, precision=plan.precision
    )
    none_P = np.zeros(plan.pp)
    if not training:
        return _memory(plan.pp, weights_P=weights_P)
    gathered_P = none_P
    if zero >= 2:
        ends_R = np.zeros_like(rows_R)
        ends_R[[0, -1]] = rows_R[[0, -1]]
        gathered_P = memory.gathered_bytes(
            parameters_P, largest_layer=_largest(rows_R - ends_R, bounds)[virtual].max(axis=1),
            ends=_between(_until(ends_R), bounds)[virtual].sum(axis=1), replicas=replicas, zero=zero,
            precision=plan.precision,
        )  # fmt: skip
    return _memory(plan.pp, weights_P=weights_P, gradients_P=gradients_P, optimizer_P=optimizer_P, buffers_P=gathered_P)


def _memory(num_ranks: int, **parts_P: Floats) -> Memory:
    """Memory of which only some parts are not 0."""
    return Memory(**{f"{name}_P": np.zeros(num_ranks) for name in _PARTS} | parts_P)


# ---- all micro-batches


@lru_cache(maxsize=512)
def _moments(schedule: str, pp: int, vpp: int, microbatches: int) -> tuple[Floats, Ints]:
    """The moments of each pipeline rank at which it may hold most, and the most passes it runs at once."""
    orders = menu.load("schedules", schedule, "actions")(pp, microbatches, num_chunks=vpp)
    found = [memory.moments(order, num_chunks=vpp) for order in orders]
    moments_PKC = np.zeros((pp, max(map(len, found)), 3 * vpp))
    for rank, counts_KC in enumerate(found):
        moments_PKC[rank, : len(counts_KC)] = counts_KC
    return moments_PKC, np.array([max(map(len, order)) for order in orders], np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Policy:
    """Bytes of one micro-batch by row and place under a recompute policy; `until` are sums of rows, see `_until`."""

    stays_until_RG: Floats
    waits_until_RG: Floats
    """What is held from I to W."""
    again_RG: Floats
    """What is made again while the layer's backward pass runs."""
    local_RG: Floats
    """Gradients at the widest kernel while it runs; serving: what flows through a layer, too."""
    buffers_RG: Floats


@lru_cache(maxsize=256)
def _policy(asked: Asked) -> _Policy:
    plan, rows, training = asked.plan, rows_of(asked.only(*TOKENS)), asked.scenario.workload.is_training
    stays_RG, again_RG = memory.by_policy(
        plan.recompute, inputs=rows.inputs_RG, kept=rows.kept_RG, dropped=rows.dropped_RG
    )
    transit_RG = memory.transit_bytes(
        sent=rows.sent_RG, received=rows.received_RG, overlap_degree=plan.overlap_degree,
        element_bytes=(DTYPE_BYTES[plan.precision.dispatch], DTYPE_BYTES[plan.precision.combine]),
    )  # fmt: skip
    return _Policy(
        stays_until_RG=_until(stays_RG), waits_until_RG=_until(rows.weight_input_RG), again_RG=again_RG,
        local_RG=rows.work_RG + (0.0 if training else 2.0) * rows.inputs_RG, buffers_RG=transit_RG + rows.gather_RG,
    )  # fmt: skip


@lru_cache(maxsize=8192)
def _held(asked: Asked) -> Memory:
    plan, workload = asked.plan, asked.scenario.workload
    rows, policy = rows_of(asked.only(*TOKENS)), _policy(asked.only("recompute", "overlap_degree", *TOKENS))
    virtual, bounds = _virtual(plan.schedule, plan.pp, plan.vpp), _bounds(plan)
    scores_PC1 = _scores(rows, virtual, len(plan.stages))
    local_PG = _largest(policy.local_RG, bounds)[virtual].max(axis=1)
    buffers_PG = _largest(policy.buffers_RG, bounds)[virtual].max(axis=1)
    ranks = np.arange(plan.pp)
    if not workload.is_training:
        place_P = (local_PG + buffers_PG).argmax(axis=1)
        return _memory(
            plan.pp, activations_P=local_PG[ranks, place_P], buffers_P=buffers_PG[ranks, place_P],
            logits_P=scores_PC1[:, : plan.vpp, 0].sum(axis=1),
            cache_P=workload.global_batch / plan.dp * _between(_until(rows.cache_R), bounds)[virtual].sum(axis=1),
        )  # fmt: skip
    kept_VG, waits_VG = _between(policy.stays_until_RG, bounds), _between(policy.waits_until_RG, bounds)
    moments_PKC, passes_P = _moments(plan.schedule, plan.pp, plan.vpp, plan.num_microbatches(workload.global_batch))
    again_VG = _largest(policy.again_RG, bounds)
    kept_PCG = np.concatenate([kept_VG[virtual], waits_VG[virtual], again_VG[virtual]], axis=1)
    peak_PG, moment_PG = memory.peak_bytes(moments_PKC, kept_PCG + scores_PC1)
    place_P = (peak_PG + passes_P[:, None] * (local_PG + buffers_PG)).argmax(axis=1)
    logits_P = (moments_PKC[ranks, moment_PG[ranks, place_P]] * scores_PC1[:, :, 0]).sum(axis=1)
    return _memory(
        plan.pp, activations_P=peak_PG[ranks, place_P] - logits_P + passes_P * local_PG[ranks, place_P],
        buffers_P=passes_P * buffers_PG[ranks, place_P], logits_P=logits_P,
    )  # fmt: skip


def _scores(rows: Rows, virtual: Ints, num_stages: int) -> Floats:
    """Scores over the vocabulary that a micro-batch leaves in each chunk: in the last virtual stage alone."""
    is_last = virtual == num_stages - 1
    found: Floats = np.concatenate([is_last * each for each in (rows.logits, rows.weight_logits, 0.0)], axis=1)[
        :, :, None
    ]
    return found


# ---- whether it fits


def check_memory(plan: Plan, scenario: Scenario) -> str | None:
    """None if every pipeline rank fits its GPU, else one sentence: where, what is largest, by how much, what helps."""
    found = footprint(plan, scenario)
    worst = max(found, key=lambda stage: stage.total)
    if worst.total <= worst.usable:
        return None
    name = max(_PARTS, key=lambda part: float(getattr(worst, part)))
    return (
        f"stage {worst.stage} needs {show(worst.total, 'B')} of {show(worst.usable, 'B')} usable, "
        f"{show(worst.total - worst.usable, 'B')} too much; most of it is {name}, "
        f"{show(getattr(worst, name), 'B')}; {_remedy(plan, scenario, worst)}"
    )


def _remedy(plan: Plan, scenario: Scenario, worst: StageMemory) -> str:
    """The first of the smallest changes that makes the plan fit, or how many times as many GPUs."""
    for change in _changes(plan, scenario):
        other = plan.model_copy(update=change)
        if next(problems(other, scenario), None) is None and filled_share(other, scenario) <= 1:
            return "use " + " and ".join(f"{name} {value}" for name, value in change.items())
    times = worst.total / worst.usable
    return f"no other micro_batch, recompute or ZeRO stage helps; use more GPUs, {times:.1f} times as many or more"


def filled_share(plan: Plan, scenario: Scenario) -> float:
    """Peak bytes of the fullest rank over what is usable; the plan fits if it is 1 or less."""
    total_P = (states(plan, scenario) + held(plan, scenario)).total_P
    return float(total_P.max()) / scenario.cluster.gpu.usable_memory_bytes


def _changes(plan: Plan, scenario: Scenario) -> Iterator[Mapping[str, object]]:
    """The cheapest in time first: recompute a little, shard more, smaller micro-batches, recompute all, all of it."""
    smaller = [{"micro_batch": size} for size in range(plan.micro_batch - 1, 0, -1) if plan.micro_batch % size == 0]
    if not scenario.workload.is_training:
        yield from smaller
        return
    policies = {"none": ["selective", "full"], "selective": ["full"], "full": []}[plan.recompute]
    sharded = [
        {"zero_dense": dense, "zero_expert": expert}
        for dense, expert in ((1, 1), (2, 2), (3, 2), (3, 3))
        if dense >= plan.zero_dense
        and expert >= plan.zero_expert
        and (dense, expert) != (plan.zero_dense, plan.zero_expert)
    ]
    yield from ({"recompute": policy} for policy in policies[:-1])
    yield from (*sharded, *smaller)
    yield from ({"recompute": policy} for policy in policies[-1:])
    yield from ({"recompute": "full", **change} for change in (*smaller, *sharded))
    yield from ({"recompute": "full", **size, **shard} for size in smaller[-1:] for shard in sharded)
