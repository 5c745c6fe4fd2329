"""Records of measurements: expressed or refused with a reason, scored right, and never predicted by themselves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import moeplan as mp
from moeplan.accuracy.cases import stages_of, training_case
from moeplan.accuracy.fits import Constants, Observation, fit, table_of
from moeplan.accuracy.intervals import Residual, spread_of, tail_of
from moeplan.accuracy.machines import machine_of
from moeplan.accuracy.records import KINDS, fault, published, read
from moeplan.accuracy.reductions import all_reduce_s
from moeplan.accuracy.scores import Row, kendall, quantile, rankings, summary_of
from moeplan.accuracy.steps import Step, believed_s, step_of
from moeplan.accuracy.tuned import tuned_case
from moeplan.api import simulate
from moeplan.cli import app
from moeplan.errors import MoeplanError

SMALL: dict[str, Any] = {
    "id": "mine-1", "kind": "training_e2e", "completeness": "A",
    "source": {"name": "here", "ref": "one", "table": "two"},
    "model": {
        "name": "small", "key": "small", "layers": 4, "moe_layers": 4, "hidden": 4096, "moe_ffn": 4096, "experts": 8,
        "shared_experts": 0, "top_k": 2, "heads": 32, "kv_heads": 32, "head_dim": 128, "attention": "MHA",
        "vocab": 32000, "seq_len": 2048,
    },
    "hardware": {"gpu": "H100 SXM 80GB", "count": 8, "gpus_per_node": 8},
    "parallel": {
        "tp": 1, "pp": 2, "vpp": 1, "ep": 4, "etp": 1, "cp": 1, "mbs": 1, "gbs": 64, "precision": "BF16",
        "sharding": "ZeRO-1", "recompute": "none", "dispatcher": "alltoall", "routing": "force-balanced",
        "capacity": "dropless", "cuda_graphs": "full_iteration", "overlap_moe_a2a": False, "overlap_grad_reduce": True,
    },
    "measured": {"step_time_s": 0.2},
}  # fmt: skip


def changed(**fields: Any) -> dict[str, Any]:
    """A small record with fields replaced: `hardware__gpu="TPU"`."""
    record = copy.deepcopy(SMALL)
    for path, value in fields.items():
        section, _, key = path.partition("__")
        if key:
            record[section][key] = value
        else:
            record[section] = value
    return record


def written(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps({"records": list(records)}))
    return path


@pytest.fixture(scope="module")
def small() -> tuple[Any, Step]:
    case = training_case(changed())
    return case, step_of(case)


def good(small: tuple[Any, Step]) -> float:
    """A step time that the small record may well have had."""
    return float(f"{1.1 * small[1].seconds:.4g}")


# ---- records


def test_all_published_records_are_read_and_have_a_kind() -> None:
    records = read(published())
    assert len(records) == 768
    assert len({record["id"] for record in records}) == 768
    assert {record["kind"] for record in records} == set(KINDS)
    assert [record["id"] for record in records if fault(record)] == []


def test_what_a_record_leaves_open_of_its_pipeline_is_what_is_predicted_to_be_fastest() -> None:
    """Here small micro-batches of four cost nothing, and chunks are worth a tenth each."""
    record = changed(parallel__vpp=None, parallel__mbs=None, parallel__pp=2)

    def seconds(case: Any) -> float:
        return float(abs(case.plan.micro_batch - 4) + 1 - case.plan.vpp / 10)

    found = tuned_case(record, seconds)
    assert (found.plan.vpp, found.plan.micro_batch) == (2, 4)
    assert {"vpp 2", "mbs 4"} <= set(found.guessed)
    assert tuned_case(record | {"measured": {"step_time_s": 99.0}}, seconds).plan == found.plan


def test_what_a_record_states_is_not_tuned_and_what_does_not_fit_is_not_chosen() -> None:
    asked: list[Any] = []

    def seconds(case: Any) -> float:
        asked.append(case)
        return 1.0 / float(case.plan.micro_batch)

    assert tuned_case(changed(), seconds) == training_case(changed())
    assert not asked
    long = changed(parallel__mbs=None, parallel__pp=1, parallel__gbs=4096, model__seq_len=16384)
    chosen = tuned_case(long, seconds).plan.micro_batch
    assert 1 < chosen < 4096 // 8
    assert {case.plan.micro_batch for case in asked} == {1 << power for power in range(chosen.bit_length())}


def test_every_published_training_record_is_expressed_or_refused_with_a_reason() -> None:
    seen: dict[str, str] = {}
    refused: dict[str, str] = {}
    for record in read(published()):
        if record["kind"] != "training_e2e":
            continue
        key = json.dumps([record["model"], record["hardware"], record["parallel"]], sort_keys=True)
        if key not in seen:
            try:
                training_case(record)
                seen[key] = ""
            except MoeplanError as error:
                seen[key] = str(error)
        if seen[key] and record["scorable"]:
            refused[record["id"]] = seen[key]
    assert sorted(refused) == [
        "mb-25-09-deepseek-v3-gb200-256-fp8-mx-32x32-blocks-t1p8c1v2e64-b2048",
        "tpu-mixtral-8x22b-v6e", "tpu-mixtral-8x7b-v6e",
    ]  # fmt: skip
    assert all(len(reason) > 20 for reason in seen.values() if reason)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (changed(hardware__gpu="TPU v9"), "unknown GPU 'TPU v9'"),
        (changed(hardware__count=12, hardware__gpus_per_node=8), "no whole number of nodes"),
        (changed(parallel__tp=3), "does not divide 8 GPUs"),
        (changed(parallel__ep=3), "ep 3"),
        (changed(parallel__gbs=63), "does not divide global_batch 63"),
        (changed(measured={"step_time_s": 0.0}), "nothing measures"),
        (changed(measured={"step_time_s": math.nan}), "nothing measures"),
        (changed(measured={"step_time_s": math.inf}), "nothing measures"),
        (changed(measured={"step_time_s": "fast"}), "not a number"),
        (changed(measured={}), "holds nothing"),
        (changed(measured={"step_time_s": 40000.0}), "another unit"),
        (changed(kind="training"), "unknown kind 'training'"),
        (changed(weight=-1), "weight"),
        (changed(model__hidden=None), "model.hidden is not recorded"),
        (changed(model__attention="hybrid: Mamba"), "is not expressed"),
        (changed(parallel__precision="INT3"), "parallel.precision"),
        (changed(model__experts=4096, model__moe_ffn=65536), "does not fit"),
    ],
)
def test_a_bad_record_is_named_with_its_reason(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    found = mp.accuracy.assess(written(tmp_path, record))
    assert found.rows == ()
    assert [each.id for each in found.excluded] == ["mine-1"]
    assert words in found.excluded[0].reason
    assert found.lacks_scorable


def test_of_two_units_that_disagree_none_is_believed(tmp_path: Path, small: tuple[Any, Step]) -> None:
    record = changed(measured={"step_time_s": good(small), "tokens_per_s_per_gpu": 1.0})
    reason = mp.accuracy.assess(written(tmp_path, record)).excluded[0].reason
    assert "another unit" in reason


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    path.write_text("records: []\n")
    with pytest.raises(MoeplanError, match="holds no records"):
        mp.accuracy.assess(path)
    path.write_text("records: [{kind: training_e2e}]\n")
    with pytest.raises(MoeplanError, match="has no id"):
        mp.accuracy.assess(path)


def test_missing_weight_is_1_and_missing_scorable_true(tmp_path: Path, small: tuple[Any, Step]) -> None:
    record = changed(measured={"step_time_s": good(small)})
    row = mp.accuracy.assess(written(tmp_path, record)).rows[0]
    assert (row.weight, row.scorable) == (1.0, True)


def test_what_is_left_open_is_said(tmp_path: Path, small: tuple[Any, Step]) -> None:
    record = changed(parallel__mbs=None, parallel__recompute=None, measured={"step_time_s": good(small)})
    row = mp.accuracy.assess(written(tmp_path, record)).rows[0]
    assert row.guessed == ("mbs 1", "recompute none")


def test_a_machine_is_as_the_record_says() -> None:
    rack = {"gpu": "GB200 NVL72", "count": 256, "nvlink_domain": 72, "inter_nic": "400 Gb/s per GPU"}
    assert machine_of(rack) == ("nvl72-gb200", {"nodes": 4, "cluster.gpus_per_node": 64, "cluster.nic.per_node": 64})
    slow = {"gpu": "A800 80GB", "count": 16, "gpus_per_node": 8, "intra_link": "NVLink 400 GB/s bidirectional per GPU"}
    name, changes = machine_of(slow | {"inter_nic": "800 Gb/s RoCE per node"})
    assert name == "hgx-a100"
    assert changes["cluster.links.nvlink.bandwidth"] == "200 GB/s"
    assert changes["cluster.nic.bandwidth"] == "100 Gbit/s"


@pytest.mark.parametrize(
    ("layout", "layers", "count", "stages"),
    [
        ("4x15|1+mtp+loss", 61, 16, (4,) * 15 + (1,)),
        ("Et*3|(tt|)*29m|L", 61, 32, (3,) + (2,) * 29 + (0, 0)),
        ("Et*4|(tttt|)*14tmL", 61, 16, (4,) * 15 + (1,)),
        (None, 126, 64, (1,) + (2,) * 62 + (1,)),
        (None, 8, 4, (2, 2, 2, 2)),
    ],
)
def test_layers_of_stages_are_as_written_or_even(
    layout: str | None, layers: int, count: int, stages: tuple[int, ...]
) -> None:
    assert stages_of(layout, layers, count) == stages


# ---- steps


def test_a_step_of_many_micro_batches_is_as_long_as_simulated_whole(small: tuple[Any, Step]) -> None:
    case, step = small
    assert case.plan.num_microbatches(64) == 16
    whole = simulate(case.scenario, case.plan)
    assert step.seconds == pytest.approx(whole.figures.step_s, rel=2e-3)


def test_what_a_framework_adds_makes_a_step_longer_each_in_its_place(small: tuple[Any, Step]) -> None:
    case, step = small
    nothing = mp.accuracy.Overheads()
    assert believed_s(step, case, nothing) == pytest.approx(step.seconds)
    assert believed_s(step, case, replace(nothing, late_ranks=1.5)) > step.seconds
    host = replace(nothing, host_routed_s=1.0)
    assert believed_s(step, case, host) == pytest.approx(step.seconds)  # all of it is a graph
    assert believed_s(step, replace(case, graphs="none"), host) > 16 * 2 * 1.0


def test_the_fit_says_what_the_steps_say(small: tuple[Any, Step]) -> None:
    case, step = small
    seen = [Observation(group=("a",), case=case, step=step, measured_s=1.3 * step.seconds, weight=1.0)] * 12
    constants = fit(seen)
    table = table_of(seen)
    fitted_s = table.predicted(np.array([constants.values[name] for name in table.names]))[0]
    assert fitted_s == pytest.approx(1.3 * step.seconds, rel=5e-3)
    again = believed_s(step, case, constants.overheads, gpu=constants.gpu(case.scenario.cluster.gpu))
    # The fit takes all products for bound by arithmetic, which some of so small a model are not.
    assert again == pytest.approx(fitted_s, rel=0.03)
    assert fit(seen) == constants


# ---- groups


@pytest.fixture
def two_groups(tmp_path: Path, small: tuple[Any, Step], monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Path]:
    """Published results that are the same small run twice, on two groups; the second measured so many times slower."""

    def written_with(times: float) -> Path:
        first = changed(measured={"step_time_s": good(small)})
        second = changed(id="mine-2", measured={"step_time_s": times * good(small)}, model__key="other")
        path = written(tmp_path, *({**each, "id": f"{each['id']}-{n}"} for n in range(6) for each in (first, second)))
        monkeypatch.setattr("moeplan.accuracy.assessment.published", lambda: path)
        return path

    return written_with


def test_a_group_is_predicted_without_itself(two_groups: Callable[[float], Path]) -> None:
    two_groups(1.0)
    before = {row.id: row.predicted for row in mp.accuracy.assess().rows}
    two_groups(2.0)
    after = {row.id: row.predicted for row in mp.accuracy.assess().rows}
    for name, predicted in after.items():
        is_left_out = name.startswith("mine-2")
        # Its own measurements changed, and must not be seen; the others' prediction is made of them alone.
        assert (predicted == before[name]) == is_left_out


def test_rows_of_ones_own_never_enter_a_fit(
    tmp_path: Path, small: tuple[Any, Step], two_groups: Callable[[float], Path]
) -> None:
    two_groups(1.0)
    for group_out in (None, "hardware.gpu", "model.key"):
        found = []
        for times in (1.0, 3.0):
            mine = changed(id="own", measured={"step_time_s": times * good(small)}, model__key="third")
            path = tmp_path / f"own-{times}.json"
            path.write_text(json.dumps([mine]))
            found.append(mp.accuracy.assess(path, group_out=group_out).rows[0].predicted)
        assert found[0] == found[1]


def test_an_interval_knows_nothing_of_its_own_group() -> None:
    def residual(group: str, ratio: float) -> Residual:
        return Residual(kind="k", tier="interpolated", is_guessed=False, group=(group,), log_ratio=ratio, weight=1.0)

    own = [residual("a", 5.0)] * 50
    others = [residual(f"b{number}", 0.01 * number) for number in range(-10, 11)]
    assert spread_of(own[0], [*others, *own]) == pytest.approx((-0.09, 0.09))
    # One other group tells nothing of how groups differ: no tail is cut off.
    assert spread_of(own[0], [*(replace(each, group=("b",)) for each in others), *own]) == pytest.approx((-0.1, 0.1))
    assert [tail_of(groups) for groups in (1, 3, 19)] == pytest.approx([0.0, 0.05, 0.09])


def test_a_gpu_is_slowed_by_what_its_power_limit_leaves_it() -> None:
    def gpu(name: str) -> Any:
        return mp.cluster_from("hgx-h100-rail", changes={"cluster.gpu": name}).gpu

    constants = Constants(values={"energy_pj:hopper": 1.0, "energy_pj:blackwell": 0.6})
    assert constants.slower(gpu("h100-sxm"), 16) == pytest.approx(989.5 / 700)
    assert constants.slower(gpu("h100-sxm"), 8) == constants.slower(gpu("h100-sxm"), 16)
    assert constants.slower(gpu("h100-96gb"), 16) == pytest.approx(989.5 / 500)
    assert constants.slower(gpu("h20"), 16) == 1.0  # slow enough for its 400 W
    assert constants.slower(gpu("a100-80gb-sxm"), 16) == pytest.approx(312 / 400 / 0.7)
    assert constants.slower(gpu("b200"), 16) == pytest.approx(0.6 * 2.25)


def test_attention_that_is_not_fused_norms_that_are_not_divided_and_layers_done_again_take_longer() -> None:
    plain = training_case(changed(parallel__tp=2, parallel__ep=2))
    assert plain.fuses_attention
    assert plain.divides_norms
    before = step_of(plain)
    for change in ({"fuses_attention": False}, {"divides_norms": False}, {"recomputes_products": True}):
        after = step_of(replace(plain, **change))
        assert after.device_s > before.device_s
        assert after.causes_s["tensor_traffic"] == before.causes_s["tensor_traffic"]
    full = replace(plain, plan=plain.plan.model_copy(update={"recompute": "full"}))
    half = step_of(replace(full, recomputed=0.5)).seconds
    assert half == pytest.approx((before.seconds + step_of(full).seconds) / 2)
    old = changed(source={"name": "here", "date": "2022-05"})
    assert not training_case(old).fuses_attention
    assert training_case(changed(parallel__recompute="full, block, 1 layers")).recomputed == 0.5


def test_servers_reduce_short_messages_in_one_go_and_trees_reach_over_nodes() -> None:
    node = mp.cluster_from("hgx-h100-rail", nodes=1)
    short, long = (all_reduce_s(node, ranks=8, size_bytes=size) for size in (8e3, 64e6))
    assert 5e-6 < short < 6e-6
    assert long < 5e-6 + 7 * 64e6 / (450e9 * 0.7)  # in two turns
    pair = mp.cluster_from("hgx-h100-rail", nodes=2)
    assert all_reduce_s(pair, ranks=16, size_bytes=8e3) == pytest.approx(25.2e-6, rel=0.02)
    assert all_reduce_s(node, ranks=1, size_bytes=8e3) == 0.0


# ---- scores


def row(error: float, *, weight: float = 1.0, interval: tuple[float, float] = (0.0, 10.0), **tags: str) -> Row:
    return Row(
        id="r", kind="training_e2e", completeness="A", quantity="step_time_s", predicted=1 + error, measured=1.0,
        interval=interval, tier="interpolated", weight=weight, scorable=True, tags=tags, guessed=(),
    )  # fmt: skip


def test_a_summary_is_weighted_and_counts_what_intervals_hold() -> None:
    rows = [row(0.1, weight=3.0), row(-0.2, interval=(0.0, 0.9)), row(0.4), row(-0.3, interval=(1.1, 2.0))]
    found = summary_of(rows)
    assert found.n == 4
    assert found.median_error == pytest.approx(0.1)
    assert found.p90_error == pytest.approx(0.4)
    assert found.bias == pytest.approx((0.3 - 0.2 + 0.4 - 0.3) / 6)
    assert found.coverage == pytest.approx(4 / 6)


def test_quantiles_are_of_the_weight() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 8.0])
    assert [quantile(values, weights, share) for share in (0.1, 0.5, 0.9, 1.0)] == [1.0, 2.0, 2.0, 3.0]


def test_kendall_counts_pairs() -> None:
    assert kendall(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4])) == 1
    assert kendall(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == -1
    assert kendall(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])) == pytest.approx(4 / 6)


def test_a_ranking_says_where_the_measured_best_was_foreseen() -> None:
    tags = {"model": "m", "gpu": "g", "scale": "8", "tokens": "1"}
    rows = [replace(row(error, **tags, layout=str(n)), measured=1.0 + n) for n, error in enumerate((0.9, 0.5, 3, 4))]
    found = rankings(rows)
    assert [(each.n, each.best_place) for each in found] == [(4, 2)]


# ---- the command


def test_the_command_prints_one_document_and_fails_where_a_row_is_not_expressed(
    tmp_path: Path, small: tuple[Any, Step]
) -> None:
    right, wrong = changed(measured={"step_time_s": good(small)}), changed(id="mine-2", hardware__gpu="TPU v9")
    plot = tmp_path / "parity.png"
    command = ["accuracy", "--results", str(written(tmp_path, right, wrong)), "--json", "--plot", str(plot)]
    first, second = (CliRunner().invoke(app, command) for _ in range(2))
    assert first.exit_code == 1
    assert first.stdout == second.stdout
    document = json.loads(first.stdout)
    assert document["schema"] == "moeplan.accuracy/v1"
    assert {"id", "predicted", "measured", "error", "interval", "tier"} <= document["rows"][0].keys()
    low, high = document["rows"][0]["interval"]
    assert low < high
    assert set(document["summary"]["training_e2e"]["A"]) == {"n", "median_error", "p90_error", "bias", "coverage"}
    assert [each["id"] for each in document["excluded"]] == ["mine-2"]
    assert document["num_constants"] > 0
    assert plot.stat().st_size > 1000


def test_the_command_is_content_with_rows_that_are_all_expressed(tmp_path: Path, small: tuple[Any, Step]) -> None:
    path = written(tmp_path, changed(measured={"step_time_s": good(small)}))
    found = CliRunner().invoke(app, ["accuracy", "--results", str(path)])
    assert found.exit_code == 0, found.output
    assert "mine-1" in found.stdout
    assert CliRunner().invoke(app, ["accuracy", "--kind", "nothing"]).exit_code == 2
