"""The file of records: read, and each record looked at for what no prediction can mend."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moeplan import catalogue
from moeplan.catalogue.files import check_regular, label, read_text
from moeplan.errors import CatalogueError, unknown_name

Record = Mapping[str, Any]
KINDS = (
    "training_e2e", "serving_e2e", "microbench_comm", "microbench_gemm", "microbench_attn", "trace_phase", "memory",
)  # fmt: skip
PUBLISHED = "published-results.json"
_SECTIONS = ("source", "model", "hardware", "parallel", "shape", "derived")


def published() -> Path:
    """The file of published results that comes with the package."""
    packed = catalogue.root() / PUBLISHED
    return packed if packed.is_file() else catalogue.root() / "tests" / "published" / PUBLISHED


def read(path: Path) -> list[Record]:
    """The records of a YAML or JSON file: a list, or a mapping with `records`. Raises CatalogueError."""
    check_regular(path)
    text = read_text(path)
    try:
        data = json.loads(text) if text.lstrip()[:1] in ("{", "[") else YAML(typ="safe", pure=True).load(text)
    except (ValueError, YAMLError) as error:
        line = str(error).splitlines()[-1].strip()
        raise CatalogueError(f"{label(path)}: cannot be read ({line}); write YAML or JSON") from None
    found = data.get("records") if isinstance(data, dict) else data
    if not isinstance(found, list) or not found:
        raise CatalogueError(f"{label(path)}: holds no records; write a list under 'records'")
    return [_whole(each, number, path) for number, each in enumerate(found)]


def _whole(record: object, number: int, path: Path) -> Record:
    """With every section a mapping; a missing weight is 1, a missing `scorable` true."""
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise CatalogueError(f"{label(path)}: record {number}: has no id; add id: a name of your own")
    sections = {key: record[key] if isinstance(record.get(key), dict) else {} for key in _SECTIONS}
    defaults = {"completeness": "A", "measured": None}
    found: dict[str, Any] = defaults | record | sections
    return found | {
        "weight": 1.0 if record.get("weight") is None else record["weight"],
        "scorable": record.get("scorable") is not False,
    }


def fault(record: Record) -> str | None:
    """What is wrong with a record whatever it says was run; None if nothing is."""
    if record.get("kind") not in KINDS:
        return f"kind: {unknown_name('kind', str(record.get('kind')), KINDS)}"
    if not _is_number(record["weight"]) or record["weight"] < 0:
        return f"weight: found {record['weight']!r}; use a number from 0, or leave it out"
    measured = record["measured"]
    if not isinstance(measured, dict) or not any(value is not None for value in measured.values()):
        return "measured: holds nothing; give a measured value, such as step_time_s"
    for key, value in measured.items():
        for each in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if _is_number(each) and not (math.isfinite(each) and each > 0):
                return f"measured.{key}: found {each!r}, which nothing measures; use a finite number above 0"
            if each is not None and not _is_number(each) and key != "bottleneck":
                return f"measured.{key}: found {each!r}, not a number; use one above 0"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
