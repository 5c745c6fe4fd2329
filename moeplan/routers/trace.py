"""A recorded routing from a file, scaled to the workload: counts in .npz or JSON lines, or Megatron's router trace.

.npz, counts: [layer, expert], [step, layer, expert] or [step, layer, source, expert]. .npz, expert_ids: [token, layer,
pick]. JSON lines of counts: {"layer": 0, "counts": [...]}, and "step" and "source" where there are several. JSON lines
of Megatron's --moe-routing-trace-path: {"step", "block", "layer", "rank", "topk", "top_indices"}, one file of one rank.
Files that hold the choices of each token (expert_ids, top_indices) also say which experts go together.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.domain.routing import Routing, TokenSets
from moeplan.routers._laws import check_top_k
from moeplan.routers._trace_files import existing_file, read_jsonl, read_npz, refuse

Floats = npt.NDArray[np.float64]
Holds = Literal["counts", "expert_ids"]
_Key = tuple[str, int, int]
_Ids = npt.NDArray[np.int32]


class _Recorded(NamedTuple):
    """What a file holds: counts, and where it has them the choices of the tokens of each layer and source."""

    counts_LSE: Floats
    ids_LS: list[list[_Ids]] | None


def route(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sources: int,
    tokens_per_source: int,
    rng: np.random.Generator,
    path: str,
    array: str | None = None,
    holds: Holds = "counts",
    step: int | None = None,
) -> Routing:
    """Expected counts in the proportions of the file, fractions included; draws nothing.

    `array` names an array of an .npz file that holds several, `holds` says what is in it, `step` picks one step (all
    steps are added up otherwise). If the file tells as many sources apart as there are, each keeps its own proportions;
    otherwise all are alike. Raises CatalogueError that says where, what was found, what is allowed and what would do.
    """
    check_top_k(num_experts, top_k)
    file = existing_file(path)
    if holds not in ("counts", "expert_ids"):
        raise refuse(file, "holds", repr(holds), allowed="counts or expert_ids", remedy="use counts")
    shape = (num_layers, num_experts)
    if file.suffix == ".npz":
        found = _from_npz(file, read_npz(file, array), shape=shape, top_k=top_k, holds=holds, step=step)
    else:
        _refuse_npz_options(file, array, holds)
        found = _from_jsonl(file, shape=shape, top_k=top_k, step=step)
    tokens_LSE = _scaled(file, found.counts_LSE, top_k=top_k, num_sources=num_sources) * tokens_per_source
    sets_LS = None if found.ids_LS is None else _sets(found.ids_LS, num_sources)
    return Routing(tokens_per_source=tokens_per_source, top_k=top_k, tokens_LSE=tokens_LSE, sets_LS=sets_LS)


def _sets(ids_LS: list[list[_Ids]], num_sources: int) -> tuple[tuple[TokenSets, ...], ...]:
    """Of each source if the file tells as many apart, else of all together."""
    return tuple(
        tuple(TokenSets.of(ids) for ids in (ids_S if len(ids_S) == num_sources else [np.concatenate(ids_S)]))
        for ids_S in ids_LS
    )


def _refuse_npz_options(file: Path, array: str | None, holds: Holds) -> None:
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise refuse(
            file, "path", f"'{file.suffix}'", allowed=".npz, .jsonl or .jsonl.gz", remedy="rename or convert it"
        )
    if array is not None:
        raise refuse(file, "array", repr(array), allowed="of effect on JSON lines", remedy="remove it")
    if holds != "counts":
        raise refuse(file, "holds", repr(holds), allowed="of effect on JSON lines", remedy="remove it")


def _from_npz(
    file: Path, found: npt.NDArray[Any], *, shape: tuple[int, int], top_k: int, holds: Holds, step: int | None
) -> _Recorded:
    if holds == "expert_ids":
        if step is not None:
            raise refuse(file, "step", step, allowed="of effect on expert_ids, which have no steps", remedy="remove it")
        return _count_ids(file, found, shape=shape, top_k=top_k)
    if found.ndim not in (2, 3, 4):
        allowed = "[layer, expert], [step, layer, expert] or [step, layer, source, expert]"
        raise refuse(file, "array", f"shape {found.shape}", allowed=allowed, remedy="reshape it, or set holds")
    counts_TLSE = found if found.ndim == 4 else found.reshape(-1, found.shape[-2], 1, found.shape[-1])
    num_steps = len(counts_TLSE)
    _check_shape(file, (counts_TLSE.shape[1], counts_TLSE.shape[3]), shape)
    _check_counts(file, "array", counts_TLSE)
    if step is None:
        return _Recorded(np.asarray(counts_TLSE.sum(axis=0, dtype=np.float64)), None)
    if not 0 <= step < num_steps:
        raise refuse(file, "step", step, allowed=f"0 to {num_steps - 1}", remedy="leave it out to add all steps up")
    return _Recorded(np.asarray(counts_TLSE[step], dtype=np.float64), None)


def _count_ids(file: Path, ids_NLK: npt.NDArray[Any], *, shape: tuple[int, int], top_k: int) -> _Recorded:
    if ids_NLK.ndim != 3 or ids_NLK.shape[2] != top_k:
        allowed = f"[token, layer, {top_k}]"
        raise refuse(file, "array", f"shape {ids_NLK.shape}", allowed=allowed, remedy="set holds or the model's top_k")
    _check_shape(file, (ids_NLK.shape[1], shape[1]), shape)
    _check_ids(file, "array", ids_NLK, num_experts=shape[1])
    counts_LE = [np.bincount(ids_NLK[:, layer].ravel(), minlength=shape[1]) for layer in range(shape[0])]
    ids_LS = [[ids_NLK[:, layer].astype(np.int32)] for layer in range(shape[0])]
    return _Recorded(np.array(counts_LE, dtype=np.float64)[:, None, :], ids_LS)


def _from_jsonl(file: Path, *, shape: tuple[int, int], top_k: int, step: int | None) -> _Recorded:
    """Counts added up over steps; layers in the order of their numbers, prediction layers after the others."""
    totals: dict[_Key, dict[int, Floats]] = defaultdict(dict)
    ids: dict[tuple[_Key, int], list[_Ids]] = defaultdict(list)
    for place, record in read_jsonl(file):
        key, source, found_step = _key(file, place, record)
        counts_E, ids_NK = _counts(file, place, record, num_experts=shape[1], top_k=top_k)
        if step in (None, found_step):
            totals[key][source] = totals[key].get(source, 0.0) + counts_E
            ids[key, source].append(ids_NK)
    if not totals:
        raise refuse(file, "step", step, allowed="in the file", remedy="leave it out to add all steps up")
    decoder = {key: sources for key, sources in totals.items() if key[0] != "mtp"}
    layers = decoder if len(decoder) == shape[0] else totals
    _check_shape(file, (len(layers), shape[1]), shape)
    sources = sorted({source for found in layers.values() for source in found})
    nothing = np.zeros(shape[1])
    counts_LSE = np.array([[layers[key].get(source, nothing) for source in sources] for key in sorted(layers)])
    if not all(len(part) for parts in ids.values() for part in parts):
        return _Recorded(counts_LSE, None)
    none = [np.zeros((0, top_k), np.int32)]
    ids_LS = [[np.concatenate(ids.get((key, source), none)) for source in sources] for key in sorted(layers)]
    return _Recorded(counts_LSE, ids_LS)


def _key(file: Path, place: str, record: dict[str, Any]) -> tuple[_Key, int, int]:
    numbers = {"layer": -1, "step": 0, "source": 0, "rank": 0, "mtp_idx": 0} | {
        name: record[name] for name in ("layer", "step", "source", "rank", "mtp_idx") if name in record
    }
    for name, number in numbers.items():
        if type(number) is not int or not 0 <= number < 2**31:
            found = "nothing" if number == -1 else repr(number)[:40]
            raise refuse(file, f"{place}: {name}", found, allowed="a whole number, 0 or more", remedy="set it")
    block = record.get("block", "decoder")
    if block not in ("decoder", "mtp"):
        raise refuse(file, f"{place}: block", repr(block)[:40], allowed="decoder or mtp", remedy="remove other blocks")
    source = numbers["source"] if "source" in record else numbers["rank"]
    return (block, numbers["mtp_idx"], numbers["layer"]), source, numbers["step"]


def _counts(file: Path, place: str, record: dict[str, Any], *, num_experts: int, top_k: int) -> tuple[Floats, _Ids]:
    """Of a record, and the choices of its tokens: none if it has counts alone."""
    if ("counts" in record) == ("top_indices" in record):
        raise refuse(file, place, "it", allowed="a record of either counts or top_indices", remedy="use one of the two")
    field = f"{place}: counts" if "counts" in record else f"{place}: top_indices"
    found = _array(file, field, record.get("counts", record.get("top_indices")))
    if "counts" in record:
        if found.shape != (num_experts,):
            raise refuse(file, field, f"shape {found.shape}", allowed=f"{num_experts} numbers", remedy="fix the model")
        _check_counts(file, field, found)
        return found.astype(np.float64), np.zeros((0, top_k), np.int32)
    if found.ndim != 2 or found.shape[1] != top_k:
        allowed = f"[tokens, top_k {top_k}]"
        raise refuse(file, field, f"shape {found.shape}", allowed=allowed, remedy="use the model that was traced")
    if (stated := record.get("num_tokens", len(found))) != len(found):
        allowed = f"{len(found)}, the rows of top_indices"
        raise refuse(file, f"{place}: num_tokens", repr(stated)[:40], allowed=allowed, remedy="record it again")
    _check_ids(file, field, found, num_experts=num_experts)
    return np.bincount(found.ravel(), minlength=num_experts).astype(np.float64), found.astype(np.int32)


def _array(file: Path, field: str, found: object) -> npt.NDArray[Any]:
    try:
        return np.asarray(found)
    except ValueError as error:
        raise refuse(file, field, "it", allowed="a list, or rows of one length", remedy="record it again") from error


def _check_shape(file: Path, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    for name, has, want in zip(("layers", "experts"), found, wanted, strict=True):
        if has != want:
            raise refuse(file, name, has, allowed=f"the {want} of the model", remedy="use a trace of this model")


def _check_counts(file: Path, field: str, found: npt.NDArray[Any]) -> None:
    if found.dtype.kind not in "iuf" or not np.isfinite(found).all() or found.min() < 0 or found.max() > 2**53:
        raise refuse(file, field, "a count", allowed="a finite number from 0 to 2**53", remedy="count tokens again")


def _check_ids(file: Path, field: str, found: npt.NDArray[Any], *, num_experts: int) -> None:
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= num_experts:
        allowed = f"a whole number from 0 to {num_experts - 1}"
        raise refuse(file, field, "an expert id", allowed=allowed, remedy="use the model that was traced")


def _scaled(file: Path, counts_LSE: Floats, *, top_k: int, num_sources: int) -> Floats:
    """Copies per token: rows that sum to `top_k`, none of their numbers above 1."""
    if counts_LSE.shape[1] != num_sources:
        counts_LSE = np.repeat(counts_LSE.sum(axis=1, keepdims=True), num_sources, axis=1)
    total_LS1 = counts_LSE.sum(axis=2, keepdims=True)
    if (total_LS1 == 0).any():
        layer, source = np.argwhere(total_LS1[:, :, 0] == 0)[0]
        field = f"layer {layer}, source {source}"
        raise refuse(file, field, "no tokens at all", allowed="a load", remedy="record every layer on every source")
    copies_LSE = top_k * counts_LSE / total_LS1
    if copies_LSE.max() > 1 + 1e-9:
        layer, _, expert = np.unravel_index(copies_LSE.argmax(), copies_LSE.shape)
        found = f"a share of {copies_LSE.max() / top_k:.4g}"
        allowed = f"possible with top_k {top_k}: at most {1 / top_k:.4g}, as no token picks an expert twice"
        raise refuse(
            file, f"layer {layer}, expert {expert}", found, allowed=allowed, remedy="set the top_k of the trace"
        )
    return np.asarray(np.minimum(copies_LSE, 1.0))
