"""The small plans by which a device is measured: shapes to fit, shapes held out, and exchanges of every size.

Models have a layer of experts and a dense one, so that all tasks of a step occur; each case is one job of a launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeplan import catalogue
from moeplan.domain.plan import Plan, Precision
from moeplan.domain.scenario import Scenario

_ASSUMED = {"assumed": {"cite": "chosen for a calibration"}}
_PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {**dict.fromkeys(
        ("compute", "weights", "activations", "gradients", "moments", "dispatch", "combine", "cache"), "fp32"
    ), "master_weights": None},
    "bf16": {},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model and its tokens: `size` sequences of `length` in a micro-batch, two micro-batches in a step."""

    hidden: int
    heads: int
    kv_heads: int
    width: int
    experts: int
    top_k: int
    vocab: int
    length: int
    size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A job of the calibration. `is_held_out`: nothing is fitted to it."""

    scenario: Scenario
    plan: Plan
    is_held_out: bool = False


def _shape(*numbers: int) -> Shape:
    names = ("hidden", "heads", "kv_heads", "width", "experts", "top_k", "vocab", "length", "size")
    return Shape(**dict(zip(names, numbers, strict=False)))


FITTED = (
    _shape(256, 4, 2, 512, 8, 2, 1024, 128),
    _shape(128, 4, 4, 256, 4, 2, 512, 256),
    _shape(512, 8, 4, 1024, 8, 2, 2048, 64),
    _shape(384, 6, 2, 768, 4, 1, 1024, 256, 2),
    _shape(256, 4, 4, 1024, 16, 2, 4096, 64, 2),
    _shape(192, 3, 3, 512, 8, 4, 1024, 512),
    _shape(512, 8, 8, 512, 4, 2, 1024, 128, 2),
    _shape(256, 8, 2, 384, 8, 2, 2048, 32),
)
HELD_OUT = (
    _shape(320, 5, 5, 640, 8, 2, 1536, 192),
    _shape(448, 7, 7, 896, 4, 2, 1024, 96, 2),
    _shape(256, 4, 2, 768, 8, 2, 1024, 256),
)
_SMALL, _EXCHANGED = (64, 2, 2, 64, 4, 2, 128), ((8, 1), (32, 1), (128, 1), (512, 1))
"""A narrow model, and sequences from 2 KiB of hidden states to 128 KiB; wider ones go on from there."""


def scenario_of(base: Scenario, shape: Shape, *, microbatches: int, ranks: int) -> Scenario:
    """The shape on the base's cluster, with a rank for each GPU."""
    heads = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads, "head_dim": max(16, shape.hidden // shape.heads)}
    model = {
        "hidden_size": shape.hidden, "vocab_size": shape.vocab, "dimensions": {"source": "assumed"},
        "sources": _ASSUMED,
        "parts": {
            "attention": {"kind": "attention", **heads},
            "experts": {
                "kind": "experts", "num_experts": shape.experts, "top_k": shape.top_k, "width": shape.width
            },
            "dense": {"kind": "dense", "width": shape.width},
        },
        "layers": [
            {"mixer": "attention", "feed_forward": "experts"}, {"mixer": "attention", "feed_forward": "dense"},
        ],
    }  # fmt: skip
    changes: dict[str, Any] = {
        "model": {"name": "calibration", **model}, "workload.global_batch": shape.size * microbatches,
        "workload.sequence": shape.length, "cluster.gpus_per_node": ranks, "nodes": 1,
    }  # fmt: skip
    return catalogue.load(dict(base.document), changes=changes)


def _case(base: Scenario, shape: Shape, dtype: str, degrees: Mapping[str, Any], *, is_held_out: bool = False) -> Case:
    ranks = int(degrees.get("dp", 1) * degrees.get("tp", 1) * degrees.get("pp", 1))
    scenario = scenario_of(base, shape, microbatches=2 * int(degrees.get("dp", 1)), ranks=ranks)
    precision = Precision(**_PRECISION[dtype])
    options: dict[str, Any] = {"dp": 1, "stages": (2,), "micro_batch": shape.size, "precision": precision}
    return Case(scenario=scenario, plan=Plan(**(options | dict(degrees))), is_held_out=is_held_out)


def of_one_rank(base: Scenario, *, dtype: str, quick: bool) -> Iterator[Case]:
    """Products and tasks."""
    fitted, held_out = (FITTED[::3], HELD_OUT[:1]) if quick else (FITTED, HELD_OUT)
    yield from (_case(base, shape, dtype, {}) for shape in fitted)
    yield from (_case(base, shape, dtype, {}, is_held_out=True) for shape in held_out)


def of_many_ranks(base: Scenario, ranks: int, *, quick: bool) -> Iterator[Case]:
    """Exchanges: all-to-alls with gathers and reductions of weights, all-reduces, tensor ranks, sends."""
    lengths = _EXCHANGED[::2] if quick else _EXCHANGED
    widths = (64, 256) if quick else (64, 256, 512)
    for hidden in widths:
        for length, size in lengths:
            shape = _shape(hidden, 4, 4, 64, 4, 2, 128, length, size)
            yield _case(base, shape, "fp32", {"dp": ranks, "ep": ranks})
            if length == lengths[-1][0]:
                yield _case(base, shape, "fp32", {"dp": ranks, "zero_dense": 0, "zero_expert": 0})
            yield _case(base, shape, "fp32", {"tp": ranks})
            yield _case(base, shape, "fp32", {"pp": ranks, "stages": (1,) * 2 + (0,) * (ranks - 2)})
    big = _shape(512, 8, 8, 512, 8, 2, 2048, 128, 2)
    yield _case(base, big, "fp32", {"dp": ranks})


def overlapping(base: Scenario, ranks: int) -> Iterator[Case]:
    """Exchanges beside experts, more and less of them."""
    for shape in (FITTED[0], FITTED[3], FITTED[5]):
        for parts in (1, 2, 4):
            yield _case(base, shape, "fp32", {"dp": ranks, "ep": ranks, "overlap_degree": parts})
