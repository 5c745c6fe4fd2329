"""How many tokens each expert got: .npz, .csv, .jsonl, and what SGLang's recorder of expert distributions writes.

.npz: counts[layer, expert], [step, layer, expert] or [step, layer, source, expert], its only array or a named one.
.csv: a row of counts for each layer, or columns layer, expert, tokens (and step, source) under a header.
.jsonl: {"layer": 0, "counts": [...]}, with "step" and "source" where there are several.
.json and .pt: SGLang's {"logical_count": [steps, layers, experts]}, where dense layers are rows of zeros.

And for what counts alone do not tell, which experts each token chose: .npz, expert ids [token, layer, pick];
they may also be counted in batches of tokens.

Axes: T step, L layer, S source, E expert, N token, K pick.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import CatalogueError
from moeplan.routers._trace_files import MAX_BYTES, existing_file, read_jsonl, read_npz, refuse

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
_COLUMNS = ("step", "layer", "source", "expert", "tokens")
_SHAPES = "[layer, expert], [step, layer, expert] or [step, layer, source, expert]"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertLoad:
    """Tokens by step, layer, source and expert. `layers[l]` is the file's own number of layer l."""

    tokens_TLSE: Floats
    layers: tuple[int, ...]


def read(source: str | PathLike[str], *, array: str | None = None) -> ExpertLoad:
    """The load that a file states; `array` names one of several in an .npz.

    Raises CatalogueError for a file that is not there, not of these kinds or cut off, and for counts that are negative,
    not finite, ragged, empty or all zero.
    """
    path = existing_file(fspath(source))
    readers: dict[str, Callable[[Path], npt.NDArray[Any]]] = {
        ".npz": lambda file: read_npz(file, array), ".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".pt": _torch,
    }  # fmt: skip
    reader = readers.get(path.suffix)
    if reader is None:
        raise refuse(path, "path", f"'{path.suffix}'", allowed=", ".join(readers), remedy="rename or convert it")
    if array is not None and path.suffix != ".npz":
        raise refuse(path, "array", repr(array), allowed=f"of effect on {path.suffix} files", remedy="remove it")
    return _checked(path, reader(path), skips_dense=path.suffix in (".json", ".pt"))


def read_ids(source: str | PathLike[str], *, array: str | None = None) -> Ids:
    """(N, L, K) experts that each token chose in each layer, from an .npz. Raises CatalogueError."""
    path = existing_file(fspath(source))
    if path.suffix != ".npz":
        raise refuse(path, "path", f"'{path.suffix}'", allowed=".npz", remedy="save ids by token, layer and pick")
    found = read_npz(path, array)
    if found.ndim != 3 or 0 in found.shape or found.dtype.kind not in "iu":
        what = f"shape {found.shape} of {found.dtype}"
        raise refuse(path, "ids", what, allowed="whole numbers by [token, layer, pick]", remedy="save them so")
    if found.min() < 0 or found.max() >= 2**16:
        allowed = "a whole number from 0 to 65535"
        raise refuse(path, "ids", f"{found.min()} or {found.max()}", allowed=allowed, remedy="use the model that chose")
    return found.astype(np.int32)


def read_batches(
    source: str | PathLike[str], *, batch_tokens: int, array: str | None = None, num_experts: int | None = None
) -> ExpertLoad:
    """A step for each `batch_tokens` tokens in sequence, of an .npz of expert ids; the last takes those left over.

    Without `num_experts` there are as many as the largest id says. Raises CatalogueError for files as
    `read_ids` does, for ids out of range, and for a batch that is no part of the file.
    """
    path, ids_NLK = Path(source), read_ids(source, array=array)
    experts = int(ids_NLK.max()) + 1 if num_experts is None else num_experts
    if ids_NLK.max() >= experts:
        raise refuse(
            path, "expert id", ids_NLK.max(), allowed=f"0 to {experts - 1}", remedy="use a trace of this model"
        )
    if not 1 <= batch_tokens <= len(ids_NLK):
        allowed = f"1 to the {len(ids_NLK)} tokens of the file"
        raise refuse(path, "batch_tokens", batch_tokens, allowed=allowed, remedy="cut it into some batches")
    if len(ids_NLK) // batch_tokens * ids_NLK.shape[1] * experts * 8 > MAX_BYTES:
        allowed = f"a table of at most {MAX_BYTES} bytes"
        raise refuse(path, "experts", experts, allowed=allowed, remedy="number them from 0, or use larger batches")
    tokens_TLE = _counted(ids_NLK, batch_tokens, experts)
    return ExpertLoad(tokens_TLSE=tokens_TLE[:, :, None, :], layers=tuple(range(ids_NLK.shape[1])))


def _counted(ids_NLK: Ids, batch_tokens: int, num_experts: int) -> Floats:
    tokens, layers, _ = ids_NLK.shape
    steps = tokens // batch_tokens
    step_N = np.minimum(np.arange(tokens) // batch_tokens, steps - 1)
    row_NL = step_N[:, None] * layers + np.arange(layers)
    where = row_NL[:, :, None] * num_experts + ids_NLK.astype(np.int64)
    counts = np.bincount(where.ravel(), minlength=steps * layers * num_experts)
    return counts.reshape(steps, layers, num_experts).astype(np.float64)


def _are_ids(found: npt.NDArray[Any]) -> bool:
    """Whether a table by three axes never has a number twice in a row, and is longer than its largest number.

    So are ids of the experts that thousands of tokens chose; counts are neither.
    """
    if found.ndim != 3 or found.dtype.kind not in "iu" or found.shape[2] < 2 or len(found) <= found.max():
        return False
    return bool((np.diff(np.sort(found, axis=2), axis=2) > 0).all())


def _checked(path: Path, found: npt.NDArray[Any], *, skips_dense: bool) -> ExpertLoad:
    if found.ndim not in (2, 3, 4) or 0 in found.shape or found.dtype.kind not in "iuf":
        what = f"shape {found.shape} of {found.dtype}"
        raise refuse(path, "counts", what, allowed=f"numbers by {_SHAPES}", remedy="reshape it")
    if _are_ids(found):
        allowed = "counts by [step, layer, expert]"
        remedy = "say how many tokens a batch has (--batch-tokens 512), so that they are counted"
        raise refuse(
            path, "counts", "what looks like expert ids by [token, layer, pick]", allowed=allowed, remedy=remedy
        )
    tokens = found.astype(np.float64)
    tokens_TLSE = tokens if tokens.ndim == 4 else tokens.reshape(-1, tokens.shape[-2], 1, tokens.shape[-1])
    if not np.isfinite(tokens_TLSE).all() or tokens_TLSE.min() < 0:
        bad = "a number that is not finite" if not np.isfinite(tokens_TLSE).all() else f"{tokens_TLSE.min():g}"
        raise refuse(path, "counts", bad, allowed="a finite count, 0 or more", remedy="count tokens again")
    some_L = tokens_TLSE.any(axis=(0, 2, 3))
    if not some_L.any() or not (some_L.all() or skips_dense):
        layer = int(np.flatnonzero(~some_L)[0])
        raise refuse(path, f"layer {layer}", "no token at all", allowed="a load", remedy="leave this layer out")
    return ExpertLoad(tokens_TLSE=tokens_TLSE[:, some_L], layers=tuple(np.flatnonzero(some_L).tolist()))


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise refuse(path, "size", f"{path.stat().st_size} bytes", allowed=f"{MAX_BYTES} or less", remedy="use .npz")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise refuse(path, "file", "it", allowed="UTF-8 text", remedy="convert it") from None


def _csv(path: Path) -> npt.NDArray[Any]:
    rows = [row for row in csv.reader(_text(path).splitlines()) if row]
    if not rows:
        raise refuse(path, "file", "nothing", allowed="a row for each layer", remedy="write one")
    header = [cell.strip() for cell in rows[0]]
    if set(header) & set(_COLUMNS):
        return _listed(path, header, rows[1:])
    if len({len(row) for row in rows}) > 1:
        raise refuse(path, "rows", "they", allowed="of one length", remedy="give every layer all its experts")
    return np.array([[_number(path, f"row {at + 1}", cell) for cell in row] for at, row in enumerate(rows)])


def _number(path: Path, where: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise refuse(path, where, repr(cell)[:40], allowed="a number", remedy="write a count of tokens") from None


def _listed(path: Path, header: list[str], rows: list[list[str]]) -> npt.NDArray[Any]:
    """A line for each count."""
    missing = {"layer", "expert", "tokens"} - set(header)
    if missing or set(header) - set(_COLUMNS) or len(set(header)) < len(header):
        allowed = "layer, expert, tokens, and maybe step and source"
        raise refuse(path, "header", ", ".join(header), allowed=allowed, remedy="rename its columns")
    entries = []
    for at, row in enumerate(rows):
        if len(row) != len(header):
            what = f"{len(row)} cells"
            raise refuse(path, f"row {at + 2}", what, allowed=f"the {len(header)} of the header", remedy="fill it")
        cells = dict(zip(header, row, strict=True))
        place = tuple(_index(path, at + 2, name, cells.get(name, "0")) for name in _COLUMNS[:-1])
        entries.append((place, _number(path, f"row {at + 2}", cells["tokens"])))
    return _table(path, entries)


def _index(path: Path, row: int, name: str, cell: str) -> int:
    if not cell.strip().isdecimal() or int(cell) >= 2**20:
        raise refuse(path, f"row {row}: {name}", repr(cell)[:40], allowed="a whole number", remedy="count from 0")
    return int(cell)


def _table(path: Path, entries: list[tuple[tuple[int, ...], float]]) -> npt.NDArray[Any]:
    """[step, layer, source, expert] of counts in any order; what is not listed is 0."""
    if not entries:
        raise refuse(path, "file", "it", allowed="without counts", remedy="list a count for each expert")
    shape = tuple(int(size) + 1 for size in np.max([place for place, _ in entries], axis=0))
    if np.prod(shape, dtype=np.float64) * 8 > MAX_BYTES:
        raise refuse(path, "numbers", shape, allowed="of a table that fits memory", remedy="count from 0, or use .npz")
    found = np.zeros(shape)
    for place, tokens in entries:
        found[place] += tokens
    return found


def _jsonl(path: Path) -> npt.NDArray[Any]:
    entries: list[tuple[tuple[int, ...], float]] = []
    for place, record in read_jsonl(path):
        counts = record.get("counts")
        where = tuple(record.get(name, 0) for name in ("step", "layer", "source"))
        if not isinstance(counts, list) or not all(isinstance(each, int | float) for each in counts):
            allowed = "a list of numbers"
            raise refuse(path, f"{place}: counts", repr(counts)[:40], allowed=allowed, remedy="one for each expert")
        if not all(type(number) is int and 0 <= number < 2**20 for number in where):
            allowed = "whole numbers, 0 or more"
            raise refuse(path, f"{place}: step, layer, source", where, allowed=allowed, remedy="count from 0")
        entries += [((*where, expert), float(tokens)) for expert, tokens in enumerate(counts)]
    return _table(path, entries)


def _json(path: Path) -> npt.NDArray[Any]:
    try:
        document = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError):
        raise refuse(path, "file", "it", allowed="JSON", remedy="record it again") from None
    return _logical_count(path, document)


def _torch(path: Path) -> npt.NDArray[Any]:
    """What `torch.save` wrote. Weights only: nothing in the file is run."""
    try:
        torch: Any = import_module("torch")
    except ImportError:
        raise CatalogueError(f"{path}: a .pt file needs torch; install it, or save logical_count as JSON") from None
    from pickle import UnpicklingError

    try:
        document = torch.load(path, weights_only=True, map_location="cpu")
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        raise refuse(path, "file", "it", allowed="a whole file of torch.save", remedy="record it again") from None
    return _logical_count(path, document)


def _logical_count(path: Path, document: object) -> npt.NDArray[Any]:
    found = document.get("logical_count") if isinstance(document, dict) else None
    if found is None:
        allowed = "a mapping with logical_count"
        raise refuse(path, "file", "it", allowed=allowed, remedy="record with mode stat, or write counts as .npz")
    try:
        return np.asarray(found)
    except ValueError:
        raise refuse(path, "logical_count", "it", allowed="rows of one length", remedy="record it again") from None
