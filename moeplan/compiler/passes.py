"""The passes of one micro-batch through each chunk of a part, with the sends at their ends.

ZeRO 2 reduces the gradients of each layer behind every backward pass; ZeRO 3 also gathers the weights of a layer
before every pass, a layer ahead. What is done once a step stands in `step.py`. Reference: Rajbhandari et al., "ZeRO"
(SC 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from moeplan.compiler.blocks import ENTRY, NO_LAYER, Block, Writer
from moeplan.domain.program import Pass, Stream
from moeplan.partition.stages import Pipeline, VirtualStage
from moeplan.partition.weights import Weights, weights_of, zero_stages

PASS = {"F": Pass.FORWARD, "B": Pass.BACKWARD, "I": Pass.INPUT_GRADIENT, "W": Pass.WEIGHT_GRADIENT}


@dataclass
class PartBlocks:
    """Builds the blocks of one part on demand; equal ones once."""

    writer: Writer
    pipeline: Pipeline
    _blocks: dict[tuple[str, int], Block] = field(default_factory=dict)

    def block(self, kind: str, chunk: int) -> Block:
        """The pass `kind` (F, B, I or W) of `chunk`."""
        if (kind, chunk) not in self._blocks:
            block = Block(passes=PASS[kind])
            build = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._weights}[kind]
            build(block, self.stage_of(chunk))
            self._blocks[kind, chunk] = block
        return self._blocks[kind, chunk]

    def stage_of(self, chunk: int) -> VirtualStage:
        """The virtual stage that this pipeline rank holds as `chunk`."""
        return self.pipeline.stages[self.pipeline.virtual[self.writer.stage][chunk]]

    # ---- forward

    def _forward(self, block: Block, stage: VirtualStage) -> None:
        parts, weights = self.writer.parts, self._weights_by_layer(stage)
        waits = [ENTRY, *self._gathered(block, stage, weights, NO_LAYER)]
        if stage.has_embedding:
            waits = self.writer.embedding(block, Pass.FORWARD, waits)
            self._opens(block, 0)
        waits = self._layers_forward(block, stage, weights, waits)
        for layer in stage.prediction:
            waits = block.add(Stream.COMPUTE, parts.prediction(Pass.FORWARD), waits)
            waits = self.writer.forward(block, layer, waits, moe=self.prediction_moe)
            waits = self.writer.head(block, waits)
        if stage.has_head:
            start = len(block.stream)
            waits = self.writer.head(block, waits)
            self._opens(block, start)
        block.last = self._sent(block, stage.number, 1, waits)

    def _layers_forward(
        self, block: Block, stage: VirtualStage, weights: dict[int, Weights], waits: list[int]
    ) -> list[int]:
        for offset, gathered in self._layers(block, stage, weights, range(len(stage.layers))):
            start = len(block.stream)
            waits = self.writer.forward(block, stage.layers[offset], [*waits, *gathered], moe=stage.moe[offset])
            self._opens(block, start)
        return waits

    def _layers(
        self, block: Block, stage: VirtualStage, weights: dict[int, Weights], order: Iterable[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Each layer, and the gathers that it waits for: of its weights, which were begun before the layer before it.

        A gather waits until the layer two before has been computed, so the weights of two layers are there at a time.
        """
        offsets, behind = list(order), list[int]()
        ahead = self._gathered(block, stage, weights, stage.first_layer + offsets[0], behind) if offsets else []
        for place, offset in enumerate(offsets):
            gathered, ahead = ahead, []
            if place + 1 < len(offsets):
                ahead = self._gathered(block, stage, weights, stage.first_layer + offsets[place + 1], behind)
            block.at_layer = stage.first_layer + offset
            start = len(block.stream)
            yield offset, gathered
            behind = block.computing(start)
        block.at_layer = NO_LAYER

    @staticmethod
    def _opens(block: Block, start: int) -> None:
        """Marks what computes from step `start` on as what needs the weights of the layer at hand."""
        block.opening.setdefault(block.at_layer, []).extend(block.computing(start))

    @property
    def prediction_moe(self) -> int:
        """Layers of multi-token prediction are routed like the model's last layer with experts."""
        return max(0, sum(layer.is_moe for layer in self.writer.parts.model.all_layers) - 1)

    # ---- backward

    def _backward(self, block: Block, stage: VirtualStage) -> None:
        parts, weights = self.writer.parts, self._weights_by_layer(stage)
        waits = [ENTRY, *self._gathered(block, stage, weights, NO_LAYER)]
        start = len(block.stream)
        if stage.has_head:
            waits = self.writer.head(block, waits)
        for layer in stage.prediction[::-1]:
            waits = self.writer.head(block, waits)
            waits = self.writer.backward(block, layer, waits, moe=self.prediction_moe)
            waits = block.add(Stream.COMPUTE, parts.prediction(block.passes), waits)
        ends = block.computing(start)
        waits = self._layers_backward(block, stage, weights, waits)
        if stage.has_embedding and block.passes == Pass.BACKWARD:
            waits = self.writer.embedding(block, block.passes, waits)
            ends += waits
        block.gradients[NO_LAYER] = ends
        self._reduced(block, stage, weights, NO_LAYER)
        block.last = self._sent(block, stage.number, -1, waits)

    def _layers_backward(
        self, block: Block, stage: VirtualStage, weights: dict[int, Weights], waits: list[int]
    ) -> list[int]:
        for offset, gathered in self._layers(block, stage, weights, reversed(range(len(stage.layers)))):
            waits = self.writer.backward(block, stage.layers[offset], [*waits, *gathered], moe=stage.moe[offset])
            self._reduced(block, stage, weights, block.at_layer)
        return waits

    def _weights(self, block: Block, stage: VirtualStage) -> None:
        """Gradients of the weights alone, in the order of the backward pass."""
        weights = self._weights_by_layer(stage)
        block.gradients[NO_LAYER] = self._end_weights(block, stage)
        self._reduced(block, stage, weights, NO_LAYER)
        for offset in reversed(range(len(stage.layers))):
            block.at_layer = stage.first_layer + offset
            self.writer.weights(block, stage.layers[offset], moe=stage.moe[offset])
            self._reduced(block, stage, weights, block.at_layer)
        block.at_layer = NO_LAYER
        block.last = list(range(len(block.stream)))

    def _end_weights(self, block: Block, stage: VirtualStage) -> list[int]:
        parts, which = self.writer.parts, Pass.WEIGHT_GRADIENT
        steps: list[int] = []
        for _ in range((len(stage.prediction) + 1) if stage.has_head else 0):
            steps += block.add(Stream.COMPUTE, parts.head(which), [ENTRY])
        for layer in stage.prediction:
            steps += block.add(Stream.COMPUTE, parts.prediction(which), [ENTRY])
            self.writer.weights(block, layer, moe=self.prediction_moe)
            steps += block.gradients[NO_LAYER]
        if stage.has_embedding:
            # All of its backward pass: nobody waits for the gradient of what goes into the model.
            block.behind_inputs = [len(block.stream)]
            steps += self.writer.embedding(block, Pass.BACKWARD, [])
        return steps

    # ---- sends

    def _sent(self, block: Block, number: int, step: int, waits: list[int]) -> list[int]:
        """A send to the next or previous virtual stage, where another pipeline rank holds it."""
        target = number + step
        if not 0 <= target < len(self.pipeline.stages):
            return waits
        rank = self.pipeline.neighbour(self.writer.stage, number, target)
        if rank == self.writer.stage:
            return waits
        return block.add(Stream.PIPELINE, self.writer.parts.send(self.writer.stage, rank), waits)

    # ---- ZeRO 2 and 3

    def _weights_by_layer(self, stage: VirtualStage) -> dict[int, Weights]:
        if not self.writer.parts.workload.is_training:
            return {}
        return {
            weights.layer: weights for weights in weights_of(stage, self.writer.parts.model, self.writer.parts.plan)
        }

    def _gathered(
        self, block: Block, stage: VirtualStage, weights: dict[int, Weights], layer: int, behind: Sequence[int] = ()
    ) -> list[int]:
        """The steps that gather the weights of a layer under ZeRO 3, behind the given ones."""
        steps: list[int] = []
        block.at_layer = layer
        for expert in zero_stages(self.writer.parts.plan, at_least=3) if layer in weights else ():
            unit = self.writer.parts.sharding(stage, weights[layer], expert=expert, operation="all_gather")
            steps += block.add(Stream.SHARD, unit, behind) if unit is not None else []
        return steps

    def _reduced(self, block: Block, stage: VirtualStage, weights: dict[int, Weights], layer: int) -> None:
        """Steps that reduce the gradients of a layer, if this pass completes them."""
        if block.passes == Pass.INPUT_GRADIENT or layer not in weights:
            return
        for expert in zero_stages(self.writer.parts.plan, at_least=2):
            unit = self.writer.parts.sharding(stage, weights[layer], expert=expert, operation="reduce_scatter")
            block.add(Stream.SHARD, unit, block.gradients.get(layer, []))
