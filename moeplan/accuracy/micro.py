"""Records of single kernels and single exchanges: kinds microbench_gemm, microbench_attn and microbench_comm.

A kernel is priced as the planner prices it, an exchange is simulated as a plan's: the same code, the same constants.
What a record measured says how its seconds are turned into its unit:

    tflops, fwd_tflops, bwd_tflops       FLOP of the products over seconds, causal attention counted once
    latency_us, dispatch_us, combine_us  seconds
    *_gbps                               the payload that the library counts over seconds: what a GPU receives of one
                                         NVLink domain, or has for nodes, its own included (see `_counted`)

Other quantities of a record are derived from these (bus bandwidth, bytes of a product), and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from moeplan import catalogue
from moeplan.accuracy.libraries import Library, library
from moeplan.accuracy.machines import at_full_speed, machine_of
from moeplan.accuracy.prediction import Prediction, Refusal, Tier
from moeplan.accuracy.reductions import switched_s
from moeplan.cost.compute import start_s
from moeplan.cost.cost_model import CostModel
from moeplan.domain.cluster import Cluster, Gpu
from moeplan.domain.program import Exchange, Floats, Kernel
from moeplan.domain.routing import Routing
from moeplan.errors import MoeplanError
from moeplan.network.exchange import time_of
from moeplan.partition.reach import Limit, reach_LSB

Row = Mapping[str, Any]
_FP8_SCALES = 1 + 4 / 128
"""A scale in fp32 comes with 128 elements. Reference: DeepEP, tests/test_intranode.py."""
_ELEMENT_BYTES = {"BF16": 2.0, "BFLOAT16": 2.0, "FP8": _FP8_SCALES, "NVFP4": 0.5 + 1 / 16}
"""With the scales: NVFP4 has one in fp8 for 16 elements."""
_EXPERTS, _TOKENS = 256, 4096
"""DeepSeek-V3's, and those of a rank in DeepEP's tests, where a record does not say."""
_MEGATRON, _DEEPSEEK = "Megatron-Core MoE technical report", Limit(8, 4)
"""Its exchanges are DeepSeek-V3's, whose router picks experts of 4 of 8 groups: without that the table's bytes would be
more than NVLink and cards can carry.
"""
_NEVER = "0.01 ns"
"""The least time that a figure can have."""
_LIBRARIES = {"nccl": "nccl", "NVLink": "trtllm-nvlink", "hybridep": "hybridep", "deepep-v2": "hybridep"}
"""By a word of the backend, or of the record's name; others are DeepEP's normal kernels."""


def predict(record: Row) -> Prediction | Refusal:
    """The measured quantities of one record, predicted; or why not."""
    try:
        values, guessed = _KINDS[record["kind"]](record["shape"], record)
    except MoeplanError as error:
        return Refusal(f"{error}")
    if not values:
        return Refusal(f"shape: {record['shape'].get('op')} without its sizes is a best case; give rows, or tokens")
    return Prediction(values=values, tier=_tier(record), guessed=guessed)


_Found = tuple[dict[str, float], tuple[str, ...]]


def _tier(record: Row) -> Tier:
    """DeepGEMM, DeepEP and NCCL entered the figures of their own sheets; a machine without any is assumed."""
    gpu = str(record["hardware"].get("gpu"))
    return "interpolated" if any(word in gpu for word in ("A100", "H100", "H200", "B200", "B300")) else "extrapolated"


def _gpu(record: Row) -> Gpu:
    """The GPU at the speed that it has for the moment of a benchmark."""
    return at_full_speed(_cluster(record).gpu)


def _cluster(record: Row, **changes: object) -> Cluster:
    topology, known = _machine(json.dumps(record["hardware"], sort_keys=True))
    return _built(topology, tuple(sorted((known | changes).items())))


@lru_cache(maxsize=256)
def _machine(hardware: str) -> tuple[str, dict[str, object]]:
    return machine_of(json.loads(hardware))


@lru_cache(maxsize=256)
def _built(topology: str, changes: tuple[tuple[str, object], ...]) -> Cluster:
    given = dict(changes)
    nodes = given.pop("nodes", None)
    return catalogue.cluster_from(topology, nodes=None if nodes is None else int(str(nodes)), changes=given)


# ---- kernels


def _products(shape: Row, record: Row) -> _Found:
    """A dense or grouped product in fp8 with results in bf16; operands and result pass memory once."""
    groups = int(shape.get("groups") or 1)
    rows = float(shape.get("m") or 0) or float(shape.get("m_per_group") or 0) * groups
    columns, depth = float(shape.get("n") or 0), float(shape.get("k") or 0)
    flops = 2 * rows * columns * depth
    is_grouped = str(shape["op"]).startswith("grouped")
    kernel = Kernel(
        name=str(shape["op"]), kind="grouped_gemm" if is_grouped else "gemm", dtype="fp8", flops=flops,
        size_bytes=(rows * depth + groups * columns * depth) * _FP8_SCALES + 2 * rows * columns,
        rows=rows, columns=columns, depth=depth, rows_per_expert=(rows / groups,) * groups if is_grouped else (),
    )  # fmt: skip
    return ({"tflops": _tflops(kernel, record, is_profiled=True)} if flops else {}), ()


def _attention(shape: Row, record: Row) -> _Found:
    """One causal sequence of latent attention; backward 2.5 times the FLOP, operands and gradients through memory."""
    if not shape.get("seq"):
        return {}, ()
    length, heads = float(shape["seq"]), float(shape["heads"])
    wide = float(shape["qk_dim"] + shape["v_dim"])
    forward = Kernel(
        name="attention", kind="attention", dtype="bf16", flops=2 * heads * wide * length * (length + 1) / 2,
        size_bytes=2 * 2 * length * heads * wide, rows=length * heads, depth=wide / 2,
    )  # fmt: skip
    backward = replace(forward, flops=2.5 * forward.flops, size_bytes=2.0 * forward.size_bytes, is_backward=True)
    return {"fwd_tflops": _tflops(forward, record), "bwd_tflops": _tflops(backward, record)}, ("one sequence",)


def _tflops(kernel: Kernel, record: Row, *, is_profiled: bool = False) -> float:
    """`is_profiled`: the seconds of a profiler, as DeepGEMM's tests take them, begin with the kernel's first block."""
    gpu = _gpu(record)
    return kernel.flops / (CostModel(gpu=gpu).kernel_s(kernel) - is_profiled * start_s(kernel, gpu)) / 1e12


# ---- exchanges


def _exchanges(shape: Row, record: Row) -> _Found:
    return _moe(shape, record) if str(shape["op"]).startswith("moe_") else _collective(shape, record)


def _collective(shape: Row, record: Row) -> _Found:
    """NCCL's collective of `bytes`: in one node rings, sums in the switches, and sends of all to all."""
    operation = str(shape["op"]).replace("alltoall", "all_to_all")
    exchange = Exchange(
        kind=operation, operation=operation, algorithm="linear" if operation == "all_to_all" else "ring",
        groups_NG=np.arange(int(shape["gpus"]))[None], size_bytes=float(shape["bytes"]),
    )  # fmt: skip
    cluster = _cluster(record)
    seconds = time_of(exchange, cluster).time_s
    if operation == "all_reduce":
        seconds = min(seconds, switched_s(cluster, ranks=int(shape["gpus"]), size_bytes=float(shape["bytes"])))
    return {"latency_us": seconds * 1e6}, ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """One dispatch or combine: `kind`, its library, SMs, ranks and nodes, tokens of a rank, bytes of a token."""

    kind: str
    library: Library
    sms: float
    ep: int
    local: int
    """Ranks of an NVLink domain."""
    tokens: int
    token_bytes: float
    experts: int
    top_k: int
    limit: Limit
    copies: bool
    """Whether each choice is sent, else each rank gets a token once."""
    only_nics: bool = False
    """Whether cards carry what stays in a machine, too: low-latency kernels before June 2025, GPUs without NVLink."""

    @property
    def size_bytes(self) -> float:
        """Of a rank's tokens, once."""
        return self.tokens * self.token_bytes

    def reach_B(self, blocks: int) -> Floats:
        """(B,) part of a rank's tokens with a choice in each of so many equal blocks of the experts."""
        shape = (1, 1, self.experts)
        routing = Routing(
            tokens_per_source=self.tokens, top_k=self.top_k,
            tokens_LSE=np.full(shape, self.tokens * self.top_k / self.experts),
        )  # fmt: skip
        block_E = np.arange(self.experts) * blocks // self.experts
        return np.asarray(reach_LSB(routing, block_E, self.limit)[0, 0] / self.tokens)

    @property
    def received(self) -> float:
        """Copies of a token that all ranks get together, its own included."""
        return float(self.top_k) if self.copies else float(self.reach_B(self.ep).sum())


def _moe(shape: Row, record: Row) -> _Found:
    values, guessed = {}, _guessed(shape)
    for key, kind, payload in _quantities(shape, record["measured"]):
        asked = _asked(shape, record, kind=kind, payload=payload)
        seconds = _seconds(asked, record, is_call=key.startswith("api_"))
        values[key] = seconds * 1e6 if key.endswith("_us") else _counted_bytes(asked) / seconds / 1e9
    return values, guessed


def _quantities(shape: Row, measured: Row) -> Iterator[tuple[str, str, str]]:
    """Name, kind and number format of each measured quantity that is not derived from another."""
    op, stated = str(shape["op"]), str(shape.get("payload") or shape.get("dtype") or "BF16")
    for key, value in measured.items():
        if key in _DERIVED or value is None:
            continue
        kind = "combine" if "combine" in key or op == "moe_combine" else "dispatch"
        is_fp8 = "fp8" in key or (key == "dispatch_us" and "deepep" in str(shape.get("backend")))
        yield key, kind, "BF16" if kind == "combine" else "FP8" if is_fp8 else "BF16" if "bf16" in key else stated


_DERIVED = ("bottleneck", "busbw_gbps", "memory_gbps", "rdma_gbps")


def _guessed(shape: Row) -> tuple[str, ...]:
    stated = shape.get("experts") or shape.get("experts_per_rank")
    missing = {"experts": stated, "sms": shape.get("sms"), "tokens_per_rank": shape.get("tokens_per_rank")}
    assumed = {"experts": f"{_EXPERTS}", "sms": "the library's own", "tokens_per_rank": f"{_TOKENS}"}
    return tuple(f"{key} {assumed[key]}" for key, value in missing.items() if value is None)


def _asked(shape: Row, record: Row, *, kind: str, payload: str) -> _Asked:
    found, hardware = _library(shape, record), record["hardware"]
    ep = int(shape.get("ep") or hardware["count"])
    experts = int(shape.get("experts") or ep * int(shape.get("experts_per_rank") or 0) or _EXPERTS)
    machine = _cluster(record)
    local = min(ep, machine.gpus_per_node)
    limit = Limit()
    if shape.get("top_k_groups"):
        limit = Limit(ep // local, min(ep // local, int(shape["top_k_groups"])))
    elif record["source"].get("name") == _MEGATRON:
        limit = _DEEPSEEK
    return _Asked(
        kind=kind, library=found, sms=float(shape.get("sms") or found.sms), ep=ep, local=local,
        tokens=int(shape.get("tokens_per_rank") or shape.get("tokens") or _TOKENS),
        token_bytes=shape["hidden"] * _ELEMENT_BYTES[payload.upper()], experts=experts, top_k=int(shape["top_k"]),
        limit=limit, copies=found.name in ("nccl", "deepep-ll"),
        only_nics="PCIe" in str(hardware["gpu"]) or (found.name == "deepep-ll" and "-2025-02-" in record["id"]),
    )  # fmt: skip


def _library(shape: Row, record: Row) -> Library:
    if shape.get("mode") == "low latency":
        return library("deepep-ll")
    backend = str(shape.get("backend") or record["id"])
    return library(next((name for word, name in _LIBRARIES.items() if word in backend), "deepep"))


def _seconds(asked: _Asked, record: Row, *, is_call: bool) -> float:
    """The exchange, simulated on the machine with the links that the library makes of it."""
    lib, cluster = asked.library, _used(asked, record)
    share_G = np.full(asked.ep, asked.top_k / asked.ep) if asked.copies else asked.reach_B(asked.ep)
    share_GG = np.tile(share_G, (asked.ep, 1))
    is_once = cluster.num_nodes > 1 and not asked.copies and cluster.gpus_per_node > 1
    exchange = Exchange(
        kind=asked.kind, operation="all_to_all", algorithm="node_dedup" if is_once else "linear",
        groups_NG=np.arange(asked.ep)[None], size_bytes=asked.size_bytes, share_GG=share_GG,
        reach_GB=np.tile(asked.reach_B(cluster.num_nodes), (asked.ep, 1)) if is_once else None,
    )  # fmt: skip
    seconds = time_of(exchange, cluster).time_s + (lib.combine_start_s if asked.kind == "combine" else lib.start_s)
    if is_call and lib.call_s:
        seconds += lib.call_s + asked.received * asked.size_bytes / cluster.gpu.copy_bytes_per_s
    return seconds


def _used(asked: _Asked, record: Row) -> Cluster:
    """The machine as the library uses it. SMs also copy what a GPU has for itself, which no link carries."""
    lib, plain, changes = asked.library, _cluster(record), dict[str, object]()
    if lib.name != "nccl":
        changes |= {"cluster.gpu.exchange_start": _NEVER}
    if asked.only_nics:
        changes |= {"nodes": asked.ep, "cluster.gpus_per_node": 1, "cluster.nic.per_node": 1}
    if plain.num_nodes > 1 or asked.only_nics:
        changes |= {"cluster.nic.message_overhead": _NEVER, "cluster.nic.message_gap": _NEVER}
        if lib.nic_efficiency:
            changes["cluster.nic.efficiency"] = f"{100 * lib.nic_efficiency:g} %"
    link = plain.spec.links.get("nvlink")
    if link is not None:
        share = lib.link_efficiency or link.efficiency
        most = lib.bytes_per_s(asked.sms, token_bytes=asked.token_bytes, kind=asked.kind, is_far=asked.ep > asked.local)
        if most is not None:
            share = min(share, most * (1 - 1 / asked.ep) / link.bandwidth_bytes_per_s)
        changes["cluster.links.nvlink.efficiency"] = f"{100 * share:.6g} %"
    return _cluster(record, **changes)


def _counted_bytes(asked: _Asked) -> float:
    """What the library divides by seconds: copies of tokens that come to a GPU, over cards those for each node once.

    A GPU's and a node's own are counted, as in DeepEP's tests/test_intranode.py and test_internode.py.
    """
    is_by_node = asked.ep > asked.local and not asked.only_nics
    return asked.size_bytes * float(asked.reach_B(asked.ep // asked.local if is_by_node else asked.ep).sum())


_KINDS = {"microbench_gemm": _products, "microbench_attn": _attention, "microbench_comm": _exchanges}
