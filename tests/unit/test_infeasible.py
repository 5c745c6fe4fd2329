"""What cannot be planned is refused with the constraint that binds and a change; where that can be read, it helps."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

import pytest

import moeplan as mp
from moeplan.units import parse

Changes = dict[str, Any]
NO_SHARDING = {"choose.zero_dense": 0, "choose.zero_expert": 0}
ONE_STAGE = {"choose.tp": 1, "choose.pp": 1}


def refusal(name: str, changes: Changes, kind: type[mp.MoeplanError]) -> str:
    with pytest.raises(kind) as caught:
        mp.plan(mp.load(name, changes), gap=0.05)
    assert type(caught.value) is kind
    return str(caught.value)


# a field that no plan can keep: the values that would do are listed

FIELDS: list[tuple[str, str, object, Changes]] = [
    ("small-4-gpus", "choose.dp", 3, {}),
    ("small-4-gpus", "choose.ep", 3, {}),
    ("small-4-gpus", "choose.ep", 8, {}),
    ("small-4-gpus", "choose.tp", 64, {}),
    ("small-4-gpus", "choose.pp", 8, {}),
    ("small-4-gpus", "choose.etp", 7, {}),
    ("small-4-gpus", "choose.micro_batch", 3, {}),
    ("small-4-gpus", "choose.micro_batch", 5, {"workload.global_batch": 12}),
    ("small-4-gpus", "choose.dp", 4, {"workload.global_batch": 2}),
    ("small-8-gpus", "choose.pp", 3, {}),
]


@pytest.mark.parametrize(("name", "field", "value", "others"), FIELDS)
def test_a_degree_that_divides_nothing_is_refused_with_those_that_do(
    name: str, field: str, value: object, others: Changes
) -> None:
    message = refusal(name, others | {field: value}, mp.CatalogueError)
    assert f"{field}: {value} does not divide" in message
    allowed = [int(each) for each in re.findall(r"\d+", message.rpartition("use ")[2])]
    assert allowed
    assert value not in allowed
    for each in allowed:
        mp.load(name, others | {field: each})
    feasible = [each for each in allowed if plannable(name, others | {field: each})]
    assert feasible, f"none of {allowed} gives a plan"


def plannable(name: str, changes: Changes) -> bool:
    try:
        mp.plan(mp.load(name, changes), gap=0.5)
    except mp.InfeasibleError:
        return False
    return True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"choose.schedule": "1f1b"}, ("choose.schedule", "'1f1b'", "one_f_one_b")),
        ({"choose.all_to_all": "tree"}, ("choose.all_to_all", "'tree'", "linear")),
        ({"choose.tp": []}, ("choose.tp", "empty", "name a value")),
        ({"choose.zero_dense": 4}, ("choose.zero_dense", "4", "at most 3")),
        ({"choose.capacity": {"rule": "drop"}}, ("choose.capacity", "'drop'", "1.25")),
        ({"workload.global_batch": 0}, ("workload.global_batch", "0", "at least 1")),
        ({"nodes": 0}, ("cluster.nodes", "0", "from 1")),
        ({"choose.micro_batch": 16, "choose.dp": 4}, ("workload.global_batch", "dp 4", "multiples of 64")),
    ],
)
def test_what_is_not_on_a_list_is_refused_where_found_and_with_what_would_do(
    changes: Changes, words: tuple[str, ...]
) -> None:
    message = refusal("small-4-gpus", changes, mp.CatalogueError)
    for word in words:
        assert word in message


# memory

MEMORY: list[tuple[str, Changes]] = [
    ("small-4-gpus", {"cluster.gpu.memory": "160 MB", **ONE_STAGE, "choose.ep": 1, "choose.micro_batch": 2}),
    ("small-4-gpus", {"cluster.gpu.memory": "250 MB", **ONE_STAGE, "choose.ep": 1, **NO_SHARDING}),
    ("small-4-gpus", {"cluster.gpu.memory": "130 MB", **ONE_STAGE, "choose.micro_batch": 2}),
    ("small-two-nodes", {"cluster.gpu.memory": "80 MB", "choose.recompute": "none"}),
    ("small-two-nodes", {"cluster.gpu.memory": "60 MB"}),
    ("small-4-gpus", {"cluster.gpu.memory": "100 MB", **ONE_STAGE, "choose.micro_batch": 2}),
]


@pytest.mark.parametrize(("name", "changes"), MEMORY)
def test_too_little_memory_is_named_as_what_binds_with_what_fills_it(name: str, changes: Changes) -> None:
    message = refusal(name, changes, mp.InfeasibleError)
    assert "memory binds" in message
    assert re.search(r"stage \d+ needs [\d.]+ \wB of [\d.]+ \wB usable", message)
    assert re.search(r"most of it is (weights|gradients|optimizer|activations|buffers|logits|cache)", message)


@pytest.mark.parametrize(("name", "changes"), MEMORY)
def test_the_change_that_is_named_makes_it_fit(name: str, changes: Changes) -> None:
    message = refusal(name, changes, mp.InfeasibleError)
    assert plannable(name, changes | _remedy(name, changes, message)), message


def _remedy(name: str, changes: Changes, message: str) -> Changes:
    more = re.search(r"use more GPUs, ([\d.]+) times as many", message)
    if more:
        times = 1
        while times < ceil(float(more[1])):
            times *= 2
        return {"nodes": mp.load(name, changes).cluster.num_nodes * times}
    named = re.findall(r"(\w+) (none|selective|full|\d+)", message.rpartition("use ")[2])
    assert named, message
    return {f"choose.{field}": value if value.isalpha() else int(value) for field, value in named}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("small-4-gpus", {"cluster.gpu.memory": "60 MB"}),
        ("small-4-gpus", {"cluster.gpu.memory": "70 MB"}),
        ("small-8-gpus", {"cluster.gpu.memory": "50 MB"}),
        ("small-two-nodes", {"cluster.gpu.memory": "1 MB"}),
    ],
)
def test_the_plan_that_is_called_the_smallest_is_as_large_as_is_said(name: str, changes: Changes) -> None:
    message = refusal(name, changes, mp.InfeasibleError)
    said = re.search(r"needs ([\d.]+) times the usable", message)
    needs, usable = (parse(size, "B") for size in re.findall(r"[\d.]+ [kMG]?B", message)[:2])
    assert said is not None
    assert needs / usable == pytest.approx(float(said[1]), rel=0.02)


# choices that exclude one another

NO_LAYOUT: list[tuple[Changes, tuple[str, ...]]] = [
    ({"choose.dp": 4, "choose.tp": 2}, ("dp", "tp")),
    ({"choose.ep": 4, "choose.tp": 4, "choose.etp": 2}, ("ep", "etp")),
    ({"choose.cp": 2, "workload.sequence": 511}, ("sequence",)),
    ({"choose.schedule": "dual_pipe", "choose.vpp": 2, "choose.pp": 1}, ("dual_pipe",)),
    ({"choose.schedule": "one_f_one_b", "choose.vpp": 2}, ("one_f_one_b", "vpp")),
    ({"choose.schedule": "interleaved", "choose.vpp": 8, "choose.pp": 4}, ("layers",)),
]


@pytest.mark.parametrize(("changes", "words"), NO_LAYOUT)
def test_choices_that_exclude_one_another_are_infeasible_and_not_a_crash(
    changes: Changes, words: tuple[str, ...]
) -> None:
    message = refusal("small-4-gpus", changes, mp.InfeasibleError)
    assert "small-4-gpus" in message
    assert "choose" in message


@pytest.mark.parametrize(("changes", "words"), [each for each in NO_LAYOUT if each[1] != ("layers",)])
def test_choices_that_exclude_one_another_are_named(changes: Changes, words: tuple[str, ...]) -> None:
    message = refusal("small-4-gpus", changes, mp.InfeasibleError)
    for word in words:
        assert re.search(rf"\b{word}\b", message)


@pytest.mark.parametrize(
    "changes",
    [{"choose.all_to_all": "two_stage"}, {"choose.overlap_degree": 2, "choose.ep": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_choice_without_effect_is_not_replaced_in_silence(changes: Changes) -> None:
    message = refusal("small-4-gpus", changes, mp.InfeasibleError)
    assert next(iter(changes)) in message


def test_too_little_time_is_not_taken_for_too_little_memory() -> None:
    with pytest.raises(mp.InfeasibleError, match="time limit") as caught:
        mp.plan("small-two-nodes", time_limit_s=1e-9)
    assert "memory" not in str(caught.value)
