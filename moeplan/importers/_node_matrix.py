"""The table of `nvidia-smi topo -m` as cells, from whatever a terminal, a log or a chat has made of it.

Colour codes, tabs or spaces, Windows line ends, prompts around it and a missing legend are survived; columns that ran
into one another (NODENODE) are taken apart. What is left of a row behind its cells is the processor's and the memory's
affinity, counted from the right, because cells may be empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moeplan.importers._node_files import plain, refusal, shown
from moeplan.importers._node_machine import MAX_GPUS, Finding

CELL = r"X|NV\d{1,2}|PIX|PXB|PHB|NODE|SYS|SOC"
MAX_DEVICES, MAX_LINES = 2 * MAX_GPUS, 10_000
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][0-9A-B]|[\x00-\x08\x0b-\x1f\x7f]")
_AFFINITIES = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")
_LISTED = re.compile(r"GPU (\d+): (.{1,80}?) \(UUID: ")
_LEGEND = re.compile(r"\s*(NIC\d+): (\S{1,80})\s*$")
_NUMA = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*|N/A")


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """The table: who stands to whom how, on which memory, and what the legend and the list of GPUs add."""

    names: tuple[str, ...]
    cells: Mapping[tuple[str, str], str]
    numa: Mapping[str, str]
    lines: Mapping[str, int]
    legend: Mapping[str, str]
    products: tuple[str, ...]
    noticed: tuple[Finding, ...]

    @property
    def gpus(self) -> list[str]:
        """The columns that are GPUs."""
        return [name for name in self.names if is_gpu(name)]

    @property
    def nics(self) -> list[str]:
        """The other columns."""
        return [name for name in self.names if not is_gpu(name)]


def is_gpu(name: str) -> bool:
    """Whether a column's name is a GPU's."""
    return re.fullmatch(r"GPU\d{1,4}", name) is not None


def matrix_of(text: str, where: str) -> Matrix:
    """The table in a text. Raises CatalogueError with file, line, found, allowed and remedy."""
    if text.count("\n") > MAX_LINES:
        raise refusal(where, MAX_LINES, "no table", f"more than {MAX_LINES} lines; give the table of one machine")
    lines = [_ESCAPES.sub("", line) for line in re.split(r"\r\n|\n|\r", text)]
    head, names, affinities = _header(lines, where)
    rows: dict[str, list[str]] = {}
    numa: dict[str, str] = {}
    places: dict[str, int] = {}
    noticed: list[Finding] = []
    for number, line in _row_lines(lines, head, names, where):
        name, *words = line.split()
        cells, rest = _cells(words, names, name, f"{where}:{number}")
        if name in rows:
            noticed.append(_twice(name, places[name], number, is_same=rows[name] == cells))
            continue
        rows[name], places[name] = cells, number
        if (found := _numa(rest, affinities)) is not None:
            numa[name] = found
    for name in names:
        if name not in rows:
            raise refusal(where, head + 1, name, "has a column and no row; give the whole table")
    return Matrix(
        names=tuple(names),
        cells={(a, b): cell for a in names for b, cell in zip(names, rows[a], strict=True)},
        numa=numa,
        lines=places,
        legend={match[1]: plain(match[2]) for line in lines if (match := _LEGEND.match(line))},
        products=tuple(plain(match[2]) for line in lines[:head] if (match := _LISTED.search(line))),
        noticed=tuple(noticed),
    )


def _header(lines: Sequence[str], where: str) -> tuple[int, list[str], list[str]]:
    """The number of the line with the columns' names, the names, and which affinities stand behind them."""
    for number, line in enumerate(lines):
        names = re.split("|".join(_AFFINITIES), line)[0].split()
        is_row = any(re.fullmatch(f"(?:{CELL})+", word) for word in names)
        if names and is_gpu(names[0]) and not is_row:
            return number, _checked(names, number + 1, where), [word for word in _AFFINITIES if word in line]
    raise refusal(where, None, "no table", "no line starts with GPU0 GPU1 ...; give what `nvidia-smi topo -m` prints")


def _checked(names: list[str], line: int, where: str) -> list[str]:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise refusal(where, line, name, "has two columns; keep one of them")
        if not re.fullmatch(r"[A-Za-z][\w.:-]{0,60}", name):
            raise refusal(where, line, shown(name), "is not the name of a device; allowed are GPU0, NIC0, mlx5_0, ...")
        if number >= MAX_DEVICES:
            raise refusal(where, line, name, f"is beyond {MAX_DEVICES} columns; give the table of one machine")
    return names


def _row_lines(lines: Sequence[str], head: int, names: Sequence[str], where: str) -> Iterator[tuple[int, str]]:
    """The lines of the table below its header, up to the legend."""
    known = set(names)
    for number, line in enumerate(lines[head + 1 :], start=head + 2):
        first = (line.split() or [""])[0]
        if first.startswith("Legend"):
            return
        if first in known:
            yield number, line
        elif re.fullmatch(r"(GPU|NIC)\d+", first):
            raise refusal(where, number, first, "has a row and no column; give the whole table")


def _cells(words: Sequence[str], names: Sequence[str], name: str, place: str) -> tuple[list[str], list[str]]:
    """The cells of a row, and the words behind them."""
    found: list[str] = []
    for number, word in enumerate(words):
        if re.fullmatch(f"(?:{CELL})+", word):
            found += re.findall(CELL, word)
        elif len(found) == len(names) or re.match(r"[\d,-]+$|N/A$", word):
            return _complete(found, names, name, place), list(words[number:])
        else:
            allowed = "allowed are X, NV1 to NV99, PIX, PXB, PHB, NODE and SYS"
            raise refusal(place, None, name, f"found {shown(word)}, {allowed}; correct the cell")
    return _complete(found, names, name, place), []


def _complete(found: list[str], names: Sequence[str], name: str, place: str) -> list[str]:
    if len(found) != len(names):
        raise refusal(place, None, name, f"found {len(found)} cells for {len(names)} columns; give the whole row")
    for other, cell in zip(names, found, strict=True):
        if (cell == "X") != (other == name):
            what = f"found {cell} under {other}, X stands for itself and for nothing else"
            raise refusal(place, None, name, f"{what}; correct the cell")
        if cell.startswith("NV") and (int(cell[2:]) < 1 or not (is_gpu(name) and is_gpu(other))):
            raise refusal(place, None, name, f"found {cell} under {other}, NVLinks join two GPUs; correct the cell")
    return ["SYS" if cell == "SOC" else cell for cell in found]


def _numa(rest: Sequence[str], affinities: Sequence[str]) -> str | None:
    """The memory affinity among the words behind the cells, if the table has it."""
    words = list(rest)
    if "NUMA Affinity" not in affinities:
        return None
    if "GPU NUMA ID" in affinities and len(words) > 1:
        words.pop()
    # A single word is the memory's; the processors' list is longer than a number.
    is_there = bool(words) and _NUMA.fullmatch(words[-1]) is not None and words[-1] != "N/A"
    return words[-1] if is_there else None


def _twice(name: str, first: int, again: int, *, is_same: bool) -> Finding:
    return Finding(
        severity="error",
        where=name,
        what=f"has two rows, in lines {first} and {again}, {'equal' if is_same else 'and they differ'}",
        why="a table that was put together from two says nothing certain",
        remedy="keep the right one",
        line=again,
    )
