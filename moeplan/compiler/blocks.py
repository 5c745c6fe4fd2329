"""One pass of one micro-batch through the layers of one chunk, as a list of steps that wait for earlier steps.

The order of the list is the order of every stream; a step runs when the step before it on its stream and the steps it
waits for have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from moeplan.compiler.parts import Parts, Place
from moeplan.domain.feed_forward import DenseFeedForward, Experts
from moeplan.domain.model import Layer
from moeplan.domain.program import Pass, Stream

NO_LAYER = -1
ENTRY = -1
"""Among the steps that a step waits for: what comes before the block."""


@dataclass
class Block:
    """Steps by column. `entry` are the steps that wait for what comes before the block, `last` what follows it waits
    for.
    """

    passes: Pass
    stream: list[int] = field(default_factory=list)
    unit: list[int] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    entry: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    behind_inputs: list[int] = field(default_factory=list)
    """Steps of a pass of weight gradients that wait for the end of the pass of input gradients before it."""
    gradients: dict[int, list[int]] = field(default_factory=dict)
    """Layer -> the steps after which its weight gradients are complete."""
    opening: dict[int, list[int]] = field(default_factory=dict)
    """Layer -> the steps that need its weights first."""
    at_layer: int = NO_LAYER

    def add(self, stream: Stream, unit: int | None, waits: Sequence[int]) -> list[int]:
        """A step behind `waits`, as the new waits. No unit: nothing to do, the waits stay."""
        if unit is None:
            return list(waits)
        step = len(self.stream)
        self.stream.append(stream)
        self.unit.append(unit)
        self.layer.append(self.at_layer)
        for wait in waits:
            if wait == ENTRY:
                self.entry.append(step)
            else:
                self.before.append(wait)
                self.after.append(step)
        return [step]

    def computing(self, start: int) -> list[int]:
        """The steps from `start` on that compute."""
        return [step for step in range(start, len(self.stream)) if self.stream[step] == Stream.COMPUTE]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes the passes of one part: a stage, and a place in the expert-parallel group."""

    parts: Parts
    stage: int
    place: Place

    # ---- the ends of the model

    def embedding(self, block: Block, passes: Pass, waits: list[int]) -> list[int]:
        """Each tensor rank has some of the words: their rows are scattered as sums, and gathered on the way back."""
        unit, is_split = self.parts.embedding(passes), self.parts.model.patches is None
        if passes == Pass.FORWARD:
            waits = block.add(Stream.COMPUTE, unit, waits)
            return self._tensor(block, "reduce_scatter", waits) if is_split else waits
        waits = self._tensor(block, "all_gather", waits) if is_split else waits
        return block.add(Stream.COMPUTE, unit, waits)

    def head(self, block: Block, waits: list[int]) -> list[int]:
        """Each tensor rank scores some of the words, for the tokens of all."""
        unit = self.parts.head(block.passes)
        if not self.parts.model.head:
            return block.add(Stream.COMPUTE, unit, waits)
        if block.passes != Pass.FORWARD:
            waits = block.add(Stream.COMPUTE, unit, waits)
            return self._tensor(block, "reduce_scatter", waits)
        waits = block.add(Stream.COMPUTE, unit, self._tensor(block, "all_gather", waits))
        return waits if self.parts.plan.tp == 1 else block.add(Stream.TENSOR, self.parts.scores(self.stage), waits)

    # ---- forward

    def forward(self, block: Block, layer: Layer, waits: list[int], *, moe: int) -> list[int]:
        """One layer: mixer, then dense block or experts."""
        waits = self._mixer_forward(block, layer, waits)
        if isinstance(layer.feed_forward, Experts):
            return self._experts_forward(block, layer, waits, moe=moe)
        if isinstance(layer.feed_forward, DenseFeedForward):
            return self._between(block, self.parts.dense(layer, Pass.FORWARD), waits)
        return waits

    def _mixer_forward(self, block: Block, layer: Layer, waits: list[int]) -> list[int]:
        if not layer.blocks:
            return waits
        waits = self._tensor(block, "all_gather", waits)
        waits = block.add(Stream.TENSOR, self.parts.context(self.stage, layer, "all_gather"), waits)
        waits = block.add(Stream.COMPUTE, self.parts.mixer(layer, Pass.FORWARD, routed=self._routed(layer)), waits)
        return self._tensor(block, "reduce_scatter", waits)

    def _routed(self, layer: Layer) -> bool:
        """Whether the router runs together with the mixer."""
        return layer.is_moe and bool(layer.blocks) and self.parts.plan.tp == 1

    def _experts_forward(self, block: Block, layer: Layer, waits: list[int], *, moe: int) -> list[int]:
        experts, parts = layer.experts, self.parts
        assert experts is not None
        if not self._routed(layer):
            waits = block.add(Stream.COMPUTE, parts.router(layer, Pass.FORWARD), waits)
        cuts = range(parts.plan.overlap_degree)
        sent = [self._send_out(block, experts, "dispatch", waits, moe=moe) for _ in cuts]
        beside = self._shared(block, experts, Pass.FORWARD, waits)
        back = self._experts(block, experts, Pass.FORWARD, sent, moe=moe)
        returned = [self._send_out(block, experts, "combine", back[cut], moe=moe) for cut in cuts]
        return block.add(Stream.COMPUTE, parts.merge(experts, Pass.FORWARD), [*chain.from_iterable(returned), *beside])

    def _send_out(self, block: Block, experts: Experts, kind: str, waits: list[int], *, moe: int) -> list[int]:
        return block.add(Stream.EXPERT, self.parts.routed(self.stage, experts, kind, moe=moe), waits)

    def _shared(self, block: Block, experts: Experts, passes: Pass, waits: list[int]) -> list[int]:
        unit = self.parts.shared(experts, passes)
        return [] if unit is None else self._between(block, unit, waits)

    def _experts(
        self, block: Block, experts: Experts, passes: Pass, sent: list[list[int]], *, moe: int
    ) -> list[list[int]]:
        """Each part: gather over the expert's tensor ranks, compute, scatter the sums; the same in both directions.

        The next part is gathered while this one is computed: its gather stands before this one's scatter.
        """
        gathered = self._expert_tensor(block, experts, "all_gather", sent[0], moe=moe, part=0)
        back = []
        for part in range(len(sent)):
            ready, following = gathered, part + 1
            if following < len(sent):
                gathered = self._expert_tensor(block, experts, "all_gather", sent[following], moe=moe, part=following)
            unit = self.parts.experts(experts, passes, moe=moe, place=self.place, part=part)
            computed = block.add(Stream.COMPUTE, unit, ready)
            back.append(self._expert_tensor(block, experts, "reduce_scatter", computed, moe=moe, part=part))
        return back

    def _expert_tensor(
        self, block: Block, experts: Experts, operation: str, waits: list[int], *, moe: int, part: int
    ) -> list[int]:
        unit = self.parts.expert_tensor(self.stage, experts, operation, moe=moe, place=self.place, part=part)
        return block.add(Stream.TENSOR, unit, waits)

    def _tensor(self, block: Block, operation: str, waits: list[int]) -> list[int]:
        if self.parts.plan.tp == 1:
            return waits
        return block.add(Stream.TENSOR, self.parts.tensor(self.stage, operation), waits)

    def _between(self, block: Block, unit: int, waits: list[int]) -> list[int]:
        """A work that wants the tokens of all tensor ranks: gather, work, scatter."""
        waits = self._tensor(block, "all_gather", waits)
        waits = block.add(Stream.COMPUTE, unit, waits)
        return self._tensor(block, "reduce_scatter", waits)

    # ---- backward: `passes` is BACKWARD for both gradients or INPUT_GRADIENT

    def backward(self, block: Block, layer: Layer, waits: list[int], *, moe: int) -> list[int]:
        """The mirror image of `forward`, after it has been run again where everything is recomputed."""
        if self.parts.plan.recompute == "full":
            waits = self.forward(block, layer, waits, moe=moe)
        start = len(block.stream)
        if isinstance(layer.feed_forward, Experts):
            waits = self._experts_backward(block, layer, waits, moe=moe)
        elif isinstance(layer.feed_forward, DenseFeedForward):
            waits = self._between(block, self.parts.dense(layer, block.passes), waits)
        waits = self._mixer_backward(block, layer, waits)
        block.gradients[block.at_layer] = block.computing(start)
        return waits

    def _mixer_backward(self, block: Block, layer: Layer, waits: list[int]) -> list[int]:
        if not layer.blocks:
            return waits
        waits = self._tensor(block, "all_gather", waits)
        waits = block.add(Stream.TENSOR, self.parts.context(self.stage, layer, "all_gather"), waits)
        waits = block.add(Stream.COMPUTE, self.parts.mixer(layer, block.passes, routed=self._routed(layer)), waits)
        waits = block.add(Stream.TENSOR, self.parts.context(self.stage, layer, "reduce_scatter"), waits)
        return self._tensor(block, "reduce_scatter", waits)

    def _experts_backward(self, block: Block, layer: Layer, waits: list[int], *, moe: int) -> list[int]:
        experts, parts = layer.experts, self.parts
        assert experts is not None
        waits = block.add(Stream.COMPUTE, parts.merge(experts, block.passes), waits)
        cuts = range(parts.plan.overlap_degree)
        sent = [self._send_out(block, experts, "dispatch", waits, moe=moe) for _ in cuts]
        beside = self._shared(block, experts, block.passes, waits)
        back = self._experts(block, experts, block.passes, sent, moe=moe)
        returned = [self._send_out(block, experts, "combine", back[cut], moe=moe) for cut in cuts]
        waits = [*chain.from_iterable(returned), *beside]
        if self._routed(layer):
            return waits
        return block.add(Stream.COMPUTE, parts.router(layer, block.passes), waits)

    # ---- the gradients of the weights alone: no layer waits, none exchanges anything

    def weights(self, block: Block, layer: Layer, *, moe: int) -> None:
        """The weight gradients of one layer, as one step for each work that has weights."""
        steps: list[int] = []
        for unit in self._weight_units(layer, moe=moe):
            if self.parts.works[unit].kernels:
                steps += block.add(Stream.COMPUTE, unit, [ENTRY])
        block.gradients[block.at_layer] = steps

    def _weight_units(self, layer: Layer, *, moe: int) -> Iterable[int]:
        parts, which = self.parts, Pass.WEIGHT_GRADIENT
        if layer.experts:
            experts = layer.experts
            yield parts.merge(experts, which)
            for cut in range(parts.plan.overlap_degree):
                yield parts.experts(experts, which, moe=moe, place=self.place, part=cut)
            shared = parts.shared(experts, which)
            if shared is not None:
                yield shared
            if not self._routed(layer):
                yield parts.router(layer, which)
        elif isinstance(layer.feed_forward, DenseFeedForward):
            yield parts.dense(layer, which)
        if layer.blocks:
            yield parts.mixer(layer, which, routed=self._routed(layer))
