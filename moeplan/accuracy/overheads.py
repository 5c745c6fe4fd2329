"""What a framework adds to kernels and exchanges, read from `cost_models/overheads/NAME.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from moeplan import catalogue
from moeplan.catalogue.citations import Citation, citations, sourced
from moeplan.catalogue.files import read
from moeplan.errors import CatalogueError
from moeplan.units import parse

DEFAULT = "megatron-core"


@dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """The terms of `steps.believed_s`. Nothing is added by default."""

    exposed_routed: float = 1.0
    """Of experts' exchanges beside passes of another micro-batch, the share that is seen."""
    late_ranks: float = 1.0
    """Of experts' exchanges beside nothing, their time over that of ranks that all come in time."""
    exposed_tensor: float = 1.0
    """Of tensor exchanges beside products, the share that is seen."""
    score_passes: float = 0.0
    """Times that scores of attention with sinks pass through memory in a step of training: kernels that fuse them away
    came late."""
    host_dense_s: float = 0.0
    """Host's time for forward and backward pass of one layer without experts, kernel by kernel; measured, no fit."""
    host_routed_s: float = 0.0
    """Of one with experts."""
    host_routed_graphs_s: float = 0.0
    """Of one with experts, where attention or router are graphs."""
    host_routed_old_s: float = 0.0
    """Of one with experts, where it is not said what was a graph."""


TERMS = tuple(field.name for field in fields(Overheads))
FITTED = tuple(term for term in TERMS if term not in ("host_dense_s", "host_routed_old_s"))
"""To whole steps."""


@lru_cache(maxsize=16)
def overheads_of(name: str = DEFAULT) -> Overheads:
    """The set of that name. Raises CatalogueError for a term that is not known."""
    terms = _sheet(name).data["terms"]
    for key in terms:
        if key not in _KEYS:
            raise CatalogueError(f"cost_models/overheads/{name}.yaml: terms.{key}: use one of {', '.join(_KEYS)}")
    return Overheads(**{_KEYS[key]: _number(figure["value"]) for key, figure in terms.items()})


def sources_of(name: str = DEFAULT) -> list[Citation]:
    """Where each term comes from."""
    data = _sheet(name).data
    return citations({"overheads": data["terms"], "sources": data["sources"]})


def _sheet(name: str) -> Any:
    return sourced(read(catalogue.root() / "cost_models" / "overheads" / f"{name}.yaml"), name)


def _number(value: object) -> float:
    if isinstance(value, str):
        return parse(value, "share" if value.rstrip().endswith("%") else "s")
    assert isinstance(value, int | float)
    return float(value)


_KEYS = {term.removesuffix("_s"): term for term in TERMS}
