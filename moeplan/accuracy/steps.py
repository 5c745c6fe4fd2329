"""The time of a case's step, from no more micro-batches than it takes to see the steady state, and what it is made of.

What a framework adds to kernels and exchanges is in an overhead set (`cost_models/overheads`), by mechanism:

    step = max(device, host) (1 + bubble) + gradients + sends
    device = kernels + scores of attention with sinks x passes
             + experts' exchanges x (overlapped ? exposed : late)
             + tensor exchanges x (overlapped ? exposed : 1)
    host = layers x micro-batches of the busiest GPU x host's time for one
    bubble = waiting for other stages, as a share of the rest, as simulated

A host that launches kernel by kernel takes the same for a layer whatever it does, so small layers wait for it.
Exchanges that run beside the passes of another micro-batch are hidden but for a share; those that do not are exposed,
and longer than alone as ranks come late. Tensor exchanges beside products are hidden but for their first part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeplan.accuracy.cases import Case
from moeplan.accuracy.overheads import Overheads
from moeplan.accuracy.reductions import all_reduce_s
from moeplan.compiler.compile_plan import compile_plan
from moeplan.compiler.works import work
from moeplan.cost.cost_model import CostModel
from moeplan.cost.measured import side
from moeplan.domain.causes import breakdown_s
from moeplan.domain.cluster import Gpu
from moeplan.domain.feed_forward import Experts
from moeplan.domain.mixers import Attention
from moeplan.domain.program import Kernel, Pass, Stream
from moeplan.domain.timeline import Timeline
from moeplan.simulator.simulate import simulate

_ROUNDS = 2
"""Times the pipeline is filled before a further filling takes as long as the one before."""
_WAITING = ("exposed_all_to_all", "tensor_traffic", "gradient_traffic", "pipeline_traffic", "pipeline_bubble")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A simulated step: its seconds by cause (`domain/causes.py`), and what its busiest GPU computes."""

    causes_s: Mapping[str, float]
    kernels: Mapping[Kernel, float]
    """How often that GPU runs each."""
    model_flops: float
    num_gpus: int
    num_tokens: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.causes_s.values())

    @property
    def device_s(self) -> float:
        """In which the busiest GPU computes."""
        return self.seconds - sum(self.causes_s[cause] for cause in _WAITING)


def step_of(case: Case) -> Step:
    """The simulated step, with what kernels do that are not fused, not divided or done again."""
    step = _filled(case)
    if case.recomputed < 1:
        kept = replace(case, plan=case.plan.model_copy(update={"recompute": "none"}))
        step = _further(_filled(kept), step, case.recomputed)
    more_s = _unfused_s(step, case) + _undivided_s(step, case) + _repeated_s(step, case)
    # All stages compute for as much longer, so waiting for them is longer as well.
    longer = 1 + more_s / (step.seconds - step.causes_s["pipeline_bubble"])
    causes_s = dict(step.causes_s)
    causes_s["pipeline_bubble"] *= longer
    causes_s["dense_compute"] += more_s
    if case.graphs == "all":
        causes_s["launch_overhead"] = 0.0
    if case.routes_freely:
        causes_s["expert_compute"] += _chosen_experts_s(case) - _seconds_of(step, case, _is_of_experts)
    if case.reduces_alone:
        causes_s |= {"exposed_all_to_all": 0.0, "tensor_traffic": _reductions_s(case)}
    return replace(step, causes_s=causes_s)


_EXPERTS = ("permute", "expert_up", "expert_activation", "expert_down", "unpermute")


def _is_of_experts(kernel: Kernel) -> bool:
    return kernel.name in _EXPERTS


def _chosen_experts_s(case: Case) -> float:
    """Of the experts of a GPU where T tokens choose k of E by chance, forward.

    E (1 - (1 - k / E)^T) of them are chosen at all; these are read, and share the tokens.
    """
    model, plan, found = case.scenario.model, case.plan, 0.0
    tokens = case.scenario.workload.step_tokens / plan.edp
    for layer in model.all_layers:
        experts = layer.feed_forward
        if isinstance(experts, Experts):
            held, share = experts.num_experts / plan.ep, experts.top_k / experts.num_experts
            hit = max(1, round(held * (1 - (1 - share) ** tokens)))
            rows = max(hit, round(tokens * share * held))
            each = tuple((at + 1) * rows // hit - at * rows // hit for at in range(hit))
            operators = experts.expert_operators(tokens_per_expert=each, etp=plan.etp)
            found += _cost_s(work("experts", operators, Pass.FORWARD, precision=plan.precision).kernels, case)
    return found


def _cost_s(kernels: Iterable[Kernel], case: Case) -> float:
    model = CostModel(gpu=case.scenario.cluster.gpu)
    return sum(model.kernel_s(kernel) for kernel in kernels)


def _reductions_s(case: Case) -> float:
    """Of two in each layer, of the hidden states of all tokens in 16 bits."""
    workload, model, plan = case.scenario.workload, case.scenario.model, case.plan
    size_bytes = 2.0 * workload.step_tokens / plan.dp * model.hidden_size
    return 2 * len(model.all_layers) * all_reduce_s(case.scenario.cluster, ranks=plan.tp, size_bytes=size_bytes)


def _filled(case: Case) -> Step:
    """The step by its first micro-batches.

    A pipeline that has been filled twice takes the same time for every further filling, and so does what is computed.
    So a step of many micro-batches is two shorter ones, and what the longer of them takes more, as often as needed.
    """
    plan, batch = case.plan, case.scenario.workload.global_batch
    each = plan.dp * plan.micro_batch
    count, pp = batch // each, plan.pp
    short, long = _ROUNDS * pp, (_ROUNDS + 1) * pp
    if count <= long + pp:
        return _simulated(case, batch)
    # As many as the step has beyond whole fillings belong to both, so that what is left are whole fillings.
    more = count % pp
    first, second = (_simulated(case, (size + more) * each) for size in (short, long))
    return _further(first, second, (count - more - short) / pp)


def _simulated(case: Case, batch: int) -> Step:
    workload = case.scenario.workload.model_copy(update={"global_batch": batch})
    scenario = replace(case.scenario, workload=workload)
    program = compile_plan(case.plan, scenario)
    timeline = simulate(program, CostModel(gpu=scenario.cluster.gpu))
    return Step(
        causes_s=breakdown_s(timeline), kernels=_kernels(timeline), model_flops=program.model_flops,
        num_gpus=program.num_gpus, num_tokens=program.step_tokens,
    )  # fmt: skip


def _kernels(timeline: Timeline) -> dict[Kernel, float]:
    program = timeline.program
    units = program.tasks.unit_T[timeline.tasks_of(timeline.busiest_lane, Stream.COMPUTE)]
    found: dict[Kernel, float] = {}
    for unit, count in zip(*np.unique(units, return_counts=True), strict=True):
        for kernel in program.works[unit].kernels:
            found[kernel] = found.get(kernel, 0.0) + float(count)
    return found


def _further(first: Step, second: Step, times: float) -> Step:
    """`first`, and `times` what `second` has more."""

    def on(a: float, b: float) -> float:
        return a + times * (b - a)

    names = first.kernels.keys() | second.kernels.keys()
    return Step(
        causes_s={cause: max(0.0, on(first.causes_s[cause], second.causes_s[cause])) for cause in first.causes_s},
        kernels={each: on(first.kernels.get(each, 0.0), second.kernels.get(each, 0.0)) for each in names},
        model_flops=on(first.model_flops, second.model_flops), num_gpus=first.num_gpus,
        num_tokens=round(on(first.num_tokens, second.num_tokens)),
    )  # fmt: skip


def believed_s(step: Step, case: Case, overheads: Overheads, *, gpu: Gpu | None = None) -> float:
    """Seconds of the step with what a framework adds; `gpu`: as if kernels ran on that one instead."""
    causes, device_s = step.causes_s, step.device_s
    if gpu is not None:
        device_s += _kernels_s(step, gpu) - _kernels_s(step, case.scenario.cluster.gpu)
    routed, tensor = causes["exposed_all_to_all"], causes["tensor_traffic"]
    bubble = causes["pipeline_bubble"] / (step.device_s + routed + tensor)
    device_s += routed * (overheads.exposed_routed if case.overlaps_passes else overheads.late_ranks)
    device_s += tensor * (overheads.exposed_tensor if case.overlaps_tensor else 1.0)
    device_s += overheads.score_passes * scores_s(case)
    rest = causes["gradient_traffic"] + causes["pipeline_traffic"]
    return max(device_s, _host_s(case, overheads)) * (1 + bubble) + rest


def scores_s(case: Case) -> float:
    """For the scores of all attention with sinks of a rank to pass through memory once, in 16 bits."""
    return _pass_s(case, lambda mixer: mixer.sinks) if case.fuses_attention and not case.fuses_sinks else 0.0


_FORWARD_PASSES, _BACKWARD_PASSES = 6.5, 9.5
"""Of scores in 16 bits through memory, where attention is products with a softmax between them: forward the product
writes them (1), softmax reads and writes them (2), so does dropout with a mask of a byte (2.5), a product reads them
(1); backward two products for the gradients of shares and values (2), dropout (2.5), softmax (3), and two products for
those of queries and keys (2).
Reference: Korthikanti et al., "Reducing activation recomputation" (MLSys 2023), figure 2 and section 4.
"""


def _unfused_s(step: Step, case: Case) -> float:
    """Scores through memory, and products of them that see pairs ahead of a query, too: twice those that count."""
    if case.fuses_attention:
        return 0.0
    runs = 1 if case.plan.recompute == "none" else 2
    scores_s = (runs * _FORWARD_PASSES + _BACKWARD_PASSES) * _pass_s(case, lambda _: True)
    return scores_s + _seconds_of(step, case, lambda kernel: kernel.kind == "attention")


_FRAME = ("norm", "residual")


def _undivided_s(step: Step, case: Case) -> float:
    """Norms and residuals of the tokens of other tensor-parallel ranks."""
    if case.divides_norms:
        return 0.0
    return (case.plan.tp - 1) * _seconds_of(step, case, lambda kernel: kernel.name.removesuffix("_grad") in _FRAME)


def _repeated_s(step: Step, case: Case) -> float:
    """Every other product of the forward pass, where products are chosen one by one.

    Reference: pytorch/torchtitan, parallelize_llama.py, 2024: of an operator's kinds all results are kept, but of
    matrix products every second.
    """
    if not case.recomputes_products:
        return 0.0
    return _seconds_of(step, case, lambda kernel: kernel.kind == "gemm" and not side(kernel)) / 2


def _seconds_of(step: Step, case: Case, is_wanted: Callable[[Kernel], bool]) -> float:
    model = CostModel(gpu=case.scenario.cluster.gpu)
    return sum(count * model.kernel_s(kernel) for kernel, count in step.kernels.items() if is_wanted(kernel))


def _pass_s(case: Case, is_wanted: Callable[[Attention], bool]) -> float:
    workload, plan, gpu = case.scenario.workload, case.plan, case.scenario.cluster.gpu
    if not workload.is_training:
        return 0.0
    mixers = [layer.mixer for layer in case.scenario.model.all_layers]
    heads = sum(each.num_heads for each in mixers if isinstance(each, Attention) and is_wanted(each))
    times = plan.num_microbatches(workload.global_batch) * plan.micro_batch / (plan.pp * plan.tp * plan.cp)
    return heads * times * workload.sequence**2 * 2 / (gpu.memory_bandwidth_bytes_per_s * gpu.memory_efficiency)


def _kernels_s(step: Step, gpu: Gpu) -> float:
    model = CostModel(gpu=gpu)
    return sum(count * model.kernel_s(kernel) for kernel, count in step.kernels.items())


def _host_s(case: Case, overheads: Overheads) -> float:
    """Of the host of one rank, for all passes of all its layers."""
    dense, routed = host_rounds(case)
    routed_s = {
        "all": 0.0, "some": overheads.host_routed_graphs_s, "none": overheads.host_routed_s,
        "unknown": overheads.host_routed_old_s,
    }[case.graphs]  # fmt: skip
    return dense * overheads.host_dense_s + routed * routed_s


_AGAIN = 1.5
"""Times that a host takes where layers are run forward once more: a third pass beside two."""


def host_rounds(case: Case) -> tuple[float, float]:
    """Layers without and with experts that a host launches kernel by kernel in a step, forward and backward."""
    if case.graphs == "all" or not case.scenario.workload.is_training:
        return 0.0, 0.0
    times = case.plan.num_microbatches(case.scenario.workload.global_batch) / case.plan.pp
    times *= _AGAIN if case.plan.recompute == "full" else 1.0
    layers, moe = len(case.scenario.model.all_layers), len(case.scenario.model.moe_layers)
    return times * (layers - moe), times * moe
