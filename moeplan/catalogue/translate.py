"""What pydantic found wrong, in our words: one line with the place, what was found, what is allowed and a remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moeplan.catalogue.sheet import FieldPath, Spots, shown, where
from moeplan.errors import CatalogueError, unknown_name

_Thing = TypeVar("_Thing")
_QUOTED = re.compile(r"'([^']*)'")
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def validated(wanted: type[_Thing], data: Mapping[str, Any], spots: Spots, path: FieldPath) -> _Thing:
    """`data` as a `wanted`. Raises CatalogueError with at most three lines, one for each wrong field."""
    try:
        return wanted(**data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose items are refused is refused as too short as well.
        inner = {each["loc"][:length] for each in found for length in range(len(each["loc"]))}
        details = [each for each in found if each["loc"] not in inner]
        # The same fault in every layer is one fault.
        lines = {(each["loc"][-1:], each["msg"]): _line(each, wanted, data, spots, path) for each in reversed(details)}
        raise CatalogueError("\n".join(list(reversed(lines.values()))[:3])) from None


def _line(detail: ErrorDetails, wanted: type, data: object, spots: Spots, path: FieldPath) -> str:
    steps = _steps(detail["loc"], data, is_missing=detail["type"] == "missing")
    return f"{where(spots, path + steps)}: {_sentence(detail, wanted)}"


def _steps(loc: tuple[str | int, ...], data: object, *, is_missing: bool) -> FieldPath:
    """`loc` without what pydantic adds of its own: the tags of a union."""
    steps: list[str | int] = []
    for number, step in enumerate(loc):
        last = number == len(loc) - 1
        if isinstance(data, Mapping) and (step in data or (last and is_missing)):
            data = data.get(step)
        elif isinstance(data, list | tuple) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            continue
        steps.append(step)
    return tuple(steps)


def _sentence(detail: ErrorDetails, wanted: type) -> str:
    kind, found, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "is missing; add it"
    if kind == "extra_forbidden":
        return unknown_name("key", str(detail["loc"][-1]), _keys(wanted, detail["loc"][:-1])) + "; or remove it"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        allowed = _QUOTED.findall(str(context.get("expected", context.get("expected_tags", ""))))
        value = context.get("tag", found)
        return (
            unknown_name("value", value, allowed)
            if isinstance(value, str)
            else f"{_named(value)}; use one of: {', '.join(allowed) or context.get('expected')}"
        )
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{shown(found)} is not allowed; use a value {words} {context[key]:,}".replace(",", "_")
    return _of_type(kind, found, detail["msg"])


def _of_type(kind: str, found: object, said: str) -> str:
    if kind in ("int_type", "int_from_float", "int_parsing"):
        return f"{_named(found)}, not a whole number; write {_whole(found)}"
    if kind in ("float_type", "finite_number", "float_parsing"):
        return f"{_named(found)}, not a number; write one such as 1.25"
    if kind in ("bool_type", "bool_parsing"):
        return f"{_named(found)}, not a truth value; write true or false"
    if kind == "string_type":
        return f"{_named(found)}, not a name; write text, in quotes if it looks like a number"
    if kind.endswith(("model_type", "dict_type", "mapping_type", "model_attributes_type")):
        return f"{_named(found)}, not a mapping; write key: value pairs"
    if kind in ("tuple_type", "list_type"):
        return f"{_named(found)}, not a list; write [first, second]"
    if kind in ("too_short", "too_long"):
        return f"has the wrong number of values: {said[0].lower()}{said[1:]}; use as many"
    return f"{_named(found)}: {said[0].lower()}{said[1:]}; use a value that is allowed"


def _named(found: object) -> str:
    """What was found, as the file has it: `true`, the text 'no', 12.5, a list."""
    if isinstance(found, bool):
        return f"found the truth value {str(found).lower()}"
    if isinstance(found, str):
        return f"found the text {shown(found)}"
    if found is None:
        return "found nothing"
    kinds: dict[type, str] = {list: "a list", tuple: "a list", dict: "a mapping"}
    kind = kinds.get(type(found))
    return f"found {kind}" if kind else f"found {shown(found)}"


def _whole(found: object) -> str:
    try:
        number = float(found) if isinstance(found, str | float) else 8.0
    except ValueError:
        return "one such as 8, without quotes"
    quotes = ", without quotes" if isinstance(found, str) else ""
    return f"{number:.0f}{quotes}" if number.is_integer() and abs(number) < 1e15 else "one such as 8"


def _keys(wanted: type, loc: tuple[str | int, ...]) -> list[str]:
    """The keys that are allowed at `loc` inside `wanted`."""
    found: list[type] = [wanted]
    for step in loc:
        inside = [_fields(each)[str(step)].annotation for each in found if str(step) in _fields(each)]
        tagged = [each for each in found if str(step) in _tags(each)]
        found = tagged or [model for annotation in inside for model in models_in(annotation)] or found
    return [info.alias or name for each in found for name, info in _fields(each).items()]


def _fields(model: type) -> Mapping[str, FieldInfo]:
    fields: Mapping[str, FieldInfo] = getattr(model, "__pydantic_fields__", {})
    return fields


def _tags(model: type) -> tuple[Any, ...]:
    kind = _fields(model).get("kind")
    return get_args(kind.annotation) if kind else ()


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in models_in(part)]
