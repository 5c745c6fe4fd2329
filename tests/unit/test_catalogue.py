"""Names, overlays, changes, sources and documents of the catalogue."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from moeplan import menu
from moeplan.catalogue import build, document, find, load, names, read_plan, root, scenario_from, show, sources
from moeplan.catalogue.sheet import from_json, from_yaml
from moeplan.domain.plan import Plan
from moeplan.errors import CatalogueError

MIXTRAL = "mixtral-8x7b-64xh100"
FILES = sorted(
    path for folder in ("cost_models", "topologies", "scenarios") for path in (root() / folder).rglob("*.yaml")
)


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


SMALL = """about: A small run
model: tiny-moe
cluster: cpu-host
workload: {phase: train, global_batch: 8, sequence: 128}
routing: {router: zipf, skew: 0.5}
"""


def refusal(read: Callable[..., object], *arguments: object) -> str | None:
    """The message with which `read` refuses, or None."""
    try:
        read(*arguments)
    except CatalogueError as error:
        return str(error)
    return None


# Reading


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_reader_and_ruamel_read_every_file_alike(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert from_yaml(text, path.name).data == YAML(typ="safe", pure=True).load(text)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), PLAIN, max_size=4))
def test_our_json_reader_agrees_with_the_standard_one(data: dict[str, Any]) -> None:
    assert from_json(json.dumps(data), "x.json").data == data


@given(st.text(st.sampled_from("ab: -?&*!|>{}[],#'\"%@\n 01.e~<\t"), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (from_yaml, from_json):
        assert (message := refusal(read, text, "x.yaml")) is None or message.startswith("x.yaml")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.data())
def test_a_scenario_with_a_few_wrong_bytes_loads_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(
        data.draw(st.sampled_from([SMALL, (root() / "scenarios" / f"{MIXTRAL}.yaml").read_text()])).encode()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "wrong.yaml").write_bytes(raw)
    message = refusal(load, tmp_path / "wrong.yaml") or ""
    assert all(line.isprintable() for line in message.split("\n"))


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    assert load(path).workload.sequence == 128
    path.write_text(SMALL.replace("128", "1024"))
    assert load(path).workload.sequence == 1024


def test_a_message_names_the_line_in_the_file_where_the_value_stands(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL.replace("global_batch: 8", "global_batch: 0"))
    with pytest.raises(CatalogueError, match=r"mine\.yaml:4: workload\.global_batch: 0 is not allowed"):
        load(path)


# Names


def test_names_lists_shelves_and_menus() -> None:
    assert "h100-sxm" in names("gpus")
    assert names("cost-models") == names("gpus")
    assert "hgx-h100-rail" in names("topologies")
    assert "mixtral-8x7b" in names("models")
    assert MIXTRAL in names("scenarios")
    assert names("schedules") == menu.names("schedules")


def test_names_of_an_unknown_kind_says_which_there_are() -> None:
    with pytest.raises(CatalogueError, match=r"unknown kind of thing 'gpu'; did you mean 'gpus'\?"):
        names("gpu")


def test_find_says_the_shelf_and_the_file() -> None:
    assert find("h100-sxm") == ("gpus", root() / "cost_models" / "gpus" / "h100-sxm.yaml")
    assert find(MIXTRAL).kind == "scenarios"


def test_the_catalogue_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load(MIXTRAL)
    monkeypatch.chdir(tmp_path)
    assert load(MIXTRAL) == here


def test_an_installed_package_has_its_catalogue_inside(tmp_path: Path) -> None:
    package = Path(menu.__file__).parent
    shutil.copytree(package, tmp_path / "moeplan", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("cost_models", "topologies", "scenarios"):
        shutil.copytree(root() / folder, tmp_path / "moeplan" / "_catalogue" / folder)
    code = f"from moeplan.catalogue import load, root; load({MIXTRAL!r}); print(root())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "moeplan" / "_catalogue"), done.stderr


def test_show_counts_the_parameters_of_a_model() -> None:
    card = show("mixtral-8x7b")
    assert (card["num_layers"], card["num_experts"], card["top_k"]) == (32, 8, 2)
    assert card["total_parameters"] == 46_702_792_704
    assert card["routed_parameters"] == 45_097_156_608
    assert card["active_parameters"] == 46_702_792_704 - 45_097_156_608 * 6 // 8


def test_show_gives_the_first_line_of_a_dish() -> None:
    assert show("zipf") == {"name": "zipf", "kind": "routers", "about": menu.about("routers", "zipf")}


CONFIG = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def test_a_config_of_a_checkpoint_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "small-mixtral").mkdir()
    path = str(written(tmp_path / "small-mixtral", json.dumps(CONFIG), "config.json"))
    assert show(path)["num_layers"] == 6
    scenario = scenario_from(model=path, cluster="hgx-h100-rail", nodes=2, global_batch=64, sequence=128)
    assert scenario.name == "small-mixtral-on-hgx-h100-rail"
    assert scenario.cluster.num_gpus == 16
    assert scenario.routing is not None
    assert scenario.routing.router == "balanced"
    assert build(json.loads(json.dumps(dict(scenario.document)))) == scenario
    assert any("Hugging Face" in row.cite for row in sources(scenario.document))


def test_what_had_to_be_assumed_for_a_config_stands_in_the_bibliography(tmp_path: Path) -> None:
    path = str(
        written(tmp_path, json.dumps(CONFIG | {"model_type": "new_moe", "moe_intermediate_size": 128}), "config.json")
    )
    scenario = scenario_from(model=path, cluster="cpu-host", global_batch=8, sequence=128)
    assert any("'new_moe'" in row.note and "read by aliases" in row.note for row in sources(scenario.document))


def test_flags_make_a_scenario_of_a_dense_model_without_routing() -> None:
    scenario = scenario_from(model="tiny-dense", cluster="cpu-host", global_batch=8, sequence=128, phase="prefill")
    assert scenario.routing is None
    assert scenario.workload.phase == "prefill"


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(
        CatalogueError, match=r"--global-batch: workload\.global_batch|--global-batch: 0 is not allowed"
    ):
        scenario_from(model="tiny-moe", cluster="cpu-host", global_batch=0, sequence=128)
    with pytest.raises(CatalogueError, match=r"--cluster: unknown cluster 'cpu-hots'; did you mean 'cpu-host'\?"):
        scenario_from(model="tiny-moe", cluster="cpu-hots", global_batch=8, sequence=128)


# Overlays


def test_a_scenario_extends_another(tmp_path: Path) -> None:
    path = written(
        tmp_path, f"about: half the machines\nextends: {MIXTRAL}\ncluster: {{nodes: 4}}\nrouting: {{skew: 0.7}}\n"
    )
    scenario, base = load(path), load(MIXTRAL)
    assert scenario.name == "mine"
    assert (scenario.cluster.num_gpus, base.cluster.num_gpus) == (32, 64)
    assert scenario.model == base.model
    assert scenario.workload == base.workload
    assert scenario.routing is not None
    assert scenario.routing.options == {"skew": 0.7}


def test_a_scenario_gives_a_figure_without_a_source_and_that_is_assumed(tmp_path: Path) -> None:
    text = SMALL.replace(
        "cpu-host", "{extends: hgx-h100-rail, nodes: 1, nic: {bandwidth: 25 GB/s, message_overhead: 9 us}}"
    )
    path = written(tmp_path, text)
    scenario = load(path)
    assert scenario.cluster.spec.nic is not None
    assert scenario.cluster.spec.nic.bandwidth_bytes_per_s == 25e9
    assert scenario.cluster.message_overhead_s == 9e-6
    rows = {row.figure: row for row in sources(path)}
    assert rows["cluster.nic.bandwidth"].kind == "assumed"
    assert "mine.yaml, without a source" in rows["cluster.nic.bandwidth"].cite
    assert "mine.yaml" not in rows["cluster.nic.latency"].cite


def test_parts_may_be_files_beside_the_scenario(tmp_path: Path) -> None:
    shutil.copy(find("cpu-host").path, tmp_path / "host.yaml")
    shutil.copy(find("tiny-moe").path, tmp_path / "net.yaml")
    path = written(tmp_path, SMALL.replace("cpu-host", "./host.yaml").replace("tiny-moe", "./net.yaml"))
    assert load(path).cluster.name == "host"
    assert load(path).model == load("tiny-moe-2-ranks").model


def test_a_model_is_changed_in_place(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL.replace("tiny-moe", "{extends: tiny-moe, parts: {experts: {num_experts: 16}}}"))
    assert show("tiny-moe")["num_experts"] == 8
    assert load(path).model.layers[0].experts.num_experts == 16  # type: ignore[union-attr]


def test_another_gpu_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL.replace("cpu-host", "{extends: hgx-h100-rail, nodes: 1, gpu: a100-80gb-sxm}"))
    gpu = load(path).cluster.gpu
    assert gpu.name == "a100-80gb-sxm"
    assert "fp8" not in gpu.peak_flops_per_s
    assert not [row for row in sources(path) if "H100 Tensor Core GPU datasheet" in row.cite and "gpu" in row.figure]


def test_loading_does_not_change_what_is_remembered() -> None:
    before = document(MIXTRAL)
    document(MIXTRAL)["cluster"]["nodes"]["value"] = 1
    load(MIXTRAL, changes={"nodes": 2, "cluster.gpu": "h200-sxm"})
    assert document(MIXTRAL) == before


def test_a_traces_path_is_seen_from_the_scenarios_file(tmp_path: Path) -> None:
    lines = [json.dumps({"layer": layer, "counts": [2, 1, 1, 1, 1, 1, 1, 2]}) for layer in range(4)]
    written(tmp_path, "\n".join(lines), "trace.jsonl")
    path = written(tmp_path, SMALL.replace("{router: zipf, skew: 0.5}", "{router: trace, path: trace.jsonl}"))
    scenario = load(path)
    assert scenario.routing is not None
    assert Path(scenario.routing.options["path"]) == tmp_path / "trace.jsonl"


# Changes


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"nodes": "4"}, lambda s: s.cluster.num_nodes == 4),
        ({"nodes": 4}, lambda s: s.cluster.num_nodes == 4),
        ({"cluster.nic.bandwidth": "25GB/s"}, lambda s: s.cluster.spec.nic.bandwidth_bytes_per_s == 25e9),
        ({"cluster.nic.bandwidth": "200 Gbit/s"}, lambda s: s.cluster.spec.nic.bandwidth_bytes_per_s == 25e9),
        ({"cluster.links.nvlink.efficiency": "50%"}, lambda s: s.cluster.spec.links["nvlink"].efficiency == 0.5),
        ({"cluster.gpu.gemm_efficiency": "70 %"}, lambda s: s.cluster.gpu.gemm_efficiency == pytest.approx(0.7)),
        ({"cluster.gpu.peak_fp4": "3 PFLOP/s"}, lambda s: s.cluster.gpu.peak_flops_per_s["fp4"] == 3e15),
        ({"cluster.gpu": "h200-sxm"}, lambda s: s.cluster.gpu.name == "h200-sxm" and s.cluster.name == "hgx-h100-rail"),
        ({"cluster": "hgx-a100"}, lambda s: s.cluster.name == "hgx-a100"),
        ({"cluster": "hgx-a100", "workload.sequence": "8192"}, lambda s: s.workload.sequence == 8192),
        ({"cluster.fabric.oversubscription": "2.0"}, lambda s: s.cluster.spec.fabric.oversubscription == 2.0),
        ({"model": "mixtral-8x22b"}, lambda s: s.model.num_layers == 56),
        ({"model.parts.experts.num_experts": "16"}, lambda s: s.model.layers[0].experts.num_experts == 16),
        ({"routing.skew": "0.8"}, lambda s: s.routing.options == {"skew": 0.8}),
        ({"routing.router": "balanced"}, lambda s: s.routing.options == {} and s.routing.router == "balanced"),
        ({"routing.seed": "3"}, lambda s: s.routing.seed == 3 and s.routing.options == {"skew": 0.0}),
        ({"choose.tp": "1,2"}, lambda s: s.choices.tp == (1, 2)),
        ({"choose.tp": "[1, 2]"}, lambda s: s.choices.tp == (1, 2)),
        ({"choose.tp": [1, 2]}, lambda s: s.choices.tp == (1, 2)),
        ({"choose.tp": 2}, lambda s: s.choices.tp == (2,)),
        ({"choose.tp": ""}, lambda s: s.choices.tp is None),
        ({"choose.schedule": "gpipe"}, lambda s: s.choices.schedule == ("gpipe",)),
        ({"choose.overlap_gradients": "false"}, lambda s: not s.choices.overlap_gradients),
        ({"choose.precision.compute": "fp8"}, lambda s: s.choices.precision.compute == "fp8"),
        (
            {"choose.capacity.rule": "drop", "choose.capacity.factor": "1.25"},
            lambda s: s.choices.capacity.factor == 1.25,
        ),
        ({"choose.capacity": "{rule: pad, factor: 1.5}"}, lambda s: s.choices.capacity.rule == "pad"),
        ({"workload.phase": "decode"}, lambda s: s.workload.phase == "decode"),
    ],
)
def test_a_change_is_made(changes: dict[str, object], found: Any) -> None:
    scenario = load(MIXTRAL, changes=changes)
    assert found(scenario)
    assert load(json.loads(json.dumps(dict(scenario.document)))) == scenario


def test_a_change_is_the_users_own_source() -> None:
    written = document(MIXTRAL, {"cluster.nic.bandwidth": "25GB/s"})
    assert written["cluster"]["nic"]["bandwidth"] == {"value": "25GB/s", "source": "set by the user"}
    rows = {row.figure: row for row in sources(written)}
    assert rows["cluster.nic.bandwidth"].cite == "set by the user"
    assert rows["cluster.nic.bandwidth"].kind == "assumed"


def test_the_sources_of_a_replaced_part_are_gone() -> None:
    keys = document(MIXTRAL, {"model": "deepseek-v3", "cluster.gpu": "a100-80gb-sxm"})["sources"]
    assert not [key for key in keys if key.startswith(("mixtral-8x7b:", "h100-sxm:"))]
    assert [key for key in keys if key.startswith("deepseek-v3:")]


@pytest.mark.parametrize("section", ["sources", "model", "cluster", "workload", "routing", "choose", "name", "about"])
@pytest.mark.parametrize(
    "value", [None, [], {}, 3, "x", True, {"value": 3}, {"source": "x"}, {"value": {}, "source": []}]
)
def test_a_document_with_a_section_of_another_kind_is_read_or_refused(section: str, value: object) -> None:
    message = refusal(load, document(MIXTRAL) | {section: value}) or ""
    assert message.count("\n") < 3


def test_no_change_gives_the_same_scenario() -> None:
    assert load(MIXTRAL, changes={}) == load(MIXTRAL)
    assert load(MIXTRAL, changes={"nodes": "8"}) == load(MIXTRAL)


# Plans


def test_a_plan_is_read_from_its_own_file_or_from_a_result(tmp_path: Path) -> None:
    plan = Plan(dp=4, pp=2, stages=(2, 2), schedule="gpipe")
    text = plan.model_dump_json(by_alias=True)
    bare = written(tmp_path, text, "plan.json")
    result = written(
        tmp_path, json.dumps({"plan": json.loads(text), "scenario": document(MIXTRAL), "step_s": 1.5}), "result.json"
    )
    assert read_plan(bare) == read_plan(str(result)) == plan
    assert load(result) == load(MIXTRAL)
