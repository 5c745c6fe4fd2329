"""Libraries that exchange tokens: what each makes of the wires of a machine, from `cost_models/exchanges`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moeplan import units
from moeplan.catalogue.citations import check_figures, checked_sources
from moeplan.catalogue.files import read, root
from moeplan.errors import CatalogueError, unknown_name

_DIMENSIONS = {
    "start": "s", "combine_start": "s", "call": "s", "link_efficiency": "share", "nic_efficiency": "share",
    "token": "s", "bytes_per_sm": "B/s", "far_bytes_per_sm": "B/s", "far_combine_bytes_per_sm": "B/s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One library. SMs copy what a GPU receives, its own part included."""

    name: str
    start_s: float = 0.0
    """Of a dispatch, beyond its wires."""
    combine_start_s: float = 0.0
    call_s: float = 0.0
    """What a call from PyTorch adds, beside one copy of all that was received."""
    link_efficiency: float | None = None
    """Of NVLink; None: as the topology says."""
    nic_efficiency: float | None = None
    token_s: float = 0.0
    """Of an SM for each copy of a token, whatever its size."""
    bytes_per_sm: float | None = None
    """Of an SM beyond that."""
    far_bytes_per_sm: float | None = None
    """The same between nodes, where SMs also forward; None: as in one."""
    far_combine_bytes_per_sm: float | None = None
    """And where they add up; None: as they forward."""
    sms: int = 0
    """Where nobody says how many."""

    def bytes_per_s(self, sms: float, *, token_bytes: float, kind: str, is_far: bool) -> float | None:
        """What so many SMs receive: SMs x token / (time of a token + token / rate). None: SMs are no limit."""
        each = self.bytes_per_sm
        if is_far and self.far_bytes_per_sm:
            combine = self.far_combine_bytes_per_sm or self.far_bytes_per_sm
            each = combine if kind == "combine" else self.far_bytes_per_sm
        return None if each is None else sms * token_bytes / (self.token_s + token_bytes / each)


@lru_cache
def library(name: str) -> Library:
    """The library of a name. Raises CatalogueError."""
    folder = root() / "cost_models" / "exchanges"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise CatalogueError(unknown_name("library", name, names))
    sheet = read(folder / f"{name}.yaml")
    figures = {key: value for key, value in sheet.data.items() if key not in ("about", "sources")}
    check_figures(sheet, figures, checked_sources(sheet))
    found: dict[str, Any] = {}
    for key, figure in figures.items():
        if key == "sms":
            found[key] = int(figure["value"])
        elif key in _DIMENSIONS:
            suffix = "_s" if _DIMENSIONS[key] == "s" else ""
            found[key + suffix] = units.parse(figure["value"], _DIMENSIONS[key])
        else:
            raise CatalogueError(f"{folder.name}/{name}.yaml: {unknown_name('key', key, [*_DIMENSIONS, 'sms'])}")
    return Library(name=name, **found)
