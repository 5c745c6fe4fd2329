"""What a topology file says, in SI numbers: the accelerator, the wires of a node, the cards and the fabric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from moeplan.domain._frozen import Frozen
from moeplan.domain.fabric import FabricSpec
from moeplan.domain.measured import Measured
from moeplan.domain.wiring import Count, LinkSpec, NicSpec, NotNegative, Positive, Share, WireSpec, Wiring, wire_node
from moeplan.errors import unknown_name

Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp4"]
Place = Literal["link", "nic", "rail", "switch", "node"]
_PLACES: tuple[Place, ...] = ("link", "nic", "rail", "switch", "node")
_PLACE_EXAMPLES = "{link: n0.gpu3 -> n0.nvswitch}, {nic: n0.nic3}, {rail: 3}"


@checked_dataclass(
    frozen=True, kw_only=True, slots=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
)
class Gpu:
    """One accelerator. Peaks are dense; efficiencies are the share of the peak that large kernels reach.

    `gemm_efficiency` is that of 16-bit and wider formats, and of the others where they have none of their own.
    """

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
    fp8_gemm_efficiency: Share | None = None
    fp4_gemm_efficiency: Share | None = None
    attention_backward_efficiency: Share | None = None
    """None: as forward."""
    sustained_efficiency: Share = 1.0
    """Speed of matrix products in a step that goes on for minutes, over their speed alone: clocks fall to what
    the power limit allows, and operands are cast, scaled and laid out."""
    sustained_fp8_efficiency: Share | None = None
    sustained_fp4_efficiency: Share | None = None
    """None: as in 16 bits."""
    kernel_start_s: NotNegative = 0.0
    """Of every kernel, on the device: until the first bytes are there, and after the last."""
    scaled_start_s: NotNegative = 0.0
    """More of every matrix product whose operands have a scale for each block: fp8 and fp4."""
    tile_start_s: NotNegative = 0.0
    """Of every tile of a matrix product, whatever its depth: the first operands in, the result out."""
    attention_block_s: NotNegative = 0.0
    """Of every block of queries, however many keys it sees: queries in, keys that are masked, the result out."""
    exchange_start_s: NotNegative = 0.0
    """Of every exchange: its kernel starts on all its GPUs, which wait for one another."""
    compute_share_beside_exchange: Share = 1.0
    """Speed of kernels while an exchange of the GPU moves, over their speed alone: it takes SMs and bandwidth."""
    exchange_share_beside_compute: Share = 1.0
    """Rate of a flow while a GPU at one of its ends computes, over its fair rate."""
    measured: Measured | None = None
    """What was measured of it in real steps."""

    @property
    def copy_bytes_per_s(self) -> float:
        """What is copied inside the GPU's memory: each byte is read and written."""
        return self.memory_bandwidth_bytes_per_s * self.memory_efficiency / 2

    def __post_init__(self) -> None:
        if self.usable_memory_bytes > self.memory_bytes:
            raise ValueError(
                f"{self.name}: usable_memory {self.usable_memory_bytes:g} B exceeds memory {self.memory_bytes:g} B"
            )
        if not self.peak_flops_per_s:
            raise ValueError(f"{self.name}: no peak is given; state at least one of peak_fp32, peak_bf16, ...")


class FaultSpec(Frozen):
    """What is left of the bandwidth of one part, in both directions; nothing, if no capacity is given.

    Exactly one of the five says which part. Names are those of `Cluster.link_name`, numbers those before any node is
    lost; `n*`, `n0-3` and `nic*` stand for several.
    link: a wire or a link of the fabric, as in n0.gpu3 -> n0.nvswitch, leaf0.3 -> spine.
    nic: a NIC's port, as in n0.nic3. GPUs of a dead NIC use the nearest one that works.
    rail: all NICs of a rail, and the uplinks of its leaves.
    switch: all links of a leaf, spine or router, or of a switch in a node, as in leaf0.3, router0.5, n0.nvswitch.
    node: a node that is lost, as in 7 or 4-7. The others close ranks, and keep their places in the fabric.
    """

    link: str | None = None
    nic: str | None = None
    rail: int | str | None = None
    switch: str | None = None
    node: int | str | None = None
    capacity: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _means_one_part(self) -> FaultSpec:
        _check_one_place(self, _PLACES)
        if self.capacity == 1:
            raise ValueError("capacity 100 % has no effect; use less, or remove the fault")
        if self.node is not None and self.capacity:
            raise ValueError(
                f"node {self.node} is lost or it is not; remove capacity, or name its cards: {{nic: n{self.node}.nic*}}"
            )
        return self


class SpeedSpec(Frozen):
    """The bandwidth or latency of one part that is built otherwise than the rest; the efficiency is its kind's.

    The places are those of a fault. The uplinks of a leaf are as wide as its NICs are together, these included. A node
    chooses its paths by its kinds of wire, whatever the speeds of single wires.
    """

    link: str | None = None
    nic: str | None = None
    rail: int | str | None = None
    bandwidth_bytes_per_s: Positive | None = None
    latency_s: NotNegative | None = None

    @model_validator(mode="after")
    def _means_one_part(self) -> SpeedSpec:
        _check_one_place(self, _PLACES[:3])
        if self.bandwidth_bytes_per_s is None and self.latency_s is None:
            raise ValueError("has no effect without bandwidth or latency; add one of them")
        return self


def _check_one_place(spec: FaultSpec | SpeedSpec, places: Sequence[Place]) -> None:
    given = [place for place in places if getattr(spec, place) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "no place"
        raise ValueError(f"has {found}; give exactly one of {', '.join(places)}, as in {_PLACE_EXAMPLES}")


def place_of(spec: FaultSpec | SpeedSpec) -> tuple[Place, str]:
    """Which part a fault or speed names."""
    place = next(place for place in _PLACES if getattr(spec, place, None) is not None)
    return place, str(getattr(spec, place))


class ClusterSpec(Frozen):
    """The SI form of a topology file. Links and wires describe one node; all are alike but for `speeds` and `faults`.

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
    speeds: tuple[SpeedSpec, ...] = Field(default=(), strict=False, max_length=1024)
    faults: tuple[FaultSpec, ...] = Field(default=(), strict=False, max_length=1024)

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
            self._check_fabric_links()
            self.wire_node()
        return self

    @property
    def is_torus(self) -> bool:
        """Whether the GPUs are wired to one another over all nodes."""
        return self.fabric is not None and self.fabric.kind == "torus"

    @property
    def node_links(self) -> Mapping[str, LinkSpec]:
        """The kinds of link that may be in a node: all but those that only the fabric uses."""
        wired = {wire.link for wire in self.wiring}
        return {name: link for name, link in self.links.items() if name in wired or name not in self._fabric_links}

    def wire_node(self) -> Wiring:
        """The links and paths of one node."""
        latency_s = self.fabric.latency_s if self.fabric else 0.0
        return wire_node(
            self.wiring, self.node_links, num_gpus=self.gpus_per_node, nic=self.nic, fabric_latency_s=latency_s
        )

    @property
    def _fabric_links(self) -> dict[str, str]:
        """The kinds of link that the fabric uses, and the field that says so."""
        fields = ("link", "global_link") if self.fabric else ()
        return {name: field for field in fields if (name := getattr(self.fabric, field)) is not None}

    def _check_fabric_links(self) -> None:
        for name, key in self._fabric_links.items():
            if name not in self.links:
                raise ValueError(f"fabric.{key}: {unknown_name('link', name, self.links)}")
        if self.fabric is not None and self.fabric.kind == "dragonfly":
            groups, ports = self.fabric.num_groups(self.nodes), self.fabric.ports_per_group
            if groups - 1 > ports:
                raise ValueError(
                    f"fabric: each of {groups} groups needs {groups - 1} global links, but has {ports}; raise "
                    "global_links_per_router or routers_per_group, or use fewer nodes"
                )

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
