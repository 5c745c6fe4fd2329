"""The laws of the routers menu on every router found there, and the measured figures that some of them stand for."""

import gzip
import inspect
import json
import os
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan import menu, routers
from moeplan.domain.routing import Routing
from moeplan.errors import CatalogueError

NAMES = menu.names("routers")
SHAPES = [(1, 1, 1, 1, 1), (3, 8, 2, 4, 16), (2, 8, 8, 2, 5), (2, 60, 4, 3, 7), (24, 32, 2, 2, 64), (5, 256, 8, 2, 100)]
TRACES = Path(os.environ.get("MOEPLAN_SHARED", Path(__file__).parents[3] / "shared")) / "reference" / "traces"
recorded = pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not here; set MOEPLAN_SHARED")


def given_of(shape: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    names = ("num_layers", "num_experts", "top_k", "num_sources", "tokens_per_source")
    return dict(zip(names, shape, strict=True)) | {"rng": np.random.default_rng(seed)}


def options_of(name: str, shape: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Options for those routers that cannot do without; one that is new on the menu needs defaults or a line here."""
    num_layers, num_experts, top_k, *_ = shape
    if name == "hot_experts":
        return {"share": min(1 / top_k, 0.5 + 0.5 / num_experts)}
    if name == "trace":
        np.savez(folder / "flat.npz", counts=np.ones((num_layers, num_experts), dtype=np.int32))
        return {"path": str(folder / "flat.npz")}
    return {}


@pytest.fixture(params=NAMES)
def dish(request: pytest.FixtureRequest) -> ModuleType:
    """Each router on the menu."""
    return menu.module("routers", request.param)


def run(dish: ModuleType, shape: tuple[int, ...], folder: Path, seed: int = 0) -> Routing:
    name = dish.__name__.rsplit(".", 1)[1]
    routing = dish.route(**given_of(shape, seed), **options_of(name, shape, folder))
    assert isinstance(routing, Routing)
    return routing


def test_a_router_takes_what_all_take_and_keyword_only_options(dish: ModuleType) -> None:
    parameters = inspect.signature(dish.route).parameters
    assert parameters.keys() >= routers.GIVEN
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in parameters.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_picks_top_k_different_experts(dish: ModuleType, shape: tuple[int, ...], tmp_path: Path) -> None:
    num_layers, num_experts, top_k, num_sources, tokens = shape
    routing = run(dish, shape, tmp_path)
    assert routing.tokens_LSE.shape == (num_layers, num_sources, num_experts)
    np.testing.assert_allclose(routing.tokens_LSE.sum(axis=2), tokens * top_k, rtol=1e-9)
    assert routing.tokens_LSE.min() >= 0
    assert routing.tokens_LSE.max() <= tokens * (1 + 1e-9)
    assert routing.dropped_LSE is None
    assert routing.padded_LSE is None


def test_the_same_seed_gives_the_same_bytes(dish: ModuleType, tmp_path: Path) -> None:
    first, second = (run(dish, SHAPES[1], tmp_path, seed=7).tokens_LSE for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.dtype == second.dtype


def test_nobody_can_write_into_a_routing(dish: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        run(dish, SHAPES[1], tmp_path).tokens_LSE[0, 0, 0] = 1


def test_more_picks_than_experts_are_refused(dish: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="top_k: 9 is not 1 to num_experts 8"):
        dish.route(**given_of((1, 8, 9, 1, 4)), **options_of(dish.__name__.rsplit(".", 1)[1], SHAPES[1], tmp_path))


def route(name: str, shape: tuple[int, ...], seed: int = 0, **options: Any) -> Routing:
    routing = menu.load("routers", name, "route")(**given_of(shape, seed), **options)
    assert isinstance(routing, Routing)
    return routing


@pytest.mark.parametrize("shape", SHAPES)
def test_without_skew_zipf_is_balanced_to_the_last_bit(shape: tuple[int, ...]) -> None:
    balanced = route("balanced", shape)
    assert balanced.is_balanced
    assert route("zipf", shape).tokens_LSE.tobytes() == balanced.tokens_LSE.tobytes()


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.floats(0, 20), st.integers(1, 64), st.data())
def test_zipf_follows_its_law_wherever_no_expert_is_full(skew: float, num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    routing = route("zipf", (2, num_experts, top_k, 1, 1000), skew=skew)
    found = np.sort(routing.tokens_LSE[1, 0])[::-1]
    law = np.arange(1.0, num_experts + 1) ** -skew
    free = found < 1000 * (1 - 1e-9)
    np.testing.assert_allclose(found[free] / found[free].sum(), law[free] / law[free].sum(), rtol=1e-6, atol=1e-9)
    assert not free[: (~free).sum()].any()


def test_more_skew_never_cools_the_hottest_expert() -> None:
    hottest = [route("zipf", (1, 64, 4, 1, 512), skew=skew).max_over_mean_L[0] for skew in np.linspace(0, 3, 13)]
    assert (np.diff(hottest) >= -1e-9).all()
    assert hottest[-1] == pytest.approx(64 / 4)


def test_hot_experts_get_their_share_and_the_others_the_rest_evenly() -> None:
    routing = route("hot_experts", (3, 16, 2, 2, 100), num_hot=2, share=0.5)
    for load_E in routing.load_LE:
        assert sorted(load_E)[-2:] == pytest.approx([100.0, 100.0])
        assert sorted(load_E)[:-2] == pytest.approx([200 / 14] * 14)


@pytest.mark.parametrize(
    "options", [{"share": 0.6}, {"share": 0.01}, {"share": 0.2, "num_hot": 0}, {"share": float("nan")}]
)
def test_hot_experts_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CatalogueError, match=r"routing\.options\.(share|num_hot): .* is not .*; use"):
        route("hot_experts", (1, 8, 2, 1, 10), **options)


def test_fair_draws_scatter_and_repel_as_sets_without_replacement_do() -> None:
    num_experts, top_k, tokens = 16, 4, 200
    counts = route("multinomial", (400, num_experts, top_k, 10, tokens)).tokens_LSE.reshape(-1, num_experts)
    q = top_k / num_experts
    covariance = np.cov(counts.T.astype(float))
    others = covariance[~np.eye(num_experts, dtype=bool)]
    assert counts.mean(axis=0) == pytest.approx(tokens * q, rel=0.01)
    assert np.diag(covariance).mean() == pytest.approx(tokens * q * (1 - q), rel=0.03)
    assert others.mean() == pytest.approx(-tokens * q * (1 - q) / (num_experts - 1), rel=0.03)
    assert np.abs(others - others.mean()).max() < 6 * tokens * q * (1 - q) / np.sqrt(len(counts))


def test_a_token_that_picks_all_experts_but_one_leaves_out_each_alike() -> None:
    counts = route("multinomial", (200, 5, 4, 1, 1000)).tokens_LSE
    assert (1000 - counts).sum(axis=2).min() == (1000 - counts).sum(axis=2).max() == 1000
    assert counts.mean(axis=(0, 1)) == pytest.approx(800, abs=5)


MEASURED = {1: (1.54, 31.3), 51: (14.2, 4.5), 501: (9.1, 10.0), 2001: (11.6, 8.1), 5001: (12.6, 7.4)}
SMARTMOE = (24, 32, 2, 16, 8192)


def shares(iteration: int, seed: int) -> np.ndarray[Any, Any]:
    load_LE = route("drifting", SMARTMOE, seed, iteration=iteration).load_LE
    return np.asarray(load_LE / load_LE.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("iteration", MEASURED)
def test_drifting_is_as_uneven_as_measured_at_each_iteration_of_the_log(iteration: int) -> None:
    routings = [route("drifting", SMARTMOE, seed, iteration=iteration) for seed in range(4)]
    max_over_mean, effective = MEASURED[iteration]
    assert np.mean([each.max_over_mean_L.mean() for each in routings]) == pytest.approx(max_over_mean, rel=0.05)
    assert np.mean([each.effective_experts_L.mean() for each in routings]) == pytest.approx(effective, rel=0.05)


def test_drifting_has_the_measured_popularity_late_in_training() -> None:
    late_LE = np.mean([np.sort(shares(5001, seed), axis=1)[:, ::-1] for seed in range(4)], axis=0)
    mean_E = late_LE.mean(axis=0)
    measured = [0.393, 0.192, 0.101, 0.071, 0.055, 0.044, 0.032, 0.023]
    np.testing.assert_allclose(mean_E[:8], measured, atol=0.02)
    assert [mean_E[:top].sum() for top in (4, 8, 16)] == pytest.approx([0.76, 0.91, 0.985], abs=0.015)
    assert late_LE[19, 0] == pytest.approx(0.15, abs=0.04)
    assert late_LE[[11, 14], 0] == pytest.approx([0.5, 0.46], abs=0.06)


def test_drifting_drifts_as_slowly_as_measured() -> None:
    for lag, measured in [(50, 0.022), (100, 0.022), (500, 0.027), (1000, 0.036)]:
        pairs = [(shares(t, seed), shares(t + lag, seed)) for seed in range(3) for t in (2501, 3301, 4001)]
        distance = np.mean([np.abs(now - then).sum(axis=1).mean() / 2 for now, then in pairs])
        assert distance == pytest.approx(measured, rel=0.2)
        if lag == 50:
            assert np.mean([(now.argmax(axis=1) == then.argmax(axis=1)).mean() for now, then in pairs]) > 0.93
    kept = np.mean(
        [(shares(1001, seed).argmax(axis=1) == shares(5001, seed).argmax(axis=1)).mean() for seed in range(4)]
    )
    assert kept == pytest.approx(0.83, abs=0.1)


def test_drifting_microbatches_differ_as_the_measured_ones_do() -> None:
    share_LSE = route("drifting", (24, 32, 2, 16, 2048), iteration=5001).tokens_LSE / 4096
    distance = np.abs(share_LSE[:, ::2] - share_LSE[:, 1::2]).sum(axis=2).mean() / 2
    assert distance == pytest.approx(0.024, rel=0.15)


def test_another_iteration_of_the_same_run_keeps_its_experts_and_another_seed_does_not() -> None:
    assert (shares(3001, 0).argmax(axis=1) == shares(3002, 0).argmax(axis=1)).mean() > 0.9
    assert (shares(3001, 0).argmax(axis=1) == shares(3001, 1).argmax(axis=1)).mean() < 0.3


@pytest.mark.parametrize("shape", [(1, 4, 2, 2, 64), (60, 256, 8, 1, 64), (3, 8, 7, 2, 64)])
def test_drifting_works_for_models_unlike_the_measured_one(shape: tuple[int, ...]) -> None:
    for iteration in (0, 30, 10**8):
        assert 1 <= route("drifting", shape, iteration=iteration).max_over_mean_L.max() <= shape[1] / shape[2] + 1e-9


COUNTS = np.array([[4, 2, 1, 1], [1, 1, 3, 3]])
SMALL = (2, 4, 2, 2, 10)
EXPECTED = COUNTS / 8 * 20


def test_counts_of_every_shape_are_scaled_to_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    per_source = np.stack([COUNTS, COUNTS], axis=1)
    for counts in (
        COUNTS,
        np.stack([COUNTS, COUNTS]),
        per_source[None],
        COUNTS.astype(">f4"),
        np.asfortranarray(COUNTS),
    ):
        np.savez_compressed(path, x=counts)
        found = route("trace", SMALL, path=str(path)).tokens_LSE
        np.testing.assert_allclose(found, np.stack([EXPECTED, EXPECTED], axis=1))


def test_a_step_and_a_source_of_a_trace_keep_their_own_proportions(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    np.savez(path, x=np.stack([np.stack([COUNTS, COUNTS[:, ::-1]], axis=1), np.ones((2, 2, 4), dtype=int)]))
    found = route("trace", SMALL, path=str(path), step=0).tokens_LSE
    np.testing.assert_allclose(found, np.stack([EXPECTED, EXPECTED[:, ::-1]], axis=1))
    with pytest.raises(CatalogueError, match="step: 2 is not 0 to 1"):
        route("trace", SMALL, path=str(path), step=2)


def write_lines(path: Path, records: list[Any]) -> str:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["counts.jsonl", "counts.jsonl.gz"])
def test_json_lines_of_counts_are_read(name: str, tmp_path: Path) -> None:
    records = [{"layer": layer, "step": step, "counts": COUNTS[layer].tolist()} for layer in (1, 0) for step in (0, 7)]
    found = route("trace", SMALL, path=write_lines(tmp_path / name, records), step=7).tokens_LSE
    np.testing.assert_allclose(found, np.stack([EXPECTED, EXPECTED], axis=1))


def test_the_router_trace_of_megatron_is_read(tmp_path: Path) -> None:
    ids = [[0, 1], [0, 2], [3, 0], [1, 0]]
    shared = {"stage": "pre_dispatch", "rank": 3, "num_tokens": 4, "topk": 2, "top_indices": ids}
    records = [
        {"step": step, "block": block, "layer": layer, **shared, **({"mtp_idx": 0} if block == "mtp" else {})}
        for step in (0, 1) for block, layer in (("decoder", 3), ("decoder", 5), ("mtp", 1))
    ]  # fmt: skip
    path = write_lines(tmp_path / "router_trace_rank3.jsonl", records)
    for num_layers in (2, 3):
        found = route("trace", (num_layers, 4, 2, 2, 8), path=path).tokens_LSE
        np.testing.assert_allclose(found, np.broadcast_to([8.0, 4.0, 2.0, 2.0], (num_layers, 2, 4)))


FULL = {"layer": 0, "counts": [1, 1, 1, 1]}
IDS = {"layer": 0, "top_indices": [[0, 1]]}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([1], "line 1: list is not a JSON object"),
        ({"counts": [1, 1, 1, 1]}, "line 1: layer: nothing"),
        (FULL | {"layer": -2}, "layer: -2 is not a whole number"),
        (FULL | {"layer": True}, "layer: True is not a whole number"),
        (FULL | {"layer": 10**30}, "layer: 10+"),
        (FULL | {"step": "x"}, "step: 'x'"),
        (FULL | {"block": "vision"}, "block: 'vision' is not decoder or mtp"),
        (FULL | {"top_indices": [[0, 1]]}, "either counts or top_indices"),
        ({"layer": 0}, "either counts or top_indices"),
        (FULL | {"counts": [1, 1, 1]}, "is not 4 numbers"),
        (FULL | {"counts": [1, 1, 1, -1]}, "finite number from 0"),
        (FULL | {"counts": [1, 1, 1, 10**400]}, "finite number from 0"),
        (FULL | {"counts": [1, 1, 1, "9"]}, "finite number from 0"),
        (FULL | {"counts": [1, [1], 1, 1]}, "rows of one length"),
        (FULL | {"counts": [0, 0, 0, 0]}, "layer 0, source 0: no tokens at all"),
        (FULL | {"counts": [9, 1, 1, 1]}, "expert 0: a share of 0.75 is not possible with top_k 2"),
        (FULL | {"layer": 1}, "layers: 2 is not the 1 of the model"),
        (IDS | {"top_indices": [[0, 4]]}, "expert id is not a whole number from 0 to 3"),
        (IDS | {"top_indices": [[0, -1]]}, "expert id is not"),
        (IDS | {"top_indices": [[0, 1.5]]}, "expert id is not"),
        (IDS | {"top_indices": [[0, 1, 2]]}, "top_k 2"),
        (IDS | {"top_indices": [[0, 1], [2]]}, "rows of one length"),
        (IDS | {"num_tokens": 3}, "num_tokens: 3 is not 1"),
        (FULL | {"counts": [1, 1, 1, float("nan")]}, "NaN is not a finite number"),
    ],
)
def test_an_odd_line_of_a_trace_is_refused_with_its_place(record: Any, says: str, tmp_path: Path) -> None:
    records = [record, FULL] if record == FULL | {"layer": 1} else [record]
    path = write_lines(tmp_path / "odd.jsonl", records)
    with pytest.raises(CatalogueError, match=says):
        route("trace", (1, 4, 2, 1, 8), path=path)


@pytest.mark.parametrize(
    ("array", "options", "says"),
    [
        (np.ones((2, 5)), {}, "experts: 5 is not the 4 of the model"),
        (np.ones((3, 4)), {}, "layers: 3 is not the 2 of the model"),
        (np.ones(4), {}, r"shape \(4,\) is not \[layer, expert\]"),
        (np.full((2, 4), np.inf), {}, "finite number"),
        (-np.ones((2, 4)), {}, "finite number"),
        (np.zeros((2, 4)), {}, "no tokens at all"),
        (np.ones((2, 4), dtype=complex), {}, "dtype complex128 is not whole or real numbers"),
        (np.full((2, 4), None), {}, "dtype object is not whole or real numbers"),
        (np.ones((0, 2, 4)), {}, r"shape \(0, 2, 4\)"),
        (np.ones((2, 4)), {"array": "y"}, "'y' is not in the file; use one of: x"),
        (np.ones((2, 4)), {"holds": "bytes"}, "'bytes' is not counts or expert_ids"),
        (np.ones((9, 2, 2)), {"holds": "expert_ids"}, "expert id is not a whole number"),
        (np.full((9, 2, 2), 4), {"holds": "expert_ids"}, "expert id is not a whole number from 0 to 3"),
        (np.ones((9, 2, 3), dtype=int), {"holds": "expert_ids"}, r"is not \[token, layer, 2\]"),
        (np.ones((9, 2, 2), dtype=int), {"holds": "expert_ids", "step": 1}, "have no steps"),
    ],
)
def test_an_odd_array_is_refused(array: Any, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", x=array)
    with pytest.raises(CatalogueError, match=says):
        route("trace", SMALL, path=str(tmp_path / "odd.npz"), **options)


def test_a_file_that_is_cut_missing_strange_or_a_folder_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=COUNTS)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"layer": 0}' * 99)[:-9])
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "counts.csv").write_text("1,2")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("cut.npz", "cut.jsonl.gz", "deep.jsonl", "counts.csv", "empty.jsonl", "absent.npz", "."):
        with pytest.raises(CatalogueError, match=r" is not .*; "):
            route("trace", SMALL, path=str(tmp_path / name))


@pytest.mark.parametrize("options", [{"array": "x"}, {"holds": "expert_ids"}])
def test_options_of_arrays_have_no_effect_on_lines_and_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="is not of effect"):
        route("trace", SMALL, path=write_lines(tmp_path / "x.jsonl", [FULL]), **options)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.routers._trace_files.MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.ones((2, 4000)))
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 10**6))
    for name in ("bomb.npz", "bomb.jsonl.gz"):
        with pytest.raises(CatalogueError, match="at most 1000 bytes unpacked"):
            route("trace", SMALL, path=str(tmp_path / name))


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 4, 1000000000), }\n"
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(CatalogueError, match=r"shape \(2, 4, 1000000000\) is not what"):
        route("trace", SMALL, path=str(tmp_path / "liar.npz"))


@recorded
@pytest.mark.parametrize("task", ["intent", "law"])
def test_recorded_deepseek_v2_lite_tasks_are_as_skewed_as_documented(task: str) -> None:
    path = str(TRACES / "deepseek_v2_lite_top6.npz")
    routing = route("trace", (26, 64, 6, 4, 4096), path=path, array=f"topk_{task}", holds="expert_ids")
    assert 3.25 <= np.median(routing.max_over_mean_L) <= 5.6


@recorded
@pytest.mark.parametrize("domain", ["arxiv", "book", "c4", "github", "wikipedia"])
def test_recorded_olmoe_and_mixtral_loads_are_as_skewed_as_documented(domain: str) -> None:
    path = str(TRACES / "olmoe_mixtral_counts.npz")
    olmoe = route("trace", (3, 64, 8, 4, 4096), path=path, array=f"olmoe_{domain}")
    mixtral = route("trace", (3, 8, 2, 4, 4096), path=path, array=f"mixtral_{domain}")
    assert 2.5 <= np.median(olmoe.max_over_mean_L) <= 7.5
    assert 1.1 <= np.median(mixtral.max_over_mean_L) <= 1.35
