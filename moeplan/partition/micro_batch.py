"""Bytes of one micro-batch, layer by layer: what a forward pass leaves behind, and what is there for a moment.

Axes: R row of bytes (the embedding, each layer, the head with what predicts further tokens), M layer with experts,
G place in the expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from moeplan.cost import memory
from moeplan.domain.feed_forward import DenseFeedForward, Experts
from moeplan.domain.model import Layer
from moeplan.domain.operators import Operator
from moeplan.domain.plan import DTYPE_BYTES, Plan
from moeplan.domain.program import Floats
from moeplan.domain.scenario import Scenario
from moeplan.partition.route import Load, Tokens, load_of
from moeplan.partition.stages import pipeline

TOKENS = ("tp", "cp", "ep", "etp", "micro_batch", "precision", "capacity", "placement")
"""The fields of a plan that one micro-batch depends on."""


@dataclass(frozen=True)
class Asked:
    """A plan in a scenario, the same as another one if they agree in `what`: the key of a cache."""

    what: tuple[object, ...]
    plan: Plan = field(compare=False)
    scenario: Scenario = field(compare=False)
    evened: bool = False
    """Every place gets what the places of its group get on average."""

    def only(self, *names: str) -> Asked:
        """The same, if these fields of the plan are all that counts."""
        return asked_of(self.plan, self.scenario, *names, evened=self.evened)


def asked_of(plan: Plan, scenario: Scenario, *names: str, evened: bool = False) -> Asked:
    """The key of what depends on these fields of the plan, in this very scenario."""
    return Asked((id(scenario), *(getattr(plan, name) for name in names)), plan, scenario, evened)


@dataclass(frozen=True, kw_only=True, slots=True)
class _LayerBytes:
    """Of one micro-batch in one layer; pairs: what it costs anyhow, and for each token that the rank's experts get."""

    inputs: float
    kept: tuple[float, float]
    dropped: tuple[float, float]
    weight_input: tuple[float, float]
    work: tuple[float, float]
    gather: tuple[float, float]
    width: int
    """Elements of a token on its way to an expert; 0 where nothing is exchanged."""
    cache: float
    """Of one sequence."""


def _layer_bytes(layer: Layer, plan: Plan, scenario: Scenario) -> _LayerBytes:
    tokens, precision, experts = Tokens.of(plan, scenario.workload), plan.precision, layer.experts
    element = DTYPE_BYTES[precision.activations]
    fixed = tuple(_fixed_operators(layer, tokens, plan))
    each = experts.expert_operators(tokens_per_expert=(1,), etp=plan.etp) if experts else ()
    kept, per_token = (memory.kept_bytes(found, precision) for found in (fixed, each))
    saved = _narrow_bytes(experts, plan) if experts else 0.0
    width = experts.expert_input if experts else 0
    return _LayerBytes(
        inputs=tokens.rank * layer.hidden_size * max(1, layer.hyper_streams) * element,
        kept=(kept.whole, per_token.whole - saved),
        dropped=(kept.dropped, per_token.dropped),
        weight_input=(
            memory.weight_input_bytes(fixed, precision)[0],
            memory.weight_input_bytes(each, precision)[0] - saved,
        ),
        work=(memory.work_bytes(fixed, precision), memory.work_bytes(each, precision)),
        gather=(
            _gathered_elements(layer, tokens, plan, scenario) * element,
            width * element if plan.etp > 1 else 0.0,
        ),
        width=width if plan.ep > 1 else 0,
        cache=0.0 if scenario.workload.is_training else _cache_bytes(layer, plan, scenario),
    )


def _narrow_bytes(experts: Experts, plan: Plan) -> float:
    """What is saved for a received token that is kept in the format it came in, where that is the narrower one."""
    came, usual = DTYPE_BYTES[plan.precision.dispatch], plan.precision.kept_bytes
    return experts.expert_input * max(0.0, usual - came) if plan.ep > 1 else 0.0


def _fixed_operators(layer: Layer, tokens: Tokens, plan: Plan) -> Iterator[Operator]:
    """The forward kernels of a layer on one rank, without its routed experts."""
    hyper = layer.hyper_operators(tokens=tokens.group, tp=plan.tp)
    for block in layer.blocks:
        yield from block.operators(
            tokens=tokens.group, sequence=tokens.sequence, context=tokens.context, tp=plan.tp, cp=plan.cp
        )
    yield from hyper if layer.blocks else ()
    if isinstance(layer.feed_forward, DenseFeedForward):
        yield from (*hyper, *layer.feed_forward.operators(tokens=tokens.group, tp=plan.tp))
    elif isinstance(layer.feed_forward, Experts):
        experts = layer.feed_forward
        yield from (*hyper, *experts.router_operators(tokens=tokens.group, tp=plan.tp))
        yield from experts.shared_operators(tokens=tokens.group, tp=plan.tp)
        yield from experts.combine_operators(tokens=tokens.group, tp=plan.tp)


def _gathered_elements(layer: Layer, tokens: Tokens, plan: Plan, scenario: Scenario) -> int:
    """Hidden states of all tensor-parallel ranks, and keys and values of all context-parallel ones."""
    tensor = tokens.group * layer.hidden_size if plan.tp > 1 else 0
    if plan.cp == 1 or scenario.workload.phase == "decode":
        return tensor
    return tensor + tokens.batch * sum(block.cache_elements_per_token(plan.tp) for block in layer.blocks)


def _cache_bytes(layer: Layer, plan: Plan, scenario: Scenario) -> float:
    """Cache of one sequence in one layer."""
    return sum(
        memory.cache_bytes(
            block.cache_elements(context=scenario.workload.sequence, tp=plan.tp),
            state_elements=block.cache_elements_per_sequence(plan.tp),
            cp=plan.cp, precision=plan.precision,
        )
        for block in layer.blocks
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Bytes of one micro-batch by row and place; `sent_RG` and `received_RG` are elements."""

    inputs_RG: Floats
    kept_RG: Floats
    dropped_RG: Floats
    weight_input_RG: Floats
    work_RG: Floats
    gather_RG: Floats
    sent_RG: Floats
    received_RG: Floats
    cache_R: Floats
    """Of one sequence."""
    logits: float
    """Scores that the head keeps from F to B or I."""
    weight_logits: float
    """Their gradients, which it keeps from I to W."""


@lru_cache(maxsize=256)
def rows_of(asked: Asked) -> Rows:
    """The bytes of one micro-batch; only `TOKENS` of the plan count."""
    plan, scenario = asked.plan, asked.scenario
    layers = (*scenario.model.all_layers, *_prediction(asked))
    load = load_of(scenario, plan, rank_tokens=Tokens.of(plan, scenario.workload).rank)
    received_RG, sent_RG = _routed_tokens(layers, load)
    if asked.evened:
        received_RG, sent_RG = (each.mean(axis=1, keepdims=True) for each in (received_RG, sent_RG))
    by_layer = {id(layer): _layer_bytes(layer, plan, scenario) for layer in _distinct(layers)}
    table = [by_layer[id(layer)] for layer in layers]

    def column(name: str, combine: Callable[[Floats, Floats], Floats] = np.add) -> Floats:
        pair_R2 = np.array([getattr(each, name) for each in table], np.float64)
        found: Floats = combine(pair_R2[:, :1], pair_R2[:, 1:] * received_RG)
        return found

    width_R1 = np.array([[each.width] for each in table], np.float64)
    return _with_ends(
        asked, inputs=np.array([[each.inputs] for each in table]) + 0.0 * received_RG,
        kept=column("kept"), dropped=column("dropped"), weight_input=column("weight_input"),
        work=column("work", np.maximum), gather=column("gather"), sent=width_R1 * sent_RG / plan.etp,
        received=width_R1 * received_RG / plan.etp, cache=np.array([each.cache for each in table]),
    )  # fmt: skip


def _prediction(asked: Asked) -> tuple[Layer, ...]:
    return pipeline(asked.scenario.model, asked.plan, asked.scenario.workload).stages[-1].prediction


def _distinct(layers: tuple[Layer, ...]) -> Iterable[Layer]:
    """Each object once: equal layers of a model are one object, and comparing them is slow."""
    return {id(layer): layer for layer in layers}.values()


def _routed_tokens(layers: tuple[Layer, ...], load: Load | None) -> tuple[Floats, Floats]:
    """Tokens that the experts of each place get and that each place sends, by layer; alike places count once.

    Layers of multi-token prediction are routed like the model's last layer with experts.
    """
    if load is None:
        return np.zeros((len(layers), 1)), np.zeros((len(layers), 1))
    tables = load.tokens_SE_by_layer
    got_MG = np.array([np.rint(t.sum(axis=0)).reshape(load.num_places, -1).sum(axis=1) for t in tables])
    sent_MG = np.array([t.sum(axis=1) for t in tables])
    if load.is_even:
        got_MG, sent_MG = got_MG[:, :1], sent_MG[:, :1]
    moe = np.minimum(np.cumsum([layer.is_moe for layer in layers]) - 1, len(tables) - 1)
    is_moe = np.array([[layer.is_moe] for layer in layers])
    return np.where(is_moe, got_MG[moe], 0.0), np.where(is_moe, sent_MG[moe], 0.0)


def _with_ends(asked: Asked, *, cache: Floats, **layers: Floats) -> Rows:
    """Rows of the layers between those of the ends; layers of multi-token prediction stand in the head's row."""
    ends, num_layers = _Ends.of(asked), len(asked.scenario.model.all_layers)
    rows: dict[str, Floats] = {}
    for name, values_RG in layers.items():
        own, more = values_RG[:num_layers], values_RG[num_layers:]
        summed = name in ("inputs", "kept", "dropped", "weight_input")
        fold = (np.add if summed else np.maximum).reduce(more, axis=0, initial=0.0)
        first, last = getattr(ends, name) if summed else (0.0, 0.0)
        rows[f"{name}_RG"] = np.vstack([np.full_like(fold, first), own, fold + last])
    cache_R = np.concatenate([[0.0], cache[:num_layers], [0.0]])
    return Rows(**rows, cache_R=cache_R, logits=ends.logits, weight_logits=ends.weight_logits)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ends:
    """Bytes of one micro-batch at embedding and head, without scores; `inputs` is what full recomputation keeps."""

    inputs: tuple[float, float]
    kept: tuple[float, float]
    dropped: tuple[float, float]
    weight_input: tuple[float, float]
    logits: float
    weight_logits: float

    @staticmethod
    def of(asked: Asked) -> _Ends:
        """The embedding's output is the first layer's input, kept there; the last layer's is kept by the head.

        A module of multi-token prediction looks up one more embedding, and has a head of its own.
        """
        plan, model, workload = asked.plan, asked.scenario.model, asked.scenario.workload
        tokens, precision = Tokens.of(plan, workload), plan.precision
        hidden = tokens.rank * model.hidden_size * DTYPE_BYTES[precision.activations]
        modules = len(_prediction(asked))
        first = memory.kept_bytes(model.embedding_operators(tokens=tokens.group, tp=plan.tp), precision)
        scored = tokens.group if workload.is_training else plan.micro_batch
        head = model.head_operators(tokens=scored, tp=plan.tp, training=workload.is_training) * (1 + modules)
        if model.mtp and modules:
            head += model.mtp.operators(tokens=tokens.group, hidden_size=model.hidden_size, tp=plan.tp) * modules
        last, waits = memory.kept_bytes(head, precision), memory.weight_input_bytes(head, precision)
        scores = 1.0 * scored * -(-model.vocab_size // plan.tp) * memory.ACCUMULATOR_BYTES if model.head else 0.0
        kept = (first.whole - hidden, last.whole - last.accumulators + hidden)
        return _Ends(
            inputs=(kept[0] - first.dropped, kept[1] - last.dropped), kept=kept, dropped=(first.dropped, last.dropped),
            weight_input=(0.0, waits[0] - waits[1]), weight_logits=waits[1],
            logits=last.accumulators if workload.is_training else scores,
        )  # fmt: skip
