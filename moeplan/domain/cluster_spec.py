"""What a topology file says, in SI numbers: the accelerator, the wires of a node, the cards and the fabric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from moeplan.domain._frozen import Frozen
from moeplan.domain.fabric import FabricSpec
from moeplan.domain.wiring import Count, LinkSpec, NicSpec, NotNegative, Positive, Share, WireSpec, Wiring, wire_node
from moeplan.errors import unknown_name

Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp4"]


@checked_dataclass(
    frozen=True, kw_only=True, slots=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
)
class Gpu:
    """One accelerator. Peaks are dense; efficiencies are the share of the peak that large kernels reach."""

    name: str
    memory_bytes: Positive
    usable_memory_bytes: Positive
    """What is left for tensors after the context, communication buffers and fragmentation."""
    memory_bandwidth_bytes_per_s: Positive
    peak_flops_per_s: Mapping[Dtype, Positive] = field(hash=False)
    num_sms: Count
    l2_cache_bytes: Positive
    tdp_w: Positive
    kernel_launch_s: NotNegative
    gemm_efficiency: Share
    grouped_gemm_efficiency: Share
    attention_efficiency: Share
    memory_efficiency: Share

    def __post_init__(self) -> None:
        if self.usable_memory_bytes > self.memory_bytes:
            raise ValueError(
                f"{self.name}: usable_memory {self.usable_memory_bytes:g} B exceeds memory {self.memory_bytes:g} B"
            )
        if not self.peak_flops_per_s:
            raise ValueError(f"{self.name}: no peak is given; state at least one of peak_fp32, peak_bf16, ...")


class ClusterSpec(Frozen):
    """The SI form of a topology file. Links and wires describe one node, all nodes are alike.

    A torus has no wires and no NICs: its GPUs are wired to one another. Several nodes need a fabric, and NICs unless it
    is a torus. Raises ValueError (in pydantic's ValidationError) with what was found and what would do.
    """

    name: str
    gpu: Gpu
    nodes: Count
    gpus_per_node: Annotated[int, Field(ge=1, le=1024)]
    links: Mapping[str, LinkSpec] = Field(default_factory=dict)
    wiring: tuple[WireSpec, ...] = Field(default=(), strict=False)
    nic: NicSpec | None = None
    fabric: FabricSpec | None = None

    def __hash__(self) -> int:
        return hash((self.name, self.gpu, self.nodes, self.gpus_per_node))

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterSpec:
        for taken in ("nic", "leaf"):
            if taken in self.links:
                raise ValueError(
                    f"links: {taken!r} is what the fabric's own links are called; use pcie or another name"
                )
        if self.is_torus:
            self._check_torus()
        else:
            self._check_nodes()
            self.wire_node()
        return self

    @property
    def is_torus(self) -> bool:
        """Whether the GPUs are wired to one another over all nodes."""
        return self.fabric is not None and self.fabric.kind == "torus"

    def wire_node(self) -> Wiring:
        """The links and paths of one node."""
        latency_s = self.fabric.latency_s if self.fabric else 0.0
        return wire_node(self.wiring, self.links, num_gpus=self.gpus_per_node, nic=self.nic, fabric_latency_s=latency_s)

    def _check_nodes(self) -> None:
        if self.nodes > 1 and self.nic is None:
            raise ValueError(
                f"{self.nodes} nodes need a nic section (per_node, bandwidth, ...); add one, or set nodes to 1"
            )
        if self.nodes > 1 and self.fabric is None:
            raise ValueError(
                f"{self.nodes} nodes need a fabric; add one, such as {{kind: single_switch}}, or set nodes to 1"
            )

    def _check_torus(self) -> None:
        assert self.fabric is not None
        assert self.fabric.shape is not None
        assert self.fabric.link is not None
        for part in ("wiring", "nic"):
            if getattr(self, part):
                raise ValueError(f"{part} has no effect on a torus, whose GPUs are wired to one another; remove it")
        if self.fabric.link not in self.links:
            raise ValueError(f"fabric.link: {unknown_name('link', self.fabric.link, self.links)}")
        unused = sorted(set(self.links) - {self.fabric.link})
        if unused:
            raise ValueError(
                f"links: {unused[0]!r} has no effect, because the torus is made of {self.fabric.link}; remove it"
            )
        if math.prod(self.fabric.shape) != self.nodes * self.gpus_per_node:
            shape = " x ".join(map(str, self.fabric.shape))
            raise ValueError(
                f"fabric.shape: {shape} is {math.prod(self.fabric.shape)} GPUs, but {self.nodes} nodes of "
                f"{self.gpus_per_node} are {self.nodes * self.gpus_per_node}; change the shape and the nodes together"
            )
