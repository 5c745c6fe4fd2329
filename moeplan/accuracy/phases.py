"""Records of a profile's phases: kernels and exchanges of one forward and one backward chunk, by what they are for.

The chunk is as many layers with experts as the profile has (four), on one rank of an expert-parallel group that is the
whole machine. A phase is the sum over kernels, and where it waits for other ranks it is not foreseen: every expert gets
the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeplan.accuracy.cases import Case, deduplicating, precision_of, scenario_of
from moeplan.accuracy.overheads import overheads_of
from moeplan.compiler.parts import Parts
from moeplan.cost.cost_model import CostModel
from moeplan.domain.model import Layer
from moeplan.domain.plan import Plan
from moeplan.domain.program import Kernel, Pass
from moeplan.errors import CatalogueError
from moeplan.network.exchange import time_of
from moeplan.partition.legal import check_plan
from moeplan.partition.route import Tokens, load_of

Row = Mapping[str, Any]
_LAYERS = 4
_FORWARD, _INPUT, _WEIGHT = Pass.FORWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT
_PASSES = (_FORWARD, _INPUT, _WEIGHT)
_COMPUTED = {"attn": ("attention",), "mlp": ("shared", "experts")}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The works of a layer by phase, and its exchanges."""

    parts: Parts
    case: Case
    layer: Layer
    model: CostModel

    def kernels(self, block: str, passes: Pass) -> list[Kernel]:
        """Of attention (with the router behind it) or of shared and routed experts, in one layer."""
        parts, experts = self.parts, self.layer.experts
        assert experts is not None
        if block == "attn":
            return list(parts.works[parts.mixer(self.layer, passes, routed=True)].kernels)
        shared = parts.shared(experts, passes)
        units = [parts.experts(experts, passes, moe=0, place=0, part=0)] + ([] if shared is None else [shared])
        return [kernel for unit in units for kernel in parts.works[unit].kernels]

    def milliseconds(self, block: str, passes: Pass, chosen: Callable[[Kernel], bool] = lambda _: True) -> float:
        """Of the chosen kernels of all layers."""
        return 1e3 * _LAYERS * sum(self.model.kernel_s(each) for each in self.kernels(block, passes) if chosen(each))

    def exchange_ms(self, kind: str) -> float:
        """Of one layer's dispatch or combine beside kernels, which is how all of them run."""
        experts = self.layer.experts
        assert experts is not None
        unit = self.parts.routed(0, experts, kind, moe=0)
        assert unit is not None
        alone = time_of(self.parts.exchanges[unit], self.case.scenario.cluster).time_s
        return 1e3 * alone / self.model.shares.exchange


def values_of(record: Row) -> dict[str, float]:
    """The phase that a record's id ends with, by the names of what it measured. Raises CatalogueError."""
    name = str(record["id"]).removeprefix("trace-train-")
    if name not in PHASES:
        raise CatalogueError(f"id: {name!r} is no phase of a chunk; use trace-train- and one of {', '.join(PHASES)}")
    return PHASES[name](_chunk(record))


def _chunk(record: Row) -> Chunk:
    count, ep = record["hardware"]["count"], record["parallel"].get("ep")
    model = {**record["model"], "layers": _LAYERS, "moe_layers": _LAYERS, "mtp_layers": 0}
    size = record["parallel"].get("mbs") or 1
    workload = {"phase": "train", "global_batch": count * size, "sequence": model["seq_len"]}
    scenario = scenario_of({**record, "model": model}, workload)
    precision = precision_of(record["parallel"]).model_copy(update={"dispatch": "fp8"})
    plan = Plan(
        dp=count, ep=ep, stages=(_LAYERS,), micro_batch=size, precision=precision, recompute="selective",
    )  # fmt: skip
    plan = plan.model_copy(update={"all_to_all": deduplicating(plan, scenario, record["parallel"])})
    check_plan(plan, scenario)
    case = Case(scenario=scenario, plan=plan)
    load = load_of(scenario, plan, rank_tokens=Tokens.of(plan, scenario.workload).rank)
    parts = Parts(
        model=scenario.model, plan=plan, workload=scenario.workload, load=load,
        gpus_per_node=scenario.cluster.gpus_per_node,
    )  # fmt: skip
    layer = scenario.model.layers[0]
    return Chunk(parts=parts, case=case, layer=layer, model=CostModel(gpu=scenario.cluster.gpu))


def _is_matrix(kernel: Kernel) -> bool:
    return kernel.kind in ("gemm", "grouped_gemm")


def _is_grouped(kernel: Kernel) -> bool:
    return kernel.kind == "grouped_gemm"


def _is_attention(kernel: Kernel) -> bool:
    return kernel.kind == "attention"


def _is_other(kernel: Kernel) -> bool:
    return kernel.kind == "elementwise"


def _cast_ms(chunk: Chunk, block: str, passes: Pass) -> float:
    """Operands of 8-bit products once through memory, 16 bits in and 8 out; elsewhere part of the sustained speed."""
    gpu, elements = chunk.model.gpu, 0.0
    for kernel in chunk.kernels(block, passes):
        if _is_matrix(kernel) and kernel.dtype == "fp8":
            elements += kernel.rows * kernel.depth * (1 if _is_grouped(kernel) else kernel.batch)
    return 1e3 * _LAYERS * 3 * elements / (gpu.memory_bandwidth_bytes_per_s * gpu.memory_efficiency)


def _computed(block: str, passes: Pass, chosen: Callable[[Kernel], bool] = lambda _: True) -> Callable[[Chunk], float]:
    return lambda chunk: chunk.milliseconds(block, passes, chosen)


def _both_gradients(chunk: Chunk) -> float:
    """Of a chunk run forward and backward: all that is computed."""
    return sum(chunk.milliseconds(block, each) for block in _COMPUTED for each in (_FORWARD, _INPUT, _WEIGHT))


def _exchanged(chunk: Chunk) -> float:
    """Dispatch and combine forward, and the same backward: combine carries gradients of what was dispatched."""
    return _LAYERS * 2 * (chunk.exchange_ms("dispatch") + chunk.exchange_ms("combine"))


def _span(chunk: Chunk) -> dict[str, float]:
    """Kernels run slower beside exchanges, which are there for most of the time."""
    busy, moved = _both_gradients(chunk), _exchanged(chunk)
    beside = min(busy, moved)
    compute = busy + beside * (1 / chunk.model.shares.compute - 1)
    span = max(compute, moved)
    return {
        "span_ms": span, "compute_busy_ms": compute, "comm_busy_ms": moved, "comm_payload_ms": moved,
        "any_busy_ms": span,
    }  # fmt: skip


def _sum(name: str, of: Callable[[Chunk], float]) -> Callable[[Chunk], dict[str, float]]:
    return lambda chunk: {name: of(chunk)}


def _four(kind: str) -> Callable[[Chunk], dict[str, float]]:
    return lambda chunk: {"kernel_sum_ms": _LAYERS * chunk.exchange_ms(kind)}


PHASES: Mapping[str, Callable[[Chunk], dict[str, float]]] = {
    "attn-f": _sum("kernel_sum_ms", _computed("attn", _FORWARD)),
    "attn-b": _sum("kernel_sum_ms", _computed("attn", _INPUT)),
    "attn-w": _sum("kernel_sum_ms", _computed("attn", _WEIGHT)),
    "mlp-f": _sum("kernel_sum_ms", _computed("mlp", _FORWARD)),
    "mlp-b": _sum("kernel_sum_ms", _computed("mlp", _INPUT)),
    "mlp-w-stream7": lambda chunk: {
        "kernel_sum_ms": chunk.milliseconds("mlp", _WEIGHT) - chunk.milliseconds("mlp", _WEIGHT, _is_grouped) / 2
    },
    "mlp-w-stream23": lambda chunk: {"kernel_sum_ms": chunk.milliseconds("mlp", _WEIGHT, _is_grouped) / 2},
    "dispatch-f": _four("dispatch"),
    "combine-f": _four("combine"),
    "dispatch-b": _four("combine"),
    "combine-b": _four("dispatch"),
    "ep-dispatch-kernel": lambda chunk: {"per_layer_ms": chunk.exchange_ms("dispatch")},
    "ep-dispatch-cached-kernel": lambda chunk: {"per_layer_ms": chunk.exchange_ms("dispatch")},
    "ep-combine-kernel": lambda chunk: {"samples_ms": chunk.exchange_ms("combine")},
    "ep-notify-total": lambda chunk: {"kernel_sum_ms": (overheads_of().late_ranks - 1) * _exchanged(chunk)},
    "attention-core": lambda chunk: {
        "fwd_ms": chunk.milliseconds("attn", _FORWARD, _is_attention),
        "bwd_ms": chunk.milliseconds("attn", _INPUT, _is_attention),
    },
    "gemm-fwd": lambda chunk: {
        f"{block}_f_ms": chunk.milliseconds(block, _FORWARD, _is_matrix) for block in _COMPUTED
    },
    "gemm-bwd": lambda chunk: {
        f"{block}_{sign}_ms": chunk.milliseconds(block, passes, _is_matrix)
        for block in _COMPUTED for sign, passes in (("b", _INPUT), ("w", _WEIGHT))
    },
    "quant-cast": lambda chunk: {
        "kernel_sum_ms": sum(_cast_ms(chunk, block, each) for block in _COMPUTED for each in _PASSES),
    },
    "elementwise-other": lambda chunk: {
        f"{block}_{sign}_ms": chunk.milliseconds(block, passes, _is_other)
        for block in _COMPUTED for sign, passes in (("f", _FORWARD), ("b", _INPUT))
    },
    "chunk-span": _span,
    "overlap": lambda chunk: {"comm_hidden_pct": 100.0 * min(1.0, _span(chunk)["compute_busy_ms"] / _exchanged(chunk))},
}  # fmt: skip
