"""The compact form of a model, written out: runs repeated, parts put in by name, `hidden_size` handed down to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 4096


def written_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with runs written out, names of parts replaced and `hidden_size` handed down."""
    rest = {key: value for key, value in data.items() if key != "parts"}
    parts, hidden = data.get("parts", {}), data.get("hidden_size")
    if not isinstance(parts, Mapping):
        raise ValueError(f"parts is {type(parts).__name__}; write a mapping of names to mixers and feed-forward blocks")
    used: set[str] = set()
    for key in ("layers", "encoder_layers"):
        if key in data:
            rest[key] = _runs(data[key], parts, hidden, used)
    if isinstance(data.get("mtp"), Mapping):
        rest["mtp"] = {**data["mtp"], "layers": _runs(data["mtp"].get("layers", ()), parts, hidden, used)}
    if unused := sorted(set(parts) - used):
        raise ValueError(f"parts.{unused[0]} is used by no layer; use it or delete it")
    return rest


def _runs(runs: Any, parts: Mapping[str, Any], hidden: Any, used: set[str]) -> list[Any]:
    if not isinstance(runs, list | tuple):
        raise ValueError(f"layers are {type(runs).__name__}; write a list of layers or of {{repeat, layers}}")
    written: list[Any] = []
    for run in runs:
        if not isinstance(run, Mapping):
            written.append(run)
            continue
        repeat = run.get("repeat", 1)
        if type(repeat) is not int or not 1 <= repeat <= MAX_LAYERS:
            raise ValueError(f"repeat is {repeat!r}; use a whole number from 1 to {MAX_LAYERS}")
        rest = {key: value for key, value in run.items() if key != "repeat"}
        once = (
            _runs(rest["layers"], parts, hidden, used)
            if set(rest) == {"layers"}
            else [_layer(rest, parts, hidden, used)]
        )
        if len(once) * repeat + len(written) > MAX_LAYERS:
            raise ValueError(f"more than {MAX_LAYERS} layers; lower repeat")
        written += once * repeat
    return written


def _layer(layer: Mapping[str, Any], parts: Mapping[str, Any], hidden: Any, used: set[str]) -> dict[str, Any]:
    found = dict(layer)
    for key in ("mixer", "cross_attention", "feed_forward"):
        value = layer.get(key)
        if isinstance(value, str):
            if value not in parts:
                raise ValueError(f"{key} {value!r} is not among parts ({', '.join(parts) or 'none'}); add it there")
            used.add(value)
            value = parts[value]
        if isinstance(value, Mapping):
            found[key] = {"hidden_size": hidden, **value}
    return found
