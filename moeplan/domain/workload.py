"""What one step is asked to do: train on a batch, prefill prompts, or decode one token for each sequence."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moeplan.domain._frozen import Frozen

Count = Annotated[int, Field(ge=1, le=10**12)]
Phase = Literal["train", "prefill", "decode"]


class Workload(Frozen):
    """One step of `global_batch` sequences.

    train: forward, backward, optimizer over `sequence` tokens each. prefill: forward over `sequence` prompt tokens that
    fill the cache. decode: forward over one new token each, against `sequence` tokens that are already in the cache.
    """

    phase: Phase = "train"
    global_batch: Count
    sequence: Count
    train_mtp: bool = True
    """Whether the model's multi-token-prediction layers are trained; without effect, and refused, elsewhere."""

    @model_validator(mode="after")
    def _mtp_only_in_training(self) -> Workload:
        if self.phase != "train" and "train_mtp" in self.model_fields_set:
            raise ValueError(f"train_mtp has no effect in phase {self.phase!r}; remove it")
        return self

    @property
    def is_training(self) -> bool:
        """Whether there is a backward pass."""
        return self.phase == "train"

    @property
    def query_length(self) -> int:
        """Tokens of one sequence that pass through the layers in one step."""
        return 1 if self.phase == "decode" else self.sequence

    @property
    def step_tokens(self) -> int:
        """Tokens of the whole batch that pass through the layers in one step."""
        return self.global_batch * self.query_length
