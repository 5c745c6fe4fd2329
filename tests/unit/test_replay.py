"""`replay` by hand: scores, moves, and what these take; traces, what is wrong with them, and the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

import moeplan as mp
from moeplan.cli import app
from moeplan.cost.migration import Migration
from moeplan.importers.expert_load import read_batches

TRACES = Path(os.environ.get("MOEPLAN_SHARED", Path(__file__).parents[3] / "shared")) / "reference" / "traces"
recorded = pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not here; set MOEPLAN_SHARED")
SWAPPED = np.array([[[9, 8, 2, 1]], *[[[8, 1, 2, 9]]] * 3], np.float64)
"""One layer whose second hot expert changes once: on two GPUs of two slots the start has 0 beside 3, 1 beside 2."""


def of(found: mp.Replay, policy: str) -> mp.PolicyReplay:
    return next(each for each in found.policies if each.policy == policy)


def drifting(steps: int = 4, experts: int = 8, sources: int = 1) -> npt.NDArray[np.float64]:
    """Counts [step, layer, source, expert] of two layers whose hottest expert moves on by one each step."""
    hot = np.array([[(step + layer) % experts for layer in range(2)] for step in range(steps)])
    counts = 10.0 + np.arange(experts) + np.zeros((steps, 2, sources, experts))
    np.put_along_axis(counts, np.broadcast_to(hot[..., None, None], (steps, 2, sources, 1)), 60.0, axis=3)
    return counts


# ---- by hand


def test_a_step_is_scored_under_the_placement_of_the_steps_before() -> None:
    found = mp.replay(SWAPPED, gpus=2, slots=4)
    static, every = of(found, "static"), of(found, "every")
    assert static.value_TL[:, 0].tolist() == [17.0, 17.0, 17.0]
    assert every.value_TL[:, 0].tolist() == [17.0, 10.0, 10.0]
    assert every.moves_TL[:, 0].tolist() == [0, 2, 0]
    assert static.oracle == every.oracle == 30.0
    assert static.regret == pytest.approx(0.7)


def test_a_window_places_on_several_steps_together() -> None:
    """Ten times the first load and once the second still say that expert 3 is the cold one."""
    trace = SWAPPED * np.array([10, 1, 1, 1])[:, None, None]
    for window, tokens in ((1, 10.0), (9, 17.0)):
        (found,) = mp.replay(trace, gpus=2, slots=4, policy="every", window=window).policies
        assert found.value_TL[1, 0] == tokens


def test_the_best_policy_comes_first() -> None:
    regrets = [each.regret for each in mp.replay(drifting(), gpus=4, slots=10).policies]
    assert regrets == sorted(regrets)


def test_gpus_are_renamed_so_that_few_replicas_move() -> None:
    """Two experts change places; what a fresh solution calls its GPUs moves no others."""
    counts = np.tile(np.array([9.0, 8.0, 7.0, 6.0, 4.0, 3.0, 2.0, 1.0]), (3, 1, 1))
    counts[1:, 0, [0, 1]] = [8.0, 9.0]
    assert of(mp.replay(counts, gpus=4, slots=8), "every").moves_TL.sum() <= 4


def test_tokens_split_optimally_are_split_anew_at_each_step() -> None:
    even, best = (of(mp.replay(drifting(), gpus=4, slots=12, split=split), "static") for split in ("even", "optimal"))
    assert best.ratio_TL.mean() < even.ratio_TL.mean()


# ---- what moving takes


def placed(*pairs: tuple[int, int], gpus: int = 4, experts: int = 4) -> npt.NDArray[np.bool_]:
    here_EG = np.zeros((experts, gpus), np.bool_)
    here_EG[tuple(np.array(pairs).T)] = True
    return here_EG


MIGRATION = Migration(replica_bytes=1e9, gpus_per_node=2, nic_bytes_per_s=1e10, nvlink_bytes_per_s=1e11)
START = ((0, 0), (1, 1), (2, 2), (3, 3))


@pytest.mark.parametrize(
    ("new", "seconds"),
    [
        ([], 0.0),
        ([(0, 1)], 0.01),
        ([(0, 2)], 0.2),
        ([(0, 2), (1, 3)], 0.2),
        ([(0, 2), (1, 2)], 0.4),
        ([(0, 1), (0, 2)], 0.2),
    ],
)
def test_a_replica_comes_over_nvlink_if_its_node_has_it_and_else_by_its_own_nics(
    new: list[tuple[int, int]], seconds: float
) -> None:
    assert MIGRATION.seconds(placed(*START), placed(*START, *new)) == pytest.approx(seconds)


def test_a_node_that_all_ask_sends_with_all_its_nics() -> None:
    stood, asked = placed((0, 0), gpus=8, experts=1), placed(*((0, gpu) for gpu in range(2, 8)), gpus=8, experts=1)
    assert MIGRATION.seconds(stood, asked) == pytest.approx(6 * 0.1)


def test_training_moves_the_optimizers_state_too_and_time_is_charged() -> None:
    """bf16 weights, 2 bytes; in training a master copy and two moments in fp32, 12 bytes more."""
    moved = {}
    for phase in ("train", "decode"):
        on = {"model": "tiny-moe", "cluster": "hgx-h100-rail", "nodes": 1, "global_batch": 64, "sequence": 512}
        scenario = mp.scenario_from(phase=phase, **on)  # type: ignore[arg-type]
        moved[phase] = every = of(mp.replay(drifting(), scenario=scenario, gpus=4, slots=8), "every")
        assert every.total == pytest.approx(every.value_TL.sum() + every.migration_s_TL.sum())
        assert ((every.migration_s_TL > 0) == (every.moves_TL > 0)).all()
    assert moved["train"].moves_TL.sum() == moved["decode"].moves_TL.sum() > 0
    assert moved["train"].migration_s_TL.sum() == pytest.approx(7 * moved["decode"].migration_s_TL.sum())


# ---- traces


def written(folder: Path, **arrays: npt.NDArray[Any]) -> Path:
    path = folder / "trace.npz"
    np.savez(path, **arrays)
    return path


def test_expert_ids_are_counted_in_batches_and_none_is_lost(tmp_path: Path) -> None:
    ids_NLK = np.random.default_rng(0).integers(0, 6, (23, 3, 2)).astype(np.uint8)
    found = read_batches(written(tmp_path, ids=ids_NLK), batch_tokens=5, num_experts=8)
    assert found.tokens_TLSE.shape == (4, 3, 1, 8)
    assert found.tokens_TLSE.sum(axis=(2, 3)).tolist() == [[10.0] * 3] * 3 + [[16.0] * 3]
    assert found.tokens_TLSE[1, 2, 0].tolist() == np.bincount(ids_NLK[5:10, 2].ravel(), minlength=8).tolist()


def test_a_file_and_an_array_give_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, counts=drifting(), other=np.zeros(1))
    from_file = mp.replay(path, array="counts", gpus=4, slots=10, policy="every")
    assert from_file.document() == mp.replay(drifting(), gpus=4, slots=10, policy="every").document()


IDS = np.zeros((8, 2, 2), np.int64) + np.arange(2)


@pytest.mark.parametrize(
    ("content", "keywords", "says"),
    [
        (IDS, {"batch_tokens": 4, "experts": 1}, "expert id: 1 is not 0 to 0"),
        (IDS - 1, {"batch_tokens": 4}, "ids: -1 or 0 is not"),
        (IDS + 2**40, {"batch_tokens": 4}, "is not a whole number from 0 to 65535"),
        (IDS * 0.5, {"batch_tokens": 4}, "whole numbers by"),
        (IDS[0], {"batch_tokens": 4}, "whole numbers by"),
        (IDS, {"batch_tokens": 9}, "batch_tokens: 9 is not 1 to the 8 tokens"),
        (IDS, {"batch_tokens": 0}, "batch_tokens: 0 is not"),
        (IDS, {"batch_tokens": 8}, "1 step, .* record two"),
        (IDS, {}, "looks like expert ids .*--batch-tokens"),
        (drifting(1), {}, "1 step, .* record two"),
        (drifting(), {"policy": "treshold"}, "did you mean 'threshold'"),
        (drifting(), {"policy": "static", "every": 3}, "every: has no effect on policy 'static'; remove it"),
        (drifting(), {"policy": "threshold", "every": 3}, "every: has no effect .*use max_moves, threshold, window"),
        (drifting(), {"sometimes": 3}, "sometimes: has no effect on policy 'all'"),
        (drifting(), {"every": 0}, "every: 0 steps"),
        (drifting(), {"threshold": -0.1}, "threshold: -0.1"),
        (drifting(), {"threshold": float("nan")}, "threshold: nan"),
        (drifting(), {"max_moves": -1}, "max_moves: -1"),
        (drifting(), {"window": 0}, "window: 0 steps"),
        (drifting(), {"horizon": 0}, "horizon: 0 steps"),
        (drifting(), {"move_cost": -1.0}, "move_cost: -1.0"),
        (drifting(), {"move_cost": float("inf")}, "move_cost: inf"),
        (
            drifting(experts=8),
            {"move_cost": 0.1, "scenario": "small-two-nodes", "slots": 8},
            "move_cost: has no effect",
        ),
        (drifting(), {"experts": 8}, "experts: has no effect on counts"),
        (drifting(), {"time_limit_s": 0.0}, "time limit"),
        (drifting(), {"slots": 7}, "slots: 7"),
        (drifting(), {"placer": "eplbb"}, "did you mean 'eplb'"),
        (drifting(experts=9), {"scenario": "small-two-nodes", "slots": 9}, "9 experts are not the 8 of the model"),
        (drifting() * (np.arange(4) != 2)[:, None, None, None], {}, "step 2, layer 0: no tokens"),
    ],
)
def test_what_is_wrong_is_one_line_that_says_what_helps(
    tmp_path: Path, content: npt.NDArray[Any], keywords: dict[str, Any], says: str
) -> None:
    with pytest.raises(mp.MoeplanError, match=says) as caught:
        mp.replay(written(tmp_path, trace=content), **{"gpus": 4} | keywords)
    assert "\n" not in str(caught.value)


def test_batches_of_what_is_no_file_of_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(mp.PlanError, match="no effect without a file"):
        mp.replay(drifting(), gpus=4, batch_tokens=3)
    path = tmp_path / "trace.csv"
    path.write_text("1,2\n3,4")
    with pytest.raises(mp.CatalogueError, match=r"'\.csv' is not \.npz"):
        mp.replay(path, gpus=2, batch_tokens=3)


def test_a_trace_cut_off_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, counts=drifting())
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(mp.CatalogueError, match=r"trace\.npz: "):
        mp.replay(path, gpus=4)


@recorded
def test_on_recorded_steps_a_budget_is_as_good_as_placing_all_anew_with_far_fewer_moves() -> None:
    """DeepSeek-V2-Lite, 64 experts, 26 layers, batches of 1,024 tokens in sequence."""
    path = TRACES / "deepseek_v2_lite_top6.npz"
    options: dict[str, Any] = {"array": "topk_law", "batch_tokens": 1024, "gpus": 8, "policy": "every"}
    (anew,) = mp.replay(path, **options).policies
    (few,) = mp.replay(path, **options, max_moves=8).policies
    assert few.regret <= anew.regret
    assert few.moves_TL.sum() * 6 <= anew.moves_TL.sum()


# ---- the command


def run(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["place", *words])
    return found.exit_code, found.stdout + found.stderr


def test_the_command_prints_a_table_or_one_document_and_draws(tmp_path: Path) -> None:
    path, picture = written(tmp_path, counts=drifting()), tmp_path / "policies.svg"
    words = ["--routing-trace", str(path), "--gpus", "4", "--slots", "10"]
    status, table = run(*words, "--every", "2", "--threshold", "0.05", "--plot", str(picture))
    assert status == 0, table
    assert "periodic every=2" in table
    assert "Best: " in table
    assert picture.read_text().startswith("<?xml")
    status, document = run(*words, "--policy", "static", "--json")
    assert status == 0
    assert [each["policy"] for each in json.loads(document)["policies"]] == ["static"]


def test_the_command_tells_payback_how_long_steps_pay_and_what_a_move_costs(tmp_path: Path) -> None:
    path = written(tmp_path, counts=drifting())
    words = ["--routing-trace", str(path), "--gpus", "4", "--slots", "10", "--policy", "payback", "--json"]
    moves = {}
    for horizon, move_cost in (("50", "0"), ("1", "9")):
        status, document = run(*words, "--horizon", horizon, "--move-cost", move_cost)
        assert status == 0, document
        (found,) = json.loads(document)["policies"]
        assert found["options"] == {"horizon": int(horizon), "move_cost": float(move_cost)}
        moves[horizon] = found["moves"]
    assert moves["50"] > moves["1"] == 0


def test_with_a_scenario_the_command_says_seconds(tmp_path: Path) -> None:
    path = written(tmp_path, counts=drifting(sources=2))
    status, table = run("small-two-nodes", "--routing-trace", str(path), "--gpus", "4", "--slots", "12")
    assert status == 0, table
    assert "moving" in table


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--policy", "static"], "--policy: has no effect without --routing-trace"),
        (["--batch-tokens", "9"], "--batch-tokens: has no effect without --routing-trace"),
        (["--horizon", "9"], "--horizon: has no effect without --routing-trace"),
        (["--move-cost", "0.1"], "--move-cost: has no effect without --routing-trace"),
        (["--plot", "a.png"], "--plot: has no effect without --routing-trace"),
        (["--routing-trace", "t.npz", "--load", "l.npz"], "--load: has no effect with --routing-trace"),
        (["--routing-trace", "t.npz", "--objective", "balance"], "--objective: has no effect with --routing-trace"),
        (["--routing-trace", "t.npz", "--from", "now.json"], "--from: has no effect with --routing-trace"),
        (["--routing-trace", "nowhere.npz"], "nowhere.npz: is not there"),
        (["--routing-trace", "t.npz", "--plot", "a.txt"], "use .png or .svg or .pdf"),
    ],
)
def test_a_flag_without_effect_is_an_error(words: list[str], says: str) -> None:
    status, message = run("--gpus", "4", *words)
    assert (status, message.count("\n")) == (2, 1)
    assert says in message
