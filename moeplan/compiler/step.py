"""What is done once a step: weights in before the first forward pass, gradients out behind the last backward pass,
optimizer.

With `overlap_gradients` the weights of a layer come while layers before it compute, and gradients leave while layers
before it are still in their backward pass; without, the gradients wait for the end of the passes, and the weights
come last. ZeRO 0: all-reduce. ZeRO 1: reduce-scatter, and gather of what the optimizer wrote. ZeRO 2: only the gather
is left to do here. ZeRO 3: neither. With two holders of each virtual stage (DualPipe) all goes in the order of the
virtual stages, since the two holders meet their chunks in opposite orders.

Where a placement has an expert on several places of a group, the gradients of these replicas are summed once a step,
behind the reduction over groups. All of them make the same update then, so no weights have to be exchanged for it.
Of weights that each tensor rank holds whole it has the gradients of its own tokens or heads: these are summed last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moeplan.compiler.blocks import NO_LAYER, Block
from moeplan.compiler.passes import PartBlocks
from moeplan.domain.feed_forward import Experts
from moeplan.domain.program import Pass, Stream
from moeplan.partition.stages import VirtualStage
from moeplan.partition.weights import Weights, weights_of


@dataclass
class StepBlock:
    """Steps with, for each, the layers of chunks whose passes it waits for or holds up."""

    block: Block = field(default_factory=lambda: Block(passes=Pass.STEP))
    for_layer: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Step -> (chunk, layer)."""


def opening(blocks: PartBlocks, chunks: list[int]) -> StepBlock:
    """Gathers of weights, chunk by chunk in the order of their first use; empty unless they overlap the forward
    pass.
    """
    found = StepBlock()
    if blocks.writer.parts.plan.overlap_gradients:
        _gather(found, blocks, chunks)
    return found


def closing(blocks: PartBlocks, chunks: list[int]) -> StepBlock:
    """Reductions, chunk by chunk in the order of their last use, the sum over tensor ranks behind all of them, and the
    optimizer.
    """
    parts, found, replicated = blocks.writer.parts, StepBlock(), 0
    for chunk in chunks:
        stage = blocks.stage_of(chunk)
        for weights in _as_ready(stage, list(weights_of(stage, parts.model, parts.plan))):
            replicated += weights.replicated
            for expert, zero in ((False, parts.plan.zero_dense), (True, parts.plan.zero_expert)):
                operation = {0: "all_reduce", 1: "reduce_scatter"}.get(zero)
                if operation:
                    _add(found, chunk, weights, parts.sharding(stage, weights, expert=expert, operation=operation))
            for experts, moe in _experts_of(stage, weights.layer, blocks.prediction_moe):
                _add(found, chunk, weights, parts.same_experts(blocks.writer.stage, stage.holders, experts, moe=moe))
    found.block.at_layer = NO_LAYER
    found.block.add(
        Stream.TENSOR, parts.tensor_gradients(blocks.writer.stage, replicated), list(range(len(found.block.unit)))
    )
    update = found.block.add(
        Stream.COMPUTE, parts.optimizer(optimizer_share(blocks)), list(range(len(found.block.unit)))
    )
    if not parts.plan.overlap_gradients:
        start = len(found.block.unit)
        _gather(found, blocks, chunks)
        for step in range(start, len(found.block.unit)):
            found.for_layer.pop(step, None)
            found.block.before.append(update[0])
            found.block.after.append(step)
    return found


def _as_ready(stage: VirtualStage, weights: list[Weights]) -> list[Weights]:
    """In the order in which the backward pass ends with them: the head first, the embedding last."""
    ends = [each for each in weights if each.layer == NO_LAYER]
    layers = [each for each in reversed(weights) if each.layer != NO_LAYER]
    return layers + ends if stage.has_embedding else ends + layers


def _experts_of(stage: VirtualStage, layer: int, prediction_moe: int) -> Iterator[tuple[Experts, int]]:
    """The experts of a layer, or of all that predict further tokens, each with its number among layers with experts."""
    if layer == NO_LAYER:
        found = [(each, prediction_moe) for each in stage.prediction]
    else:
        found = [(stage.layers[layer - stage.first_layer], stage.moe[layer - stage.first_layer])]
    yield from ((each.experts, moe) for each, moe in found if each.experts)


def optimizer_share(blocks: PartBlocks) -> float:
    """Weights that this rank updates: all it holds, divided by their replicas where optimizer state is sharded."""
    parts, total = blocks.writer.parts, 0.0
    for chunk in range(parts.plan.vpp):
        stage = blocks.stage_of(chunk)
        for expert, zero in ((False, parts.plan.zero_dense), (True, parts.plan.zero_expert)):
            held = sum(weights.count(expert=expert) for weights in weights_of(stage, parts.model, parts.plan))
            total += held / parts.replicas(stage.holders, expert=expert) if zero else held
    return total


def _gather(found: StepBlock, blocks: PartBlocks, chunks: list[int]) -> None:
    parts = blocks.writer.parts
    for chunk in chunks:
        stage = blocks.stage_of(chunk)
        for weights in sorted(weights_of(stage, parts.model, parts.plan), key=lambda each: each.layer):
            for expert, zero in ((False, parts.plan.zero_dense), (True, parts.plan.zero_expert)):
                if zero in (1, 2):
                    _add(found, chunk, weights, parts.sharding(stage, weights, expert=expert, operation="all_gather"))


def _add(found: StepBlock, chunk: int, weights: Weights, unit: int | None) -> None:
    found.block.at_layer = weights.layer
    for step in found.block.add(Stream.SHARD, unit, []):
        found.for_layer[step] = (chunk, weights.layer)
