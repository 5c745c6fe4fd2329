"""Every scenario of the catalogue loads, explains itself, and survives being written out and read again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from moeplan.catalogue import document, load, names, root, show, sources
from moeplan.catalogue.files import SHELVES

SCENARIOS = names("scenarios")


def test_there_are_scenarios_of_every_kind() -> None:
    scenarios = [load(name) for name in SCENARIOS]
    assert len(scenarios) >= 12
    assert {scenario.workload.phase for scenario in scenarios} == {"train", "prefill", "decode"}
    assert {bool(scenario.model.moe_layers) for scenario in scenarios} == {True, False}
    assert {1, 2, 16, 256} <= {scenario.cluster.num_nodes for scenario in scenarios}


def test_names_are_unique_across_the_catalogue() -> None:
    counts = Counter(name for shelf in SHELVES for name in names(shelf))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_says_what_it_is(name: str) -> None:
    about = document(name)["about"]
    assert about[0].isupper()
    assert 20 < len(about) < 120
    assert not about.endswith(".")


@pytest.mark.parametrize("name", SCENARIOS)
def test_its_document_read_again_is_an_equal_scenario(name: str, tmp_path: Path) -> None:
    found, written = load(name), document(name)
    assert load(json.loads(json.dumps(written))) == found
    (tmp_path / "document.json").write_text(json.dumps(written))
    assert load(tmp_path / "document.json") == found
    assert document(tmp_path / "document.json") == written


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_name_has_the_number_of_gpus_in_it_where_it_has_a_number(name: str) -> None:
    last = name.rpartition("-")[2].partition("x")[0]
    if last.isdigit():
        assert load(name).cluster.num_gpus == int(last)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_figure_behind_it_has_a_source(name: str) -> None:
    rows = sources(name)
    assert {row.kind for row in rows} <= {"published", "measured", "assumed"}
    assert all(row.cite.strip() and row.value for row in rows)
    figures = {row.figure for row in rows}
    assert {"workload.global_batch", "workload.sequence", "model.dimensions"} <= figures
    assert {"cluster.nodes", "cluster.gpu.memory", "cluster.gpu.gemm_efficiency"} <= figures


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_source_that_is_listed_is_a_source_that_is_used(name: str) -> None:
    written = document(name)
    assert {row.cite for row in sources(name)} == {row["cite"] for row in written["sources"].values()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_its_model_holds_in_the_memory_of_the_cluster(name: str) -> None:
    scenario = load(name)
    weights = 2 * scenario.model.total_parameters
    assert weights < scenario.cluster.num_gpus * scenario.cluster.gpu.usable_memory_bytes


@pytest.mark.parametrize("shelf", sorted(SHELVES))
def test_everything_on_a_shelf_can_be_shown(shelf: str) -> None:
    for name in names(shelf):
        assert show(name)["name"] == name
        assert json.dumps(show(name))
        assert sources(name)


def test_no_file_of_the_catalogue_is_out_of_reach() -> None:
    shelves = {root() / folder for folder in SHELVES.values()}
    files = [
        path for folder in ("cost_models", "topologies", "scenarios") for path in (root() / folder).rglob("*.y*ml")
    ]
    assert {path for path in files if path.parent not in shelves} <= {
        path for path in files if {"published", "exchanges", "overheads", "intervals.yaml"} & set(path.parts)
    }
