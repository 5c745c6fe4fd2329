"""What must fit together in a scenario: the batch, the number formats, the choices, the routing. Each is a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Any, get_type_hints

import numpy as np
from pydantic import ConfigDict, create_model

from moeplan import menu
from moeplan.catalogue.sheet import FieldPath, Sheet, fail, shown
from moeplan.catalogue.translate import validated
from moeplan.domain.cluster import Cluster
from moeplan.domain.model import Model
from moeplan.domain.scenario import Choices, RoutingLaw
from moeplan.domain.workload import Workload
from moeplan.errors import CatalogueError, unknown_name
from moeplan.routers import GIVEN

MAX_SEQUENCE = 10**7
DEGREES = ("dp", "tp", "pp", "ep", "etp", "cp")
_ONLY_FOR_EXPERTS = ("ep", "etp", "zero_expert", "all_to_all", "overlap_degree", "capacity")
_ONLY_IN_TRAINING = ("zero_dense", "zero_expert", "recompute", "overlap_gradients", "vpp")


def check(
    sheet: Sheet, *, cluster: Cluster, model: Model, workload: Workload, routing: RoutingLaw | None, choices: Choices
) -> None:
    """Raises CatalogueError for the first thing in a scenario that does not fit, or has no effect."""
    _check_lengths(sheet, model, workload)
    _check_menus(sheet, choices)
    _check_effects(sheet, model, workload)
    _check_degrees(sheet, choices, cluster.num_gpus)
    _check_experts(sheet, choices, model)
    _check_batch(sheet, choices, workload.global_batch)
    _check_dtype(sheet, choices, cluster)
    if routing is not None:
        check_router(sheet, routing, model)


def _check_lengths(sheet: Sheet, model: Model, workload: Workload) -> None:
    path = ("workload", "sequence")
    if workload.sequence > MAX_SEQUENCE:
        fail(sheet.spots, path, f"{workload.sequence} is longer than any model's; use at most {MAX_SEQUENCE:_}")
    if workload.train_mtp and "train_mtp" in workload.model_fields_set and model.mtp is None:
        fail(
            sheet.spots,
            ("workload", "train_mtp"),
            "has no effect, because the model predicts one token only; remove it",
        )


def _check_menus(sheet: Sheet, choices: Choices) -> None:
    for index, name in enumerate(choices.schedule or ()):
        if name not in menu.names("schedules"):
            fail(sheet.spots, _item(sheet, "schedule", index), unknown_name("schedule", name, menu.names("schedules")))
    exchanges = _exchanges() if choices.all_to_all else []
    for index, name in enumerate(choices.all_to_all or ()):
        if name not in exchanges:
            fail(sheet.spots, _item(sheet, "all_to_all", index), unknown_name("all-to-all", name, exchanges))


def _exchanges() -> list[str]:
    """The collectives that can do an all-to-all."""
    return [name for name in menu.names("collectives") if "all_to_all" in menu.module("collectives", name).OPERATIONS]


def _check_effects(sheet: Sheet, model: Model, workload: Workload) -> None:
    chosen = {key for key, value in (sheet.data.get("choose") or {}).items() if value is not None}
    for key in _ONLY_FOR_EXPERTS:
        if key in chosen and not model.moe_layers:
            fail(sheet.spots, ("choose", key), "has no effect on a model without experts; remove it")
    for key in _ONLY_IN_TRAINING:
        if key in chosen and not workload.is_training:
            fail(
                sheet.spots,
                ("choose", key),
                f"has no effect in phase {workload.phase!r}; remove it, or use phase train",
            )
    if "routing" in sheet.data and not model.moe_layers:
        fail(sheet.spots, ("routing",), "has no effect on a model without experts; remove it")
    if model.moe_layers and sheet.data.get("routing") is None:
        fail(
            sheet.spots, ("routing",), "is missing for a model with experts; add one such as {router: zipf, skew: 0.0}"
        )


def _check_degrees(sheet: Sheet, choices: Choices, num_gpus: int) -> None:
    for key in DEGREES:
        for index, degree in enumerate(getattr(choices, key) or ()):
            if num_gpus % degree:
                usable = _some(_divisors(num_gpus))
                fail(
                    sheet.spots, _item(sheet, key, index), f"{degree} does not divide the {num_gpus} GPUs; use {usable}"
                )


def _check_experts(sheet: Sheet, choices: Choices, model: Model) -> None:
    """Expert-parallel ranks without an expert would have nothing to do."""
    most = max((layer.experts.num_experts for layer in model.layers if layer.experts), default=0)
    for index, degree in enumerate(choices.ep or ()):
        if degree > most:
            sentence = (
                f"{degree} ranks are more than the {most} experts of a layer; use at most {most}, and etp beyond that"
            )
            fail(sheet.spots, _item(sheet, "ep", index), sentence)


def _item(sheet: Sheet, key: str, index: int) -> FieldPath:
    """Where one value of a choice is written: a single value stands without a list."""
    value = sheet.data["choose"][key]
    return ("choose", key, index) if isinstance(value, list) else ("choose", key)


def _check_batch(sheet: Sheet, choices: Choices, global_batch: int) -> None:
    for key in ("dp", "micro_batch"):
        for index, size in enumerate(getattr(choices, key) or ()):
            if global_batch % size:
                usable = _some(_divisors(global_batch))
                fail(
                    sheet.spots,
                    _item(sheet, key, index),
                    f"{size} does not divide global_batch {global_batch}; use {usable}",
                )
    pairs = [(dp, size) for dp in choices.dp or () for size in choices.micro_batch or ()]
    if pairs and all(global_batch % (dp * size) for dp, size in pairs):
        dp, size = pairs[0]
        found = f"dp {dp} times micro_batch {size} does not divide global_batch {global_batch}"
        fail(sheet.spots, ("workload", "global_batch"), f"{found}; use multiples of {dp * size}")


def _check_dtype(sheet: Sheet, choices: Choices, cluster: Cluster) -> None:
    dtype, peaks = choices.precision.compute, cluster.gpu.peak_flops_per_s
    if dtype not in peaks:
        path = ("choose", "precision", "compute")
        has = ", ".join(peaks)
        fail(
            sheet.spots,
            path,
            f"{cluster.gpu.name} has no peak for {dtype!r}; use one of: {has}, or add peak_{dtype} to the GPU",
        )


def check_router(sheet: Sheet, routing: RoutingLaw, model: Model) -> None:
    """Raises CatalogueError for a router that is not on the menu, or an option that it does not take, or not so."""
    if routing.router not in menu.names("routers"):
        fail(sheet.spots, ("routing", "router"), unknown_name("router", routing.router, menu.names("routers")))
    route = menu.load("routers", routing.router, "route")
    options = _options(route)
    for key in routing.options:
        if key not in options:
            known = f"{unknown_name('option', key, options)}; router {routing.router!r} does not take it, so remove it"
            none = f"router {routing.router!r} takes no options; remove it"
            fail(sheet.spots, ("routing", key), known if options else none)
    for key, option in options.items():
        if option.default is Parameter.empty and key not in routing.options:
            fail(sheet.spots, ("routing", key), f"is missing; router {routing.router!r} needs it, so add it")
    if routing.options:
        _check_types(sheet, route, routing)
        _try(sheet, route, routing, model)


def _options(route: Callable[..., object]) -> dict[str, Parameter]:
    """What a scenario may give to a router: its keyword arguments, without those that the model and the plan give."""
    parameters = signature(route).parameters.values()
    keywords = [each for each in parameters if each.kind is Parameter.KEYWORD_ONLY]
    return {each.name: each for each in keywords if each.name not in GIVEN}


def _check_types(sheet: Sheet, route: Callable[..., object], routing: RoutingLaw) -> None:
    hints = get_type_hints(route)
    fields: dict[str, Any] = {key: (hints[key], ...) for key in routing.options}
    wanted = create_model("Options", __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)
    validated(wanted, dict(routing.options), sheet.spots, ("routing",))


def _try(sheet: Sheet, route: Callable[..., object], routing: RoutingLaw, model: Model) -> None:
    """One source, and one layer unless a file is read, to hear what the router says to its options."""
    experts = {(layer.experts.num_experts, layer.experts.top_k) for layer in model.layers if layer.experts}
    for num_experts, top_k in sorted(experts):
        rng = np.random.default_rng(routing.seed)
        num_layers = len(model.moe_layers) if "path" in routing.options else 1
        sizes = {
            "num_layers": num_layers,
            "num_experts": num_experts,
            "top_k": top_k,
            "num_sources": 1,
            "tokens_per_source": 64,
        }
        try:
            route(**sizes, rng=rng, **routing.options)
        except CatalogueError as error:
            path, sentence = _spoken(str(error))
            fail(sheet.spots, path, sentence)


def _spoken(message: str) -> tuple[FieldPath, str]:
    """The option that a router's error names, and the rest of the sentence."""
    place, _, sentence = message.partition(": ")
    if place.startswith("routing.options.") and sentence:
        return ("routing", place.removeprefix("routing.options.")), sentence
    return ("routing",), message.removeprefix("routing: ")


def _divisors(number: int) -> list[int]:
    """Those below 10,000, which is where a person looks."""
    return [divisor for divisor in range(1, min(number, 10_000) + 1) if number % divisor == 0]


def _some(numbers: Iterable[Any]) -> str:
    found = [shown(number) for number in numbers]
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
