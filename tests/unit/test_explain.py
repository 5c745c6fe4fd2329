"""`explain`: parts that sum to the step, signs, what binds, why a rival lost, ties, and what is refused."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moeplan as mp
from moeplan.cli import app
from moeplan.cost.critical import BESIDE, COMPUTING, SHARED, by_resource
from moeplan.units import scaled

ALONE: dict[str, object] = {
    "cluster.nodes": 1, "cluster.gpus_per_node": 1, "cluster.nic.per_node": 1, "choose.tp": 1, "choose.zero_dense": 1,
}  # fmt: skip
TIED: dict[str, object] = {
    "choose.micro_batch": 4, "choose.arbitration": "fair", "choose.recompute": "none", "choose.overlap_degree": 1,
}  # fmt: skip
TIGHT: dict[str, object] = TIED | {"choose.micro_batch": [2, 4], "cluster.gpu.memory": "244 MB"}


@lru_cache
def result(name: str) -> mp.PlanResult:
    return mp.plan(name)


@lru_cache
def explained(name: str) -> mp.Explanation:
    return mp.explain(result(name))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `plan --json` writes of a small scenario."""
    path = tmp_path_factory.mktemp("explain") / "plan.json"
    path.write_text(result("small-two-nodes").model_dump_json(by_alias=True))
    return path


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["explain", *map(str, words)])


# ---- laws

SMALL = ("small-two-nodes", "small-4-gpus", "small-8-gpus")


@pytest.mark.parametrize("name", SMALL)
def test_the_parts_of_the_critical_path_sum_to_the_step(name: str) -> None:
    found = explained(name)
    assert sum(part.seconds for part in found.path) == pytest.approx(found.step_s, rel=1e-12)
    assert sum(by_resource(found.path).values()) == pytest.approx(found.step_s, rel=1e-12)
    assert sum(found.causes_s.values()) == found.step_s
    assert min(part.seconds for part in found.path) > 0
    assert "waiting" not in by_resource(found.path)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_better_never_makes_the_step_longer_and_comes_in_order(name: str) -> None:
    changes = [each.step_change for each in explained(name).helps]
    assert all(change is not None and change <= 1e-9 for change in changes)
    assert changes == sorted(changes)  # type: ignore[type-var]
    assert changes[0] < 0  # type: ignore[operator]


@pytest.mark.parametrize("name", SMALL)
def test_a_tenth_more_of_a_resource_saves_at_most_an_eleventh_of_what_the_path_spends_on_it(name: str) -> None:
    found = explained(name)
    spent_s = by_resource(found.path)
    beside_s = spent_s.get(BESIDE, 0.0) + spent_s.get(SHARED, 0.0)
    for each in found.helps:
        own_s = spent_s.get(each.knob.name.replace("NIC", "nic").replace("peak FLOP/s", "arithmetic"))
        if own_s is not None:
            assert found.step_s - (each.step_s or 0.0) <= (own_s + beside_s) / 11 + 1e-9


# ---- what is known beforehand


def test_one_gpu_is_bound_by_computation_alone_and_no_link_helps() -> None:
    found = mp.explain(mp.load("small-4-gpus", ALONE))
    assert found.bound_by == "computation alone: no exchange is on the critical path"
    assert by_resource(found.path).keys() <= set(COMPUTING)
    changes = {each.knob.name: each.step_change for each in found.helps}
    assert changes["NIC bandwidth"] == changes["nvlink bandwidth"] == changes["message latency and overhead"] == 0
    assert (changes["peak FLOP/s"] or 0) < 0


def test_a_slow_nic_is_what_binds_and_what_helps_most() -> None:
    found = mp.explain(mp.load("small-two-nodes", TIED | {"cluster.nic.bandwidth": "1 GB/s", "choose.pp": 1}))
    assert found.bound_by.startswith("nic bandwidth")
    assert found.helps[0].knob.name == "NIC bandwidth"


def test_memory_does_not_bind_where_everything_fits_and_binds_where_the_faster_plan_does_not() -> None:
    assert explained("small-two-nodes").memory.binds is False
    found = mp.explain(mp.load("small-two-nodes", TIGHT))
    assert found.memory.binds is True
    assert found.memory.fullest.total <= found.memory.fullest.usable < (found.memory.too_big_bytes or 0)
    assert found.memory.too_big is not None
    assert found.memory.too_big.step_s < found.step_s
    free = mp.plan(mp.load("small-two-nodes", TIGHT | {"cluster.gpu.memory": "1 GB"})).plan
    assert found.memory.too_big.plan == free.model_copy(update={"placement": None})
    (more,) = [each for each in found.stability if each.knob.change == "to 100 %" and "memory" in each.knob.name]
    assert more.is_beaten, "with that much the other plan fits"
    assert more.rival == found.memory.too_big.plan


def test_the_runner_up_is_the_next_best_of_the_result_and_says_what_it_decides_otherwise() -> None:
    found, other = explained("small-8-gpus"), result("small-8-gpus").runners_up[0]
    assert found.runner_up is not None
    assert found.runner_up.plan == other.plan
    assert found.runner_up.step_s == pytest.approx(other.step_s, rel=1e-12)
    assert "slower" in found.why_it_lost
    for key, (ours, theirs) in found.runner_up.differences.items():
        assert ours != theirs
        said = "another placement" if key == "placement" else f"{key} {theirs} instead of {ours}"
        assert said in found.why_it_lost


def test_a_plan_that_is_not_the_choice_is_told_who_is_faster() -> None:
    best = result("small-8-gpus")
    found = mp.explain("small-8-gpus", best.runners_up[0].plan)
    assert found.runner_up is not None
    assert found.runner_up.plan == best.plan
    assert "faster" in found.why_it_lost
    assert found.lower_bound_s == best.lower_bound_s
    assert found.memory.binds is None, "nobody has looked for plans between the two"


def test_a_plan_without_rivals_stands_alone() -> None:
    given = mp.load("small-4-gpus", ALONE | {"choose.micro_batch": 1, "choose.schedule": "gpipe"})
    found = mp.explain(given)
    assert found.runner_up is None
    assert found.why_it_lost == "no other plan is known that fits"
    assert not any(each.is_beaten for each in found.stability)


def test_a_tie_flips_with_a_constant_that_counts_for_one_of_the_two() -> None:
    flat, piped = (mp.plan(mp.load("small-two-nodes", TIED | {"choose.pp": pp})).plan for pp in (1, 2))

    def lead_s(bandwidth: float) -> float:
        given = mp.load("small-two-nodes", TIED | {"cluster.nic.bandwidth": f"{bandwidth:.9g} GB/s"})
        return mp.simulate(given, flat).figures.step_s - mp.simulate(given, piped).figures.step_s

    low, high = 10.0, 50.0
    assert lead_s(low) > 0 > lead_s(high)
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if lead_s(middle) > 0 else (low, middle)
    tied = mp.load("small-two-nodes", TIED | {"cluster.nic.bandwidth": f"{high:.9g} GB/s"})
    beaten = {
        plan: [each.knob for each in mp.explain(tied, plan).stability if each.is_beaten] for plan in (flat, piped)
    }
    assert ("cluster.nic.efficiency", "-10 %") in {(knob.name, knob.change) for knob in beaten[flat]}
    assert any(knob.name == "cluster.nic.efficiency" and knob.change != "-10 %" for knob in beaten[piped])


def test_a_plan_that_just_fits_is_beaten_when_less_memory_is_usable() -> None:
    given = mp.load("small-two-nodes", TIED | {"cluster.gpu.memory": "240 MB", "choose.pp": 1})
    found = mp.explain(given)
    (less,) = [each for each in found.stability if each.knob.changes == {"cluster.gpu.usable_memory": "82.8 %"}]
    assert less.step_s is None
    assert less.is_beaten


@pytest.mark.parametrize(
    ("text", "factor", "expected"),
    [
        ("400 Gbit/s", 1.1, "440 Gbit/s"),
        ("25GB/s", 1.1, "27.5 GB/s"),
        ("78 %", 0.9, "70.2 %"),
        ("96 %", 1.1, "100 %"),
        ("0.6 us", 0.9, "0.54 us"),
    ],
)
def test_a_figure_is_scaled_in_its_own_unit(text: str, factor: float, expected: str) -> None:
    assert scaled(text, factor) == expected


@pytest.mark.parametrize("name", ["swarm-wan", "tpu-v4-torus", "slingshot-dragonfly", "pcie-2-socket-rtx-4090"])
def test_every_kind_of_cluster_has_changes_that_load_takes(name: str) -> None:
    from moeplan.knobs import asking_for_another_plan, calibrated, worth_buying

    given = mp.scenario_from(model="tiny-moe", cluster=name, global_batch=4096, sequence=128)
    knobs = [*worth_buying(given), *calibrated(given), *asking_for_another_plan(given)[:1]]
    for knob in knobs:
        assert mp.load(given, knob.changes).cluster != given.cluster, knob


def test_cards_that_are_set_apart_become_faster_with_the_others() -> None:
    from moeplan.knobs import worth_buying

    given = mp.scenario_from(model="tiny-moe", cluster="swarm-wan", global_batch=4096, sequence=128)
    (knob,) = [knob for knob in worth_buying(given) if knob.name == "NIC bandwidth"]
    changed = mp.load(given, knob.changes)
    ratio_K = changed.cluster.bandwidth_bytes_per_s_K / given.cluster.bandwidth_bytes_per_s_K
    slow = given.cluster.bandwidth_bytes_per_s_K < 26e6
    assert slow.any()
    assert ratio_K[slow] == pytest.approx(1.1)


# ---- the command


def test_the_command_prints_one_document_of_what_python_says_of_the_same_result(written: Path) -> None:
    done = run(written, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(json.dumps(explained("small-two-nodes").document()))


def test_the_screen_answers_the_five_questions(written: Path, tmp_path: Path) -> None:
    picture = tmp_path / "helps.svg"
    done = run(written, "--plot", picture)
    assert done.exit_code == 0, done.output
    for title in ("What decides the step", "What would help", "Memory", "The runner-up", "How firm the choice is"):
        assert title in done.stdout
    assert "NIC bandwidth +10 %" in done.stdout
    assert picture.read_text().startswith("<?xml")


def test_changes_of_a_results_scenario_keep_its_plan_and_lose_its_certificate(written: Path) -> None:
    slow = json.loads(run("--plan", written, "--set", "cluster.nic.bandwidth=5GB/s", "--json").stdout)
    plain = explained("small-two-nodes")
    assert slow["plan"] == plain.plan.model_dump(mode="json", by_alias=True)
    assert slow["step_s"] > plain.step_s
    assert plain.lower_bound_s == result("small-two-nodes").lower_bound_s
    assert slow["lower_bound_s"] is None


# ---- what is refused


def broken(path: Path, folder: Path, **changes: object) -> Path:
    document = json.loads(path.read_text()) | changes
    (made := folder / "broken.json").write_text(json.dumps(document))
    return made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step_s": "soon"}, "step_s"),
        ({"runners_up": [{"plan": {}}]}, "runners_up"),
        ({"plan": 3}, "plan"),
        ({"scenario": {"schema": "no"}}, "schema"),
        ({"evaluated": None}, "evaluated"),
    ],
)
def test_a_result_that_was_damaged_is_one_message_with_the_field(
    written: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    done = run(broken(written, tmp_path, **changes))
    assert done.exit_code == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.json"], "does not exist"),
        (["small-too-nodes"], "small-two-nodes"),
        (["FILE", "--time-limit", "5"], "no effect on a result"),
        (["FILE", "--gap", "-1"], "no share"),
        (["FILE", "--planner", "guess"], "planner"),
        (["FILE", "--set", "choose.tp=2"], "choose has no effect"),
        (["FILE", "--plot", "helps.txt"], "suffix"),
        (["FILE", "--plot", "nowhere/helps.png"], "no folder"),
        (["small-8-gpus", "--plan", "FILE"], "8"),
        ([], "no scenario is named"),
    ],
)
def test_what_cannot_be_explained_is_one_message(written: Path, words: list[str], says: str) -> None:
    done = run(*(written if word == "FILE" else word for word in words))
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""


def test_a_plan_that_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(mp.PlanError, match="too much"):
        mp.explain(mp.load("small-two-nodes", {"cluster.gpu.memory": "50 MB"}), result("small-two-nodes").plan)
