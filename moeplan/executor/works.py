"""What each task of a program does on one rank: its tensors, from task to task.

Values stand under the layer that they belong to: `x` what comes in, `h` behind the mixer, `u` what goes to experts, `g`
a gradient of `x`, `dh` one of `h`. A value with a part in its name (`in/0`) is of one part of the layer's tokens. Where
tensor parallelism is, `full` is gathered and `partial` is one summand.

A context-parallel rank projects keys and values in the task that gathers them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as nn

from moeplan.domain.program import Pass
from moeplan.executor.copies import Relayed
from moeplan.executor.dense import DenseWorks
from moeplan.executor.ends import Loss
from moeplan.executor.exchange import Wire
from moeplan.executor.lane import Message, Task
from moeplan.executor.layers import Tape, expert_rows, merged, routed
from moeplan.executor.rank import Rank
from moeplan.executor.weights import ENDS, OfMicrobatch, Sharding, slot_prefix


class Stretch:
    """Forward from some inputs to some outputs, so that it can be gone backward by itself."""

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], tape: Tape) -> None:
        self.tape = tape
        self.inputs = tuple(each.detach().requires_grad_(True) for each in inputs)
        with torch.enable_grad():
            self.outputs = run(*self.inputs)

    def backward(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the inputs; those of the weights are left on the tape, but for the small ones."""
        wanted = [*self.inputs, *(leaf for _, leaf in self.tape.leaves)]
        found = torch.autograd.grad(self.outputs, wanted, gradients, allow_unused=True)
        for (name, _), gradient in zip(self.tape.leaves, found[len(self.inputs) :], strict=True):
            if gradient is not None:
                self.tape.weights.add_gradient(name, gradient)
        pairs = zip(self.inputs, found, strict=False)
        result = tuple(torch.zeros_like(each) if gradient is None else gradient for each, gradient in pairs)
        self.inputs, self.outputs, self.tape.leaves = (), (), []
        return result


class Passage:
    """What a micro-batch has left on its way through one chunk."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], Tensor] = {}
        self.stretches: dict[tuple[int, str, int], Stretch] = {}
        self.put_aside: dict[tuple[int, str, int], list[Tape]] = defaultdict(list)
        self.kept: dict[int, Tensor] = {}
        """By layer, the keys and values of this rank's tokens, which are gathered once more on the way back."""
        self.relayed: dict[int, Relayed] = defaultdict(Relayed)
        """By layer, what it keeps of other ranks' tokens."""
        self.loss: Loss | None = None

    def forget(self, layer: int, *, keep: str = "") -> None:
        """Drops the values of a layer."""
        for key in [key for key in list(self.values) if key[0] == layer and key[1] != keep]:
            del self.values[key]


class Works:
    """The handlers of the tasks of one rank."""

    def __init__(self, rank: Rank, wires: Mapping[str, Wire]) -> None:
        self.rank, self.plan, self.wires = rank, rank.plan, wires
        self.sharding = Sharding(rank, wires)
        self.dense = DenseWorks(self)
        self.mail: dict[tuple[int, int, bool], Tensor] = {}
        self.passages: dict[tuple[int, int], Passage] = defaultdict(Passage)

    def begin(self, words_N: Tensor, target_N: Tensor) -> None:
        """A new step, on all tokens of its batch."""
        self.dense.ends.begin(words_N, target_N)
        self.passages.clear()
        for unit in self.rank.units:
            unit.clear()

    def handle(self, task: Task) -> None:
        """Does a task."""
        if task.kind in ("parameters", "gradients", "tensor_gradients", "optimizer"):
            getattr(self.sharding, task.kind)(task)
        elif task.kind == "send":
            self._send(task)
        else:
            passage = self.passages[task.chunk, task.microbatch]
            if task.passes == Pass.WEIGHT_GRADIENT and task.kind not in ("embedding", "tensor"):
                for tape in passage.put_aside.pop((task.layer, task.kind, task.part), []):
                    tape.finish()
            else:
                way = f"{task.kind}_{'backward' if task.backward else 'forward'}"
                getattr(self if hasattr(self, way) else self.dense, way)(task, passage)
            self.sharding.free(task)

    def receive(self, message: Message) -> None:
        """Waits for what another stage sends."""
        buffer = torch.empty(self.rank.tokens, self.rank.width, dtype=self.rank.dtype, device=self.rank.device)
        self.wires[f"{self.rank.way(message.source, self.rank.number)} in"].swap([], [(message.source, buffer)])
        self.mail[message.microbatch, message.boundary, message.backward] = buffer

    # ---- between layers and stages

    def boundary(self, chunk: int, microbatch: int, layer: int, name: str) -> Tensor:
        """`x` or `g` before a layer: from this chunk, from another rank, or from another chunk of this rank."""
        passage = self.passages[chunk, microbatch]
        if (layer, name) not in passage.values:
            key = (microbatch, layer, name == "g")
            if key in self.mail:
                found = self.mail.pop(key)
            else:
                other = self.rank.neighbour(chunk, 1 if name == "g" else -1)
                found = self.boundary(other, microbatch, layer, name)
                del self.passages[other, microbatch].values[layer, name]
            passage.values[layer, name] = found
        return passage.values[layer, name]

    def x(self, task: Task, layer: int | None = None) -> Tensor:
        """What comes into a layer."""
        return self.boundary(task.chunk, task.microbatch, task.layer if layer is None else layer, "x")

    def g(self, task: Task, layer: int | None = None) -> Tensor:
        """The gradient of what goes out of a layer."""
        return self.boundary(task.chunk, task.microbatch, task.layer + 1 if layer is None else layer, "g")

    def _send(self, task: Task) -> None:
        name, layer = ("x", self.rank.end(task.chunk)) if task.passes == Pass.FORWARD else (
            "g", self.rank.first(task.chunk)
        )  # fmt: skip
        value = self.boundary(task.chunk, task.microbatch, layer, name)
        target = self.rank.target(task)
        self.wires[self.rank.way(self.rank.number, target)].swap([(target, value)], [])
        del self.passages[task.chunk, task.microbatch].values[layer, name]

    # ---- stretches

    def tape(self, task: Task, *, expert: bool = False, layer: int | None = None) -> Tape:
        """For the weights of a layer."""
        unit = self.rank.unit(task.chunk, task.layer if layer is None else layer, expert=expert)
        return Tape(OfMicrobatch(unit, task.microbatch))

    def run(
        self, task: Task, passage: Passage, run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...],
        tape: Tape, *, role: str = "",
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Outputs of a stretch, which is kept for the way back unless that runs it again."""
        if task.passes == Pass.FORWARD and self.plan.recompute == "full" and task.layer != ENDS:
            return run(*inputs)
        stretch = Stretch(run, inputs, tape)
        passage.stretches[task.layer, role or task.kind, task.part] = stretch
        return tuple(each.detach() for each in stretch.outputs)

    def back(self, task: Task, passage: Passage, *gradients: Tensor, role: str = "") -> tuple[Tensor, ...]:
        """Gradients of a stretch's inputs; its weights' are computed now or, in a pass of inputs alone, put aside."""
        stretch = passage.stretches.pop((task.layer, role or task.kind, task.part))
        found = stretch.backward(*gradients)
        if task.passes != Pass.INPUT_GRADIENT:
            stretch.tape.finish()
        elif stretch.tape.later:
            passage.put_aside[task.layer, role.partition("/")[0] or task.kind, task.part].append(stretch.tape)
        return found

    def leave(self, task: Task, passage: Passage, value: Tensor) -> None:
        """The layer's output; what is run again has left it before."""
        again = task.passes != Pass.FORWARD
        passage.forget(task.layer, keep="x" if self.plan.recompute == "full" and not again else "")
        if not again:
            passage.values[task.layer + 1, "x"] = value

    def arrive(self, task: Task, passage: Passage, value: Tensor) -> None:
        """The gradient of the layer's input; the one of its output is needed no more."""
        passage.forget(task.layer + 1)
        passage.forget(task.layer)
        passage.values[task.layer, "g"] = value

    # ---- router, experts, merge

    def routed(self, task: Task, tape: Tape, h: Tensor) -> tuple[Tensor, Tensor]:
        """Normed tokens, and weights of their given experts."""
        experts = self.rank.layer(task).experts
        assert experts is not None
        chosen_TK = self.rank.chosen_TK(task)
        return routed(tape, h, experts, chosen_TK, prefix=f"layers.{task.layer}.feed_forward.")

    def router_forward(self, task: Task, passage: Passage) -> None:
        """The router alone."""
        tape = self.tape(task)
        found = self.run(task, passage, lambda h: self.routed(task, tape, h), (passage.values[task.layer, "h"],), tape)
        passage.values |= {(task.layer, "u"): found[0], (task.layer, "weight"): found[1]}

    def router_backward(self, task: Task, passage: Passage) -> None:
        """Its gradient joins that of the residual."""
        (dh,) = self.back(task, passage, self.du(task, passage), passage.values[task.layer, "dweight"])
        passage.values[task.layer, "dh"] = passage.values[task.layer, "dh"] + dh

    def du(self, task: Task, passage: Passage) -> Tensor:
        """The gradient of what went to experts: of all rows of each token, and of the shared expert."""
        rows = self.rank.rows(task)
        found = torch.zeros(self.rank.tokens + 1, self.rank.width, dtype=self.rank.dtype, device=self.rank.device)
        for part in range(self.plan.overlap_degree):
            index = self.rank.local_N(task, rows.sent[part])
            found.index_add_(0, index, passage.values[task.layer, f"dsent/{part}"])
        shared = passage.values.get((task.layer, "dshared"))
        return found[:-1] if shared is None else found[:-1] + shared

    def _sent_rows(self, task: Task, u: Tensor) -> Tensor:
        index = self.rank.local_N(task, self.rank.rows(task).sent[task.part])
        return torch.cat([u, u.new_zeros(1, u.shape[1])])[index]

    def dispatch_forward(self, task: Task, passage: Passage) -> None:
        """Tokens to their experts."""
        rows = self._sent_rows(task, passage.values[task.layer, "u"])
        passage.values[task.layer, f"in/{task.part}"] = self._to_experts(task, rows, passage)

    def dispatch_backward(self, task: Task, passage: Passage) -> None:
        """Gradients of what came back, to the experts."""
        rows = passage.values.pop((task.layer, f"dback/{task.part}"))
        passage.values[task.layer, f"dout/{task.part}"] = self._to_experts(task, rows, passage)

    def combine_forward(self, task: Task, passage: Passage) -> None:
        """Experts' outputs to their tokens."""
        rows = passage.values.pop((task.layer, f"out/{task.part}"))
        passage.values[task.layer, f"back/{task.part}"] = self._from_experts(task, rows, passage)

    def combine_backward(self, task: Task, passage: Passage) -> None:
        """Gradients of what was sent, to their tokens."""
        rows = passage.values.pop((task.layer, f"din/{task.part}"))
        passage.values[task.layer, f"dsent/{task.part}"] = self._from_experts(task, rows, passage)

    def _to_experts(self, task: Task, rows: Tensor, passage: Passage) -> Tensor:
        if (copies := self.rank.rows(task).copies) is not None:
            weight_N = None if task.backward else self._away(task, passage.values[task.layer, "weight"])
            leaving, relayed = rows.to(self.rank.travel["dispatch"]), passage.relayed[task.layer]
            return copies.to_experts(self.wires["expert"], leaving, relayed, weight_N).to(self.rank.dtype)
        counts_GG, route = self.rank.rows(task).counts_GG[task.part], self.rank.route(task)
        parcels = rows.to(self.rank.travel["dispatch"]).split(counts_GG[route.me].tolist())
        return torch.cat(route.run(self.wires["expert"], parcels, counts_GG)).to(self.rank.dtype)

    def _away(self, task: Task, weight_TK: Tensor) -> Tensor:
        """Weights of what other nodes are sent, and 0 for padding."""
        padded = torch.cat([weight_TK, weight_TK.new_zeros(1, weight_TK.shape[1])])
        return padded.reshape(-1)[self.rank.away_N(task)].to(torch.float32)

    def _from_experts(self, task: Task, rows: Tensor, passage: Passage) -> Tensor:
        if (copies := self.rank.rows(task).copies) is not None:
            leaving, relayed = rows.to(self.rank.travel["combine"]), passage.relayed[task.layer]
            back, dweight_N = copies.to_tokens(self.wires["expert"], leaving, relayed, is_gradient=task.backward)
            if dweight_N is not None:
                dweight = passage.values[task.layer, "dweight"]
                padded = torch.cat([dweight, dweight.new_zeros(1, dweight.shape[1])]).reshape(-1)
                padded.index_add_(0, self.rank.away_N(task), dweight_N.to(dweight.dtype))
                passage.values[task.layer, "dweight"] = padded.view(-1, dweight.shape[1])[:-1]
            return back.to(self.rank.dtype)
        counts_GG, route = self.rank.rows(task).counts_GG[task.part].T, self.rank.route(task)
        parcels = rows.to(self.rank.travel["combine"]).split(counts_GG[route.me].tolist())
        return torch.cat(route.run(self.wires["expert"], parcels, counts_GG)).to(self.rank.dtype)

    def expert_tensor_forward(self, task: Task, passage: Passage, *, d: str = "") -> None:
        """Rows of all ranks that share a place's experts; then the sums of their own rows go back to them."""
        sizes, ring = self.rank.rows(task).owned[task.part], self.rank.ring(task)
        if task.operation == "all_gather":
            first = "dout" if d else "in"
            own = self._entering(task, passage, first)
            chunks = [own if at == ring.me else own.new_empty(size, own.shape[1]) for at, size in enumerate(sizes)]
            ring.gather(self.wires["tensor"], chunks)
            passage.values[task.layer, f"{d}all/{task.part}"] = torch.cat(chunks)
            return
        chunks = [each.contiguous() for each in passage.values.pop((task.layer, f"{d}sum/{task.part}")).split(sizes)]
        ring.reduce_scatter(self.wires["tensor"], chunks)
        self._leaving(task, passage, "din" if d else "out", chunks[ring.me])

    def expert_tensor_backward(self, task: Task, passage: Passage) -> None:
        """The same for gradients."""
        self.expert_tensor_forward(task, passage, d="d")

    def _entering(self, task: Task, passage: Passage, name: str) -> Tensor:
        """Rows for the experts; without expert parallelism nothing has brought them."""
        if self.plan.ep > 1:
            return passage.values.pop((task.layer, f"{name}/{task.part}")).contiguous()
        if name == "in":
            return self._sent_rows(task, passage.values[task.layer, "u"])
        return passage.values.pop((task.layer, "dback/0"))

    def _leaving(self, task: Task, passage: Passage, name: str, rows: Tensor) -> None:
        """Rows from the experts; without expert parallelism they are home."""
        home = {"out": "back", "din": "dsent"}[name] if self.plan.ep == 1 else name
        passage.values[task.layer, f"{home}/{task.part}"] = rows

    def experts_forward(self, task: Task, passage: Passage) -> None:
        """The experts of this place on one part of the rows that they get."""
        experts, tape, rows = self.rank.layer(task).experts, self.tape(task, expert=True), self.rank.rows(task)
        assert experts is not None
        gated, order, counts = experts.gated, rows.by_slot[task.part], rows.slot_counts[task.part]
        names = [slot_prefix(task.layer, slot) for slot in range(len(counts))]

        def run(x_ND: Tensor) -> tuple[Tensor]:
            y_ND = expert_rows(tape, x_ND[order], counts, names, gated=gated)
            return (torch.zeros_like(y_ND).index_copy(0, order, y_ND),)

        split = self.plan.etp > 1
        given = passage.values.pop((task.layer, f"all/{task.part}")) if split else self._entering(task, passage, "in")
        (found,) = self.run(task, passage, run, (given,), tape)
        if split:
            passage.values[task.layer, f"sum/{task.part}"] = found
        else:
            self._leaving(task, passage, "out", found)

    def experts_backward(self, task: Task, passage: Passage) -> None:
        """Gradients of these rows."""
        split = self.plan.etp > 1
        given = (
            passage.values.pop((task.layer, f"dall/{task.part}")) if split else self._entering(task, passage, "dout")
        )
        (found,) = self.back(task, passage, given)
        if split:
            passage.values[task.layer, f"dsum/{task.part}"] = found
        else:
            self._leaving(task, passage, "din", found)

    def merge_forward(self, task: Task, passage: Passage) -> None:
        """The weighted sum of what came back, on top of the residual."""
        row_TK, parts = self.rank.row_TK(task), range(self.plan.overlap_degree)
        back = torch.cat([passage.values.pop((task.layer, f"back/{part}")) for part in parts])
        inputs = [passage.values[task.layer, "h"], passage.values[task.layer, "weight"], back]
        if (task.layer, "shared") in passage.values:
            inputs.append(passage.values[task.layer, "shared"])

        def run(h: Tensor, weight: Tensor, back: Tensor, *shared: Tensor) -> tuple[Tensor]:
            more = row_TK.shape[1] - weight.shape[1]
            found = merged(h, nn.pad(weight, (0, more), value=1.0), back, row_TK)
            return (found + shared[0] if shared else found,)

        (found,) = self.run(task, passage, run, tuple(inputs), self.tape(task))
        self.leave(task, passage, found)

    def merge_backward(self, task: Task, passage: Passage) -> None:
        """Gradients of the residual, of the router's weights, and of each row."""
        dh, dweight, dback, *_ = self.back(task, passage, self.g(task))
        passage.values |= {(task.layer, "dh"): dh, (task.layer, "dweight"): dweight}
        sizes = [len(each) for each in self.rank.rows(task).sent]
        for part, rows in enumerate(dback.split(sizes)):
            passage.values[task.layer, f"dback/{part}"] = rows
