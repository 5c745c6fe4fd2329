"""A plan: every decision about how a step is run, and nothing else. JSON in and out, versioned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from moeplan.domain._frozen import Frozen
from moeplan.domain.placement import Placement

Degree = Annotated[int, Field(ge=1, le=10**7)]
ZeroStage = Annotated[int, Field(ge=0, le=3)]
Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp4"]
Recompute = Literal["none", "selective", "full"]
CapacityRule = Literal["dropless", "drop", "pad", "pad_to_max"]
Arbitration = Literal["fair", "fifo", "a2a_first"]
RankOrder = Literal["tp-cp-ep-dp-pp", "tp-cp-dp-ep-pp", "tp-cp-ep-pp-dp"]

DTYPE_BYTES: dict[str, float] = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5}


class Precision(Frozen):
    """The number format of each class of operand. FP8 block scales (one fp32 for 128 elements) are not counted."""

    compute: Dtype = "bf16"
    """Operands of the matrix products of experts and projections."""
    weights: Dtype = "bf16"
    activations: Dtype = "bf16"
    """Activations between kernels and between stages; attention runs in it."""
    kept: Dtype | None = None
    """Activations kept for the backward pass; None: as they are."""
    gradients: Dtype = "fp32"
    master_weights: Dtype | None = "fp32"
    """None: the optimizer updates the weights themselves."""
    moments: Dtype = "fp32"
    """Each of Adam's two moments."""
    dispatch: Dtype = "bf16"
    combine: Dtype = "bf16"
    cache: Dtype = "bf16"

    @property
    def kept_bytes(self) -> float:
        """Of an element that is kept for the backward pass."""
        return DTYPE_BYTES[self.kept or self.activations]


class Capacity(Frozen):
    """What happens to the tokens of an overloaded expert.

    dropless: nothing. drop: tokens beyond `factor` times the mean load are dropped. pad: also, and every expert is
    padded to that number. pad_to_max: nothing is dropped, every expert is padded to the largest load.
    """

    rule: CapacityRule = "dropless"
    factor: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @model_validator(mode="after")
    def _factor_where_it_counts(self) -> Capacity:
        needs = self.rule in ("drop", "pad")
        if needs and self.factor is None:
            raise ValueError(f"capacity rule {self.rule!r} needs a factor, such as 1.25")
        if not needs and self.factor is not None:
            raise ValueError(f"capacity factor {self.factor} has no effect under rule {self.rule!r}; remove it")
        return self


class Plan(Frozen):
    """Every decision. `dp * tp * cp * pp` GPUs hold the dense part, `edp * ep * etp * pp` the same GPUs hold the
    experts.

    `stages[v]` counts the layers of virtual stage v in model order; the embedding stands before the first of them, the
    multi-token-prediction layers, the head and the loss after the last. Sequence parallelism always goes with `tp`: it
    moves the same bytes and keeps fewer (Korthikanti et al. 2022).
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal["moeplan.plan/v1"] = Field(default="moeplan.plan/v1", alias="schema")
    dp: Degree
    tp: Degree = 1
    pp: Degree = 1
    vpp: Degree = 1
    """Chunks of the model that one pipeline rank holds (in DualPipe: the two directions)."""
    ep: Degree = 1
    etp: Degree = 1
    cp: Degree = 1
    stages: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, strict=False)
    zero_dense: ZeroStage = 1
    zero_expert: ZeroStage = 1
    micro_batch: Degree = 1
    rank_order: RankOrder = "tp-cp-ep-dp-pp"
    """Axes of the machine, the nearest first: neighbours on the first axis are neighbours in the machine."""
    recompute: Recompute = "none"
    capacity: Capacity = Capacity()
    all_to_all: str = "linear"
    overlap_degree: Annotated[int, Field(ge=1, le=64)] = 1
    """Parts into which the tokens of a layer are cut, so that one part's exchange hides behind another's experts."""
    schedule: str = "one_f_one_b"
    arbitration: Arbitration = "fair"
    overlap_gradients: bool = True
    """Reduce gradients beside the backward pass and gather parameters beside the forward pass, layer by layer."""
    precision: Precision = Precision()
    placement: Placement | None = None
    """Where experts stand; None: each once, in equal blocks over the places of a group."""

    @property
    def world_size(self) -> int:
        """GPUs that the plan uses."""
        return self.dp * self.tp * self.cp * self.pp

    @property
    def stage_size(self) -> int:
        """GPUs of one pipeline stage."""
        return self.dp * self.tp * self.cp

    @property
    def edp(self) -> int:
        """Replicas of each expert: expert-data-parallel ranks."""
        return self.stage_size // (self.ep * self.etp)

    def num_microbatches(self, global_batch: int) -> int:
        """Micro-batches that each data-parallel replica runs in one step."""
        return global_batch // (self.dp * self.micro_batch)
