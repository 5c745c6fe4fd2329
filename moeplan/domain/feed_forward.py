"""The feed-forward half of a layer: dense, or experts behind a router.

Tensor parallelism divides dense and shared widths and holds router and norms whole; expert parallelism divides
experts, expert tensor parallelism an expert's width. A gated expert has three matrices (up and gate are one kernel
here), a plain one two.
References: Shazeer, "GLU variants improve transformer" (2020); Fedus et al., "Switch transformers" (2021); Dai et
al., "DeepSeekMoE" (2024) for shared experts; Rajbhandari et al., "DeepSpeed-MoE" (2022), section 4.1, for the
residual dense branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from moeplan.domain import operators as op
from moeplan.domain._frozen import Frozen
from moeplan.domain.mixers import Count, Dim, Norm, norm_parameters
from moeplan.domain.operators import Operator


def _matrices(hidden_size: int, width: int, *, gated: bool, bias: bool) -> int:
    """Weights of a block without the output's bias: `width` may be one rank's part."""
    return (3 if gated else 2) * hidden_size * width + ((2 if gated else 1) * width if bias else 0)


def _block(name: str, *, tokens: int, hidden_size: int, width: int, gated: bool) -> tuple[Operator, ...]:
    """Up (and gate), activation, down: 2 or 3 matrices; the activation is cheap to do again."""
    up = (2 if gated else 1) * width
    return (
        op.gemm(f"{name}up", rows=tokens, columns=up, depth=hidden_size, kept=tokens * up),
        op.elementwise(
            f"{name}activation", inputs=tokens * up, outputs=tokens * width, flops=(6 if gated else 8) * tokens * width,
            kept=tokens * width, recompute=True,
        ),
        op.gemm(f"{name}down", rows=tokens, columns=hidden_size, depth=width),
    )  # fmt: skip


class DenseFeedForward(Frozen):
    """Two or three matrices with an activation between, used by every token."""

    kind: Literal["dense"] = "dense"
    hidden_size: Dim
    width: Dim
    gated: bool = True
    bias: bool = False
    norm: Norm = "rms"
    post_norm: bool = False

    @property
    def replicated_parameters(self) -> int:
        """Norms and the output's bias."""
        d = self.hidden_size
        return norm_parameters(self.norm, d) * (1 + self.post_norm) + (d if self.bias else 0)

    @property
    def parameters(self) -> int:
        """All weights of the block."""
        return self.dense_parameters_per_rank(1)

    def dense_parameters_per_rank(self, tp: int) -> int:
        """Weights of one rank: the width is divided by `tp`."""
        width = op.split(self.width, tp, "width")
        return _matrices(self.hidden_size, width, gated=self.gated, bias=self.bias) + self.replicated_parameters

    def operators(self, *, tokens: int, tp: int = 1) -> tuple[Operator, ...]:
        """Norm, up, activation, down, residual."""
        d, local = self.hidden_size, op.share(tokens, tp) * self.hidden_size
        before = () if self.norm == "none" else (op.norm("norm", local, width=norm_parameters(self.norm, d)),)
        block = _block("", tokens=tokens, hidden_size=d, width=op.split(self.width, tp, "width"), gated=self.gated)
        after = (op.norm("post_norm", local, width=d, kept=False),) if self.post_norm else ()
        return (*before, *block, *after, op.residual("residual", local))


class Branch(Frozen):
    """A dense block beside the routed experts: a shared expert, or a residual branch of its own width.

    `token_gate`: its output is weighed per token by a sigmoid of one more projection (Qwen2-MoE); `mixing`: branch
    and experts are weighed by a learned softmax of two scores (DeepSpeed's residual MoE); `norms`: further norms that
    the branch brings along.
    """

    width: Dim
    gated: bool = True
    bias: bool = False
    token_gate: bool = False
    mixing: bool = False
    norms: Count = 0

    def parameters(self, hidden_size: int, tp: int = 1) -> int:
        """Weights of one rank: the width is divided, gates, norms and the output's bias are whole."""
        return _matrices(
            hidden_size, op.split(self.width, tp, "width"), gated=self.gated, bias=self.bias
        ) + self.replicated(hidden_size)

    def replicated(self, hidden_size: int) -> int:
        """Weights that each rank holds whole."""
        gates = (hidden_size if self.token_gate else 0) + (2 * hidden_size + 2 if self.mixing else 0)
        return gates + self.norms * hidden_size + (hidden_size if self.bias else 0)


class Experts(Frozen):
    """Routed experts, with what may stand around them.

    `correction_bias`: the router balances load by a bias that is not trained by gradient (DeepSeek-V3); it is a
    buffer, and not counted as a parameter, as in published counts. `router_scale`, `expert_scale`: the router
    scales its input per channel, and each expert's output by a number of its own (Gemma 4).
    `latent_size`: experts work in a narrower space, with a projection down before and up after them (Nemotron-3).
    `zero_experts`: choices of the router that do nothing (LongCat). `num_groups`, `top_groups`: a token's experts
    come from so many of the groups (DeepSeek).
    `routing` "hash": experts are looked up by token; the router's scores still weigh them (DeepSeek-V4).
    """

    kind: Literal["experts"] = "experts"
    hidden_size: Dim
    num_experts: Dim
    top_k: Dim
    width: Dim
    gated: bool = True
    bias: bool = False
    routing: Literal["learned", "hash"] = "learned"
    router_bias: bool = False
    router_scale: bool = False
    expert_scale: bool = False
    correction_bias: bool = False
    num_groups: Dim = 1
    top_groups: Dim = 1
    zero_experts: Count = 0
    latent_size: Dim | None = None
    latent_bias: bool = False
    shared: Branch | None = None
    dense_branch: Branch | None = None
    norm: Norm = "rms"
    post_norm: bool = False

    @model_validator(mode="after")
    def _check(self) -> Experts:
        if self.top_k > self.num_experts + self.zero_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}; use 1 to {self.num_experts}")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups {self.num_groups} does not divide num_experts {self.num_experts}; use a divisor"
            )
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"top_groups {self.top_groups} exceeds num_groups {self.num_groups}; use 1 to {self.num_groups}"
            )
        if self.top_k > self.top_groups * (self.num_experts // self.num_groups) + self.zero_experts:
            held = self.top_groups * (self.num_experts // self.num_groups)
            raise ValueError(
                f"top_k {self.top_k} exceeds the {held} experts of top_groups {self.top_groups}; use 1 to {held}"
            )
        return self

    @property
    def expert_input(self) -> int:
        """Width of what travels to an expert: the latent size, or the hidden size."""
        return self.latent_size or self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return self.expert_parameters_per_rank(1)

    def expert_parameters_per_rank(self, etp: int) -> int:
        """Weights of one routed expert on one rank of its expert tensor parallelism."""
        width = op.split(self.width, etp, "width")
        whole = (self.expert_input if self.bias else 0) + self.expert_scale
        return _matrices(self.expert_input, width, gated=self.gated, bias=self.bias) + whole

    @property
    def routed_parameters(self) -> int:
        """Weights of all routed experts."""
        return self.num_experts * self.expert_parameters

    @property
    def active_routed_parameters(self) -> int:
        """Weights of the routed experts that one token uses; with zero experts, on average under even routing."""
        return self.top_k * self.routed_parameters // (self.num_experts + self.zero_experts)

    @property
    def router_parameters(self) -> int:
        """A score per expert, zero experts included, and the router's biases and scales."""
        outputs = self.num_experts + self.zero_experts
        return self.hidden_size * (outputs + self.router_scale) + (outputs if self.router_bias else 0)

    @property
    def replicated_parameters(self) -> int:
        """Router, latent projections, norms, and what is whole in the branches."""
        d, latent = self.hidden_size, self.latent_size or 0
        branches = sum(branch.replicated(d) for branch in (self.shared, self.dense_branch) if branch)
        latents = 2 * d * latent + (d + latent if self.latent_bias and latent else 0)
        return self.router_parameters + latents + norm_parameters(self.norm, d) * (1 + self.post_norm) + branches

    @property
    def dense_parameters(self) -> int:
        """All weights but those of the routed experts."""
        return self.dense_parameters_per_rank(1)

    @property
    def parameters(self) -> int:
        """All weights of the block."""
        return self.dense_parameters + self.routed_parameters

    def dense_parameters_per_rank(self, tp: int) -> int:
        """Weights of one rank that are no routed experts: branches divided by `tp`, router, latents and norms whole."""
        d = self.hidden_size
        divided = sum(b.parameters(d, tp) - b.replicated(d) for b in (self.shared, self.dense_branch) if b)
        return divided + self.replicated_parameters

    def router_operators(self, *, tokens: int, tp: int = 1) -> tuple[Operator, ...]:
        """Norm, scores in fp32, the choice of `top_k`, and the latent down-projection: each rank for its own tokens."""
        local, d, outputs = op.share(tokens, tp), self.hidden_size, self.num_experts + self.zero_experts
        before = () if self.norm == "none" else (op.norm("norm", local * d, width=norm_parameters(self.norm, d)),)
        chosen = 2 * local * self.top_k
        choice = op.elementwise(
            "router_choice", inputs=local * outputs, outputs=chosen, flops=5 * local * outputs,
            kept_accumulator=local * outputs, precision="accumulator",
        )  # fmt: skip
        down = (
            () if self.latent_size is None else (op.gemm("latent_down", rows=local, columns=self.latent_size, depth=d),)
        )
        return (
            *before,
            op.gemm("router", rows=local, columns=outputs, depth=d, precision="accumulator"),
            choice,
            *down,
        )

    def expert_operators(self, *, tokens_per_expert: Sequence[int], etp: int = 1) -> tuple[Operator, ...]:
        """The experts of one rank on the tokens they got: sort, up (and gate), activation, down, sort back.

        The received tokens are kept (they are the first matrix's input). A token's weight is applied with the
        activation, so that the experts' output need not be kept.
        """
        rows, width, d = sum(tokens_per_expert), op.split(self.width, etp, "width"), self.expert_input
        up = (2 if self.gated else 1) * width
        moved = rows * d
        return (
            op.elementwise("permute", inputs=moved, outputs=moved, kept=moved),
            op.grouped_gemm("expert_up", group_rows=tokens_per_expert, columns=up, depth=d, kept=rows * up),
            op.elementwise(
                "expert_activation", inputs=rows * up, outputs=rows * width,
                flops=(7 if self.gated else 9) * rows * width,
                kept=rows * width, recompute=True,
            ),
            op.grouped_gemm("expert_down", group_rows=tokens_per_expert, columns=d, depth=width),
            op.elementwise("unpermute", inputs=moved, outputs=moved),
        )  # fmt: skip

    def shared_operators(self, *, tokens: int, tp: int = 1) -> tuple[Operator, ...]:
        """The branches that every token uses, shared and residual; they can run beside the exchange."""
        d = self.hidden_size
        found: list[Operator] = []
        for name, branch in (("shared_", self.shared), ("branch_", self.dense_branch)):
            if branch is None:
                continue
            width = op.split(branch.width, tp, "width")
            found += _block(name, tokens=tokens, hidden_size=d, width=width, gated=branch.gated)
            elements = op.share(tokens, tp) * d
            found += [op.norm(f"{name}norm", elements, width=d) for _ in range(branch.norms)]
            if branch.token_gate or branch.mixing:
                scores = 2 if branch.mixing else 1
                found.append(op.gemm(f"{name}gate", rows=op.share(tokens, tp), columns=scores, depth=d, kept=elements))
        return tuple(found)

    def combine_operators(self, *, tokens: int, tp: int = 1) -> tuple[Operator, ...]:
        """What a token's own rank does with experts' outputs: sum of `top_k`, latent up-projection, norm, residual."""
        local, d = op.share(tokens, tp), self.hidden_size
        gathered, summed = local * self.top_k * self.expert_input, local * self.expert_input
        up = () if self.latent_size is None else (op.gemm("latent_up", rows=local, columns=d, depth=self.latent_size),)
        return (
            op.elementwise("combine", inputs=gathered, outputs=summed, flops=gathered, kept=summed if up else 0),
            *up,
            *((op.norm("post_norm", local * d, width=d, kept=False),) if self.post_norm else ()),
            op.residual("residual", local * d),
        )
