"""The weights of a virtual stage on one rank, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeplan.domain.model import Layer, Model
from moeplan.domain.plan import Plan
from moeplan.partition.slots import slots_per_place
from moeplan.partition.stages import VirtualStage

_ENDS = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights of one layer, or of the ends of the model (layer -1), on one rank: dense ones, and those of its
    experts.
    """

    layer: int
    dense: int
    expert: int
    replicated: int
    """Of the dense ones, those that each tensor-parallel rank holds whole."""

    def count(self, *, expert: bool) -> int:
        """Of one of the two kinds."""
        return self.expert if expert else self.dense


def weights_of(stage: VirtualStage, model: Model, plan: Plan) -> Iterable[Weights]:
    """The weights of each layer of a virtual stage, then of the model's ends if it has one."""
    for offset, layer in enumerate(stage.layers):
        yield Weights(
            layer=stage.first_layer + offset,
            dense=layer.dense_parameters_per_rank(plan.tp),
            expert=_expert_weights(layer, plan),
            replicated=layer.replicated_parameters,
        )
    dense = replicated = 0
    if stage.has_embedding or (stage.has_head and model.tied_embeddings):
        dense += model.embedding_parameters_per_rank(plan.tp)
        replicated += model.embedding_replicated_parameters
    if stage.has_head:
        dense += model.head_parameters_per_rank(plan.tp)
        replicated += model.head_replicated_parameters
    joint = 2 * model.hidden_size**2
    dense += sum(joint + layer.dense_parameters_per_rank(plan.tp) for layer in stage.prediction)
    replicated += sum(joint + layer.replicated_parameters for layer in stage.prediction)
    expert = sum(_expert_weights(layer, plan) for layer in stage.prediction)
    if dense or expert:
        yield Weights(layer=_ENDS, dense=dense, expert=expert, replicated=replicated)


def _expert_weights(layer: Layer, plan: Plan) -> int:
    if layer.experts is None:
        return 0
    return slots_per_place(layer.experts.num_experts, plan) * layer.experts.expert_parameters_per_rank(plan.etp)


def zero_stages(plan: Plan, *, at_least: int) -> list[bool]:
    """Which of the two kinds of weights, dense (False) and expert (True), are sharded to that ZeRO stage."""
    return [expert for expert, zero in ((False, plan.zero_dense), (True, plan.zero_expert)) if zero >= at_least]
