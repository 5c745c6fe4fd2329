"""What tasks do outside the experts: mixers, dense blocks and branches, sums over tensor ranks, the model's two ends.

A context-parallel rank projects keys and values in the task that gathers them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeplan.domain.feed_forward import Experts
from moeplan.executor.ends import Ends
from moeplan.executor.lane import Task
from moeplan.executor.layers import Tape, attended, feed_forward, normed, projected
from moeplan.executor.weights import ENDS

if TYPE_CHECKING:
    from moeplan.executor.works import Passage, Works


class DenseWorks:
    """The handlers of these tasks of one rank."""

    def __init__(self, works: Works) -> None:
        self.works, self.rank, self.plan, self.wires = works, works.rank, works.plan, works.wires
        self.ends = Ends(works.rank)

    # ---- mixer

    def _mix(self, task: Task, tape: Tape, x: Tensor) -> Tensor:
        mixer, prefix = self.rank.mixer(task), f"layers.{task.layer}.mixer."
        q, shared = projected(tape, mixer, x, self.rank.geometry, prefix=prefix)
        return attended(tape, mixer, q, shared, self.rank.geometry, prefix=prefix)

    def _behind(self, task: Task, tape: Tape, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What the mixer's task leaves: a summand, or the sum with the residual, routed where experts follow."""
        if self.plan.tp > 1:
            return (y,)
        return (x + y, *self.works.routed(task, tape, x + y)) if self.rank.layer(task).experts else (x + y,)

    def attention_forward(self, task: Task, passage: Passage) -> None:
        """The mixer, and the router behind it where nothing has to be exchanged between them."""
        tape, prefix = self.works.tape(task), f"layers.{task.layer}.mixer."
        x = passage.values[task.layer, "full"] if self.plan.tp > 1 else self.works.x(task)
        if self.plan.cp > 1:
            mixer, q, kv = self.rank.mixer(task), *(passage.values[task.layer, name] for name in ("q", "kv"))

            def apart(x: Tensor, q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
                return self._behind(task, tape, x, attended(tape, mixer, q, kv, self.rank.geometry, prefix=prefix))

            found = self.works.run(task, passage, apart, (x, q, kv), tape)
        else:
            found = self.works.run(
                task, passage, lambda x: self._behind(task, tape, x, self._mix(task, tape, x)), (x,), tape
            )
        names = ("partial",) if self.plan.tp > 1 else ("h", "u", "weight")
        passage.values |= {(task.layer, name): value for name, value in zip(names, found, strict=False)}
        if self.plan.tp == 1 and self.rank.layer(task).feed_forward is None:
            self.works.leave(task, passage, found[0])

    def attention_backward(self, task: Task, passage: Passage) -> None:
        """Gradients of the mixer's inputs."""
        if self.plan.tp > 1:
            gradients: tuple[Tensor, ...] = (passage.values[task.layer, "dfull"],)
        elif self.rank.layer(task).experts:
            gradients = (
                passage.values[task.layer, "dh"],
                self.works.du(task, passage),
                passage.values[task.layer, "dweight"],
            )
        else:
            name = "dh" if self.rank.layer(task).feed_forward else ""
            gradients = (passage.values[task.layer, name] if name else self.works.g(task),)
        found = self.works.back(task, passage, *gradients)
        if self.plan.cp > 1:
            names = ("dx", "dq", "dkv")
            passage.values |= {(task.layer, name): each for name, each in zip(names, found, strict=True)}
        elif self.plan.tp > 1:
            passage.values[task.layer, "partial"] = found[0]
        else:
            self.works.arrive(task, passage, found[0])

    def context_forward(self, task: Task, passage: Passage) -> None:
        """Projects, and gathers the keys and values of the whole sequence."""
        tape, mixer, prefix = self.works.tape(task), self.rank.mixer(task), f"layers.{task.layer}.mixer."
        x = passage.values[task.layer, "full"] if self.plan.tp > 1 else self.works.x(task)
        q, kv = self.works.run(
            task, passage, lambda x: projected(tape, mixer, x, self.rank.geometry, prefix=prefix), (x,), tape,
            role="attention/context",
        )  # fmt: skip
        passage.values |= {(task.layer, "q"): q, (task.layer, "kv"): self._whole_sequence(task, kv)}
        passage.kept[task.layer] = kv

    def _whole_sequence(self, task: Task, kv: Tensor) -> Tensor:
        """(sequences x all keys, ...): of each sequence the members' tokens one after another."""
        ring = self.rank.ring(task)
        chunks = [kv.contiguous() if member == ring.me else torch.empty_like(kv) for member in range(self.plan.cp)]
        ring.gather(self.wires["tensor"], chunks)
        whole = torch.stack(chunks).view(self.plan.cp, self.rank.geometry.batch, -1, kv.shape[1])
        return whole.transpose(0, 1).reshape(-1, kv.shape[1])

    def context_backward(self, task: Task, passage: Passage) -> None:
        """Keys and values come once more, as the program has it; then their gradients go home."""
        if task.operation == "all_gather":
            self._whole_sequence(task, passage.kept[task.layer])
            return
        ring, dkv = self.rank.ring(task), passage.values.pop((task.layer, "dkv"))
        by_member = dkv.view(self.rank.geometry.batch, self.plan.cp, -1, dkv.shape[1]).transpose(0, 1)
        chunks = [each.reshape(-1, dkv.shape[1]).contiguous() for each in by_member]
        ring.reduce_scatter(self.wires["tensor"], chunks)
        dq = passage.values.pop((task.layer, "dq"))
        (dx,) = self.works.back(task, passage, dq, chunks[ring.me], role="attention/context")
        del passage.kept[task.layer]
        total = dx + passage.values.pop((task.layer, "dx"))
        if self.plan.tp > 1:
            passage.values[task.layer, "partial"] = total
        else:
            self.works.arrive(task, passage, total)

    # ---- sums over tensor ranks

    def tensor_forward(self, task: Task, passage: Passage) -> None:
        """Gathers tokens for a work of all tensor ranks, or scatters its sums, behind which comes the residual."""
        if task.around == "embedding":
            passage.values[0, "x"] = self._scattered(task, passage.values.pop((ENDS, "partial")))
            return
        if task.around == "head":
            end = self.rank.end(task.chunk)
            passage.values[ENDS, "full"] = self._gathered(task, self.works.x(task, end))
            passage.forget(end)
            return
        if task.operation == "all_gather":
            name = {"dense": "h", "shared": "u"}.get(task.around)
            passage.values[task.layer, "full"] = self._gathered(
                task, self.works.x(task) if name is None else passage.values[task.layer, name]
            )
            return
        y = self._scattered(task, passage.values.pop((task.layer, "partial")))
        if task.around == "shared":
            passage.values[task.layer, "shared"] = y
        elif task.around == "dense":
            self.works.leave(task, passage, passage.values[task.layer, "h"] + y)
        else:
            passage.values[task.layer, "h"] = self.works.x(task) + y
            if self.rank.layer(task).feed_forward is None:
                self.works.leave(task, passage, passage.values[task.layer, "h"])

    def tensor_backward(self, task: Task, passage: Passage) -> None:
        """The same for gradients."""
        if task.around == "embedding":
            passage.values[ENDS, "full"] = self._gathered(task, self.works.g(task, 0))
            del passage.values[0, "g"]
            return
        if task.around == "head":
            partial = passage.values.pop((ENDS, "partial"))
            passage.values[self.rank.end(task.chunk), "g"] = self._scattered(task, partial)
            return
        is_mixer = task.around == "attention" and self.rank.layer(task).feed_forward is not None
        if task.operation == "all_gather":
            gradient = passage.values[task.layer, "dh"] if is_mixer else self.works.g(task)
            passage.values[task.layer, "dfull"] = self._gathered(task, gradient)
            return
        found = self._scattered(task, passage.values.pop((task.layer, "partial")))
        if task.around == "shared":
            passage.values[task.layer, "dshared"] = found
        elif task.around == "dense":
            passage.values[task.layer, "dh"] = self.works.g(task) + found
        else:
            self.works.arrive(
                task, passage, found + (passage.values[task.layer, "dh"] if is_mixer else self.works.g(task))
            )

    def _gathered(self, task: Task, own: Tensor) -> Tensor:
        ring = self.rank.ring(task)
        chunks = list(own.new_empty(len(ring.ranks), *own.shape).unbind())
        chunks[ring.me].copy_(own)
        ring.gather(self.wires["tensor"], chunks)
        return torch.cat(chunks)

    def _scattered(self, task: Task, whole: Tensor) -> Tensor:
        ring = self.rank.ring(task)
        chunks = list(whole.contiguous().chunk(len(ring.ranks)))
        ring.reduce_scatter(self.wires["tensor"], chunks)
        return chunks[ring.me].clone()

    # ---- dense blocks and branches

    def dense_forward(self, task: Task, passage: Passage) -> None:
        """A dense block, or the branch beside the experts."""
        tape, block, prefix = (
            self.works.tape(task),
            self.rank.layer(task).feed_forward,
            f"layers.{task.layer}.feed_forward.",
        )
        is_shared = isinstance(block, Experts)
        one = block.shared if isinstance(block, Experts) else block
        assert block is not None
        assert one is not None
        gated, kind = one.gated, block.norm
        split = self.plan.tp > 1

        def run(x: Tensor) -> tuple[Tensor]:
            inner = x if is_shared else normed(tape, x, kind, f"{prefix}norm")
            y = feed_forward(tape, inner, gated=gated, prefix=f"{prefix}shared." if is_shared else prefix)
            return (y if split or is_shared else x + y,)

        name = "full" if split else "u" if is_shared else "h"
        (found,) = self.works.run(task, passage, run, (passage.values[task.layer, name],), tape)
        if split or is_shared:
            passage.values[task.layer, "partial" if split else "shared"] = found
        else:
            self.works.leave(task, passage, found)

    shared_forward = dense_forward

    def dense_backward(self, task: Task, passage: Passage) -> None:
        """Its gradients."""
        split = self.plan.tp > 1
        (found,) = self.works.back(task, passage, passage.values[task.layer, "dfull"] if split else self.works.g(task))
        passage.values[task.layer, "partial" if split else "dshared" if task.kind == "shared" else "dh"] = found

    shared_backward = dense_backward

    # ---- ends

    def embedding_forward(self, task: Task, passage: Passage) -> None:
        """The first layer's input, or the summand of this rank's words."""
        where = (ENDS, "partial") if self.plan.tp > 1 else (0, "x")
        passage.values[where] = self.ends.embedded(task)

    def embedding_backward(self, task: Task, passage: Passage) -> None:
        """The words' gradients."""
        gradient = passage.values.pop((ENDS, "full")) if self.plan.tp > 1 else self.works.g(task, 0)
        self.ends.add_embedding_gradient(task, gradient)
        passage.values.pop((0, "g"), None)

    def head_forward(self, task: Task, passage: Passage) -> None:
        """Final norm, scores, and of the loss what this rank's words tell."""
        tape, end = self.works.tape(task), self.rank.end(task.chunk)
        x = passage.values.pop((ENDS, "full")) if self.plan.tp > 1 else self.works.x(task, end)
        (scores,) = self.works.run(task, passage, lambda x: (self.ends.scores(tape, x),), (x,), tape)
        passage.loss = self.ends.loss_of(task, scores)
        passage.forget(end)
        if self.plan.tp == 1:
            self.ends.loss += passage.loss.total(passage.loss.told_QT[None])

    def scores_forward(self, task: Task, passage: Passage) -> None:
        """The loss, from what all tensor ranks' words tell."""
        assert passage.loss is not None
        told = passage.loss.told_QT
        told_RQT = self._gathered(task, told).view(-1, *told.shape)
        self.ends.loss += passage.loss.total(told_RQT)

    def head_backward(self, task: Task, passage: Passage) -> None:
        """The last layer's output gradient, or this rank's summand of it."""
        assert passage.loss is not None
        (found,) = self.works.back(task, passage, passage.loss.gradient())
        passage.loss = None
        where = (ENDS, "partial") if self.plan.tp > 1 else (self.rank.end(task.chunk), "g")
        passage.values[where] = found
