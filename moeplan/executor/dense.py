"""What tasks do outside the experts: mixers, dense blocks and branches, sums over tensor ranks, the model's two ends.

Left to a task that has no time of its own in the program: the sums over tensor ranks that the ends of the model need;
their bytes are counted with the task. A context-parallel rank projects keys and values in the task that gathers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeplan.domain.feed_forward import Experts
from moeplan.executor.exchange import Ring, Wire
from moeplan.executor.lane import Task
from moeplan.executor.layers import Tape, attended, feed_forward, normed, projected
from moeplan.executor.rank import Rank

if TYPE_CHECKING:
    from moeplan.executor.works import Passage, Works


class DenseWorks:
    """The handlers of these tasks of one rank."""

    def __init__(self, works: Works) -> None:
        self.works, self.rank, self.plan, self.wires = works, works.rank, works.plan, works.wires
        self.ends = Ends(works.rank, works.wires["beside"])

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
        """The first layer's input."""
        passage.values[0, "x"] = self.ends.embedded(task)

    def embedding_backward(self, task: Task, passage: Passage) -> None:
        """The words' gradients."""
        self.ends.add_embedding_gradient(task, self.works.g(task, 0))
        del passage.values[0, "g"]

    def head_forward(self, task: Task, passage: Passage) -> None:
        """Final norm, scores and loss."""
        end, tapes = self.rank.end(task.chunk), [self.works.tape(task) for _ in range(2)]
        x = self.works.x(task, end)
        (normal,) = self.works.run(
            task, passage, lambda x: (self.ends.normal(tapes[0], x),), (x,), tapes[0], role="head/norm"
        )
        whole = self.ends.gathered(normal)
        (loss,) = self.works.run(
            task, passage, lambda x: (self.ends.lost(task, tapes[1], x),), (whole,), tapes[1], role="head/loss"
        )
        self.ends.loss += loss.item()
        passage.forget(end)

    def head_backward(self, task: Task, passage: Passage) -> None:
        """The last layer's output gradient."""
        (whole,) = self.works.back(task, passage, torch.ones((), device=self.rank.device), role="head/loss")
        (found,) = self.works.back(task, passage, self.ends.scattered(whole), role="head/norm")
        passage.values[self.rank.end(task.chunk), "g"] = found


class Ends:
    """Embedding, head and loss; `beside` carries what tensor ranks exchange for them."""

    def __init__(self, rank: Rank, beside: Wire) -> None:
        self.rank, self.beside = rank, beside
        self.ring = Ring.simple(rank.tensor_ranks, rank.number)
        self.loss = 0.0

    def begin(self, words_N: Tensor, target_N: Tensor) -> None:
        """A new step, on all tokens of its batch."""
        self.words_N, self.target_N, self.loss = words_N, target_N, 0.0

    def gathered(self, own: Tensor) -> Tensor:
        """The rows of all tensor ranks."""
        if len(self.ring.ranks) == 1:
            return own
        chunks = [
            own.contiguous() if at == self.ring.me else torch.empty_like(own) for at in range(len(self.ring.ranks))
        ]
        self.ring.gather(self.beside, chunks)
        return torch.cat(chunks)

    def scattered(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum over tensor ranks."""
        if len(self.ring.ranks) == 1:
            return whole
        chunks = [each.clone() for each in whole.chunk(len(self.ring.ranks))]
        self.ring.reduce_scatter(self.beside, chunks)
        return chunks[self.ring.me]

    def _first(self, table: Tensor) -> int:
        """The first word whose row is here."""
        return self.ring.me * len(table)

    def embedded(self, task: Task) -> Tensor:
        """The rows of this rank's tokens."""
        table = self.rank.unit(task.chunk, task.layer, expert=False).value("embedding")
        word_T = self.words_N[self.rank.group_T(task.microbatch)] - self._first(table)
        here_T = (word_T >= 0) & (word_T < len(table))
        return self.scattered(table[word_T.clamp(0, len(table) - 1)] * here_T[:, None])

    def add_embedding_gradient(self, task: Task, gradient: Tensor) -> None:
        """Adds each token's gradient to its word's row."""
        unit = self.rank.unit(task.chunk, task.layer, expert=False)
        table = unit.gradient_view("embedding", task.microbatch)
        word_T = self.words_N[self.rank.group_T(task.microbatch)] - self._first(table)
        here = torch.nonzero((word_T >= 0) & (word_T < len(table)))[:, 0]
        table.index_add_(0, word_T[here], self.gathered(gradient)[here].to(table.dtype))

    def normal(self, tape: Tape, x: Tensor) -> Tensor:
        """The final norm."""
        return normed(tape, x, self.rank.scenario.model.norm, "final_norm")

    def lost(self, task: Task, tape: Tape, whole: Tensor) -> Tensor:
        """The micro-batch's part of the mean cross entropy of the batch."""
        scores = tape.linear(whole, "head").to(torch.float32)
        target_T = self.target_N[self.rank.group_T(task.microbatch)]
        scale = 1.0 / self.rank.scenario.workload.step_tokens

        def side_by_side(table: Tensor) -> Tensor:
            return self.gathered(table[None])

        return vocabulary_loss(
            scores, target_T, first=self.ring.me * scores.shape[1], scale=scale, gathered=side_by_side
        )


def vocabulary_loss(
    scores_TV: Tensor, target_T: Tensor, *, first: int, scale: float, gathered: Callable[[Tensor], Tensor]
) -> Tensor:
    """The sum of cross entropies times `scale`; each tensor rank has the scores of the words from `first` on.

    `gathered` puts the same table of all tensor ranks side by side. Reference: Shoeybi et al., "Megatron-LM" (2019),
    section 3, which exchanges as little.
    """
    found: Tensor = _VocabularyLoss.apply(scores_TV, target_T - first, scale, gathered)  # type: ignore[no-untyped-call]
    return found


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores_TV: Tensor, target_T: Tensor, scale: float, gathered: Callable[[Tensor], Tensor]
    ) -> Tensor:
        here_T = (target_T >= 0) & (target_T < scores_TV.shape[1])
        at_T1 = target_T.clamp(0, scores_TV.shape[1] - 1)[:, None]
        most_T = scores_TV.max(dim=1).values
        sum_T = (scores_TV - most_T[:, None]).exp().sum(dim=1)
        own_T = scores_TV.gather(1, at_T1)[:, 0] * here_T
        most_RT, sum_RT, own_RT = gathered(torch.stack([most_T, sum_T, own_T])).unbind(dim=1)
        top_T = most_RT.max(dim=0).values
        total_T = (sum_RT * (most_RT - top_T).exp()).sum(dim=0)
        share_TV = (scores_TV - top_T[:, None]).exp() / total_T[:, None]
        ctx.save_for_backward(share_TV, at_T1, here_T)
        ctx.scale = scale
        return (total_T.log() + top_T - own_RT.sum(dim=0)).sum() * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        share_TV, at_T1, here_T = ctx.saved_tensors
        found = share_TV.scatter_add(1, at_T1, -here_T[:, None].to(share_TV.dtype))
        return found * (gradient * ctx.scale), None, None, None
