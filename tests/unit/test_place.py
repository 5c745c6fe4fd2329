"""`place`: loads from files of every kind, what is wrong with them, and the documents that go in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import moeplan as mp
from moeplan.cli import app
from moeplan.importers.expert_load import read

COUNTS = np.array([[40, 10, 10, 20, 5, 5, 30, 8], [1, 2, 3, 4, 5, 6, 7, 8]])


def written(folder: Path, kind: str) -> Path:
    """The counts in a file of one kind."""
    path = folder / f"counts.{kind}"
    if kind == "npz":
        np.savez(path, counts=COUNTS)
    elif kind == "csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in COUNTS))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"layer": at, "counts": row.tolist()}) for at, row in enumerate(COUNTS)))
    else:
        rows = [COUNTS[0].tolist(), [0] * 8, COUNTS[1].tolist()]
        path.write_text(json.dumps({"logical_count": [rows, np.zeros((3, 8)).tolist()], "rank": 0}))
    return path


@pytest.mark.parametrize("kind", ["npz", "csv", "jsonl", "json"])
def test_every_kind_of_file_gives_the_same_load(tmp_path: Path, kind: str) -> None:
    found = read(written(tmp_path, kind))
    assert np.array_equal(found.tokens_TLSE.sum(axis=(0, 2)), COUNTS)
    assert found.layers == ((0, 2) if kind == "json" else (0, 1))


def test_a_list_of_counts_needs_no_order(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    rows = [f"{layer},{expert},{COUNTS[layer, expert]}" for layer in (1, 0) for expert in reversed(range(8))]
    path.write_text("\n".join(["layer,expert,tokens", *rows]))
    assert np.array_equal(read(path).tokens_TLSE[0, :, 0], COUNTS)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "1,2\n3", "one length"),
        ("a.csv", "1,-2", "0 or more"),
        ("a.csv", "1,nan", "finite"),
        ("a.csv", "0,0\n1,2", "no token at all"),
        ("a.csv", "", "a row for each layer"),
        ("a.csv", "1,x", "a number"),
        ("a.csv", "layer,expert\n0,0", "layer, expert, tokens"),
        ("a.csv", "layer,expert,tokens\n0,-1,2", "whole number"),
        ("a.csv", "layer,expert,tokens\n0,1", "3 of the header"),
        ("a.jsonl", '{"layer": 0, "counts": [1, "2"]}', "a list of numbers"),
        ("a.jsonl", '{"layer": -1, "counts": [1, 2]}', "whole numbers"),
        ("a.jsonl", '{"layer": 0, "counts": [1, 2]', "whole JSON lines"),
        ("a.json", '{"counts": [[1]]}', "logical_count"),
        ("a.json", '{"logical_count": [[1, 2], [3]]}', "one length"),
        ("a.json", "[", "JSON"),
        ("a.txt", "1", "rename or convert"),
    ],
)
def test_what_is_wrong_with_a_load_is_one_line_that_says_what_helps(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(mp.CatalogueError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_load_cut_off_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "npz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(mp.CatalogueError):
        read(path)


def test_each_layer_is_proven_and_its_shares_add_up() -> None:
    document = mp.place(load=COUNTS, gpus=4, slots=10).document()
    assert [layer["layer"] for layer in document["layers"]] == [0, 1]
    for layer, counts in zip(document["layers"], COUNTS, strict=True):
        shares, load = np.zeros(8), np.zeros(4)
        for each in layer["replicas"]:
            shares[each["expert"]] += each["share"]
            load[each["gpu"]] += counts[each["expert"]] * each["share"]
        assert shares == pytest.approx(1.0)
        assert layer["max_tokens"] == pytest.approx(load.max())
        assert layer["lower_bound_tokens"] <= layer["max_tokens"]
        assert len(layer["replicas"]) == 10


def test_a_placement_can_start_from_a_file_and_keeps_its_budget(tmp_path: Path) -> None:
    before = mp.place(load=COUNTS, gpus=4, placer="block")
    path = tmp_path / "now.json"
    path.write_text(json.dumps(before.document()))
    after = mp.place(load=COUNTS[:, ::-1], gpus=4, now=path, max_moves=2)
    for new, old in zip(after.layers, before.layers, strict=True):
        assert new.placement.moves_from(old.placement) <= 2


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"gpus": 4, "slots": 7}, "slots: 7"),
        ({"gpus": 4, "slots": 33}, "slots: 33"),
        ({"gpus": 0}, "gpus: 0"),
        ({}, "gpus: a load alone"),
        ({"gpus": 4, "max_moves": 2}, "no effect"),
        ({"gpus": 4, "time_limit_s": 0.0}, "time limit"),
        ({"gpus": 4, "objective": "makespan"}, "give a scenario"),
        ({"gpus": 4, "placer": "eplbb"}, "did you mean 'eplb'"),
        ({"gpus": 3, "placer": "eplb"}, "eplb"),
        ({"gpus": 4, "split": "evn"}, "did you mean 'even'"),
        ({"gpus": 4, "now": {"schema": "other"}}, "place --json"),
        ({"gpus": 4, "now": {"schema": "moeplan.placing/v1", "layers": []}}, "0 layers"),
        ({"gpus": 4, "now": {"schema": "moeplan.placing/v1", "layers": [{"replicas": [{}]}]}}, "place --json"),
    ],
)
def test_a_wrong_request_says_what_helps(keywords: dict[str, Any], says: str) -> None:
    with pytest.raises(mp.MoeplanError, match=says):
        mp.place(load=COUNTS, **keywords)


@pytest.mark.parametrize(
    ("load", "says"),
    [
        ([[1, 2, 3], [4, 5]], "load: is no table of numbers; give rows of one length"),
        ([["a", "b"]], "load: is no table of numbers"),
        (-COUNTS, "0 or more"),
        (COUNTS * np.nan, "finite"),
        (COUNTS * 0, "not all 0"),
        (COUNTS * [[1], [0]], "not all 0"),
        (COUNTS[:0], r"shape \(0, 8\)"),
        (COUNTS[0], r"shape \(8,\)"),
    ],
)
def test_counts_that_are_none_are_one_line_that_says_what_helps(load: Any, says: str) -> None:
    with pytest.raises(mp.PlanError, match=says) as caught:
        mp.place(load=load, gpus=4)
    assert "\n" not in str(caught.value)


def test_replicas_that_a_gpu_has_no_memory_for_are_refused_with_how_many_it_has() -> None:
    with pytest.raises(mp.InfeasibleError, match=r"slots: 64 replicas of 58 layers .*; use at most \d+ a GPU"):
        mp.place("deepseek-v3-decode-128xh800", slots=512, placer="block", gpus=8)


def test_a_scenario_places_its_own_routing_by_its_topology() -> None:
    changes = {"routing.skew": 0.9, "choose.ep": 4}
    found = mp.place(mp.load("small-two-nodes", changes), slots=16, objective="makespan", split="optimal")
    for problem, layer in zip(found.problems, found.layers, strict=True):
        assert problem.prices is not None
        assert 0 < layer.lower_bound <= layer.value * (1 + 1e-9)
        assert layer.value >= problem.prices.compute_s * problem.tokens_E.sum() / problem.num_gpus * (1 - 1e-9)


def test_the_command_prints_one_document_or_a_table(tmp_path: Path) -> None:
    path, run = written(tmp_path, "npz"), CliRunner()
    words = ["place", "--load", str(path), "--gpus", "4", "--slots", "12"]
    as_json = run.invoke(app, [*words, "--json"])
    assert as_json.exit_code == 0, as_json.output
    assert json.loads(as_json.stdout)["slots"] == 12
    table = run.invoke(app, words)
    assert table.exit_code == 0
    assert "Proven within" in table.stdout


def test_what_is_wrong_with_the_command_is_status_2(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["place", "--load", str(tmp_path / "none.npz"), "--gpus", "4"])
    assert found.exit_code == 2
    assert "Traceback" not in found.output


def test_tokens_that_choose_together_are_sent_to_few_nodes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    group_N = np.arange(200) % 4
    ids_NLK = np.array([rng.choice(4, 2, replace=False) * 4 + group for group in group_N])[:, None, :]
    path = tmp_path / "ids.npz"
    np.savez(path, ids=ids_NLK)
    found = mp.place(load=path, gpus=8, gpus_per_node=2, objective="visits")
    assert found.layers[0].value == 1.0 == found.layers[0].lower_bound
    assert mp.place(load=path, gpus=8, gpus_per_node=2, objective="visits", placer="block").layers[0].value > 1.5


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"gpus": 8}, "GPUs of a node"),
        ({"gpus": 8, "gpus_per_node": 3}, "nodes of 3"),
        ({"gpus": 8, "gpus_per_node": 2, "slots": 20}, "without replicas"),
        ({"gpus": 8, "gpus_per_node": 2, "objective": "visit"}, "did you mean 'visits'"),
        ({"gpus": 8, "gpus_per_node": 2, "load": [[[0, 1]], [[0]]]}, "load: is no table of numbers"),
    ],
)
def test_a_wrong_request_for_visits_says_what_helps(keywords: dict[str, Any], says: str) -> None:
    ids_NLK = np.arange(32).reshape(8, 1, 4) % 16
    with pytest.raises(mp.PlanError, match=says):
        mp.place(**({"load": ids_NLK, "objective": "visits"} | keywords))


def test_no_gpu_is_the_fullest_in_every_layer() -> None:
    counts = np.tile([100.0, 1.0, 1.0, 1.0], (8, 1)) + np.arange(8)[:, None]
    total_G = np.zeros(4)
    found = mp.place(load=counts, gpus=4)
    for problem, layer in zip(found.problems, found.layers, strict=True):
        np.add.at(total_G, layer.placement.gpu_R, problem.tokens_E[layer.placement.expert_R])
    assert total_G.max() <= 1.1 * total_G.mean()
