"""A plan that says where experts stand: tokens, memory, gradients and time follow its slots."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

import moeplan as mp
from moeplan.cli import app
from moeplan.compiler.compile_plan import compile_plan
from moeplan.domain.placement import EMPTY, LayerPlacement, Placement
from moeplan.domain.program import Exchange, Program
from moeplan.domain.routing import Routing, TokenSets
from moeplan.partition.reach import reach_of_parts
from moeplan.partition.route import load_of
from moeplan.partition.slots import part_of_blocks, ring_GG, tokens_of_slots

EXPERTS, LAYERS = 8, 4
RAILS = {"extends": "hgx-h100-rail", "nodes": 2, "gpus_per_node": 4, "nic": {"per_node": 4}}
SKEWED = {"routing.router": "zipf", "routing.skew": 1.2}
IN_ORDER = Placement(experts=(tuple(range(EXPERTS)),) * LAYERS)
TWICE = Placement(
    experts=(tuple(e for place in range(4) for e in (place, place + 4, (place + 1) % 4, (place + 1) % 4 + 4)),) * LAYERS
)
REPLICAS = Placement(experts=((0, 1, 2, 2, 3, 4, 0, 5, 2, 6, 7, EMPTY),) * LAYERS)


def scenario(**changes: Any) -> mp.Scenario:
    """Two nodes of four GPUs, eight experts in each of four layers."""
    return mp.load("small-two-nodes", {"cluster": RAILS, "workload.sequence": 512, **changes})


def plan(placement: Placement | None = None, **options: Any) -> mp.Plan:
    return mp.Plan(**{"dp": 8, "ep": 4, "stages": (LAYERS,), "placement": placement, **options})


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, int]:
    """One layer of six experts on three places, some of them twice or more, and how many places."""
    held = [set(range(place, 6, 3)) | draw(st.sets(st.integers(0, 5), max_size=3)) for place in range(3)]
    width = max(map(len, held)) + draw(st.integers(0, 1))
    row = tuple(e for each in held for e in [*draw(st.permutations(sorted(each))), *[EMPTY] * (width - len(each))])
    weight_C = np.array([draw(st.floats(0.01, 1)) if expert != EMPTY else 0.0 for expert in row])
    whole_C = np.bincount(np.array(row) + 1, weights=weight_C)[np.array(row) + 1]
    shares = tuple((weight_C / np.where(whole_C > 0, whole_C, 1)).tolist())
    return Placement(experts=(row,), shares=(shares,) if draw(st.booleans()) else None), 3


# tokens


@given(placements(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_slots_of_an_expert_get_its_tokens_whole_and_all(drawn: tuple[Placement, int], seed: int) -> None:
    placement, tokens_SE = drawn[0], np.random.default_rng(seed).integers(0, 50, (5, 6)).astype(float)
    tokens_SC = tokens_of_slots(tokens_SE, placement, 0)
    assert (tokens_SC == np.rint(tokens_SC)).all()
    assert np.abs(tokens_SC - tokens_SE[:, placement.experts[0]] * placement.share_C(0)).max() < 1
    for expert in range(6):
        of_it = np.array(placement.experts[0]) == expert
        assert np.array_equal(tokens_SC[:, of_it].sum(axis=1), tokens_SE[:, expert])
    assert not tokens_SC[:, np.array(placement.experts[0]) == EMPTY].any()


def test_the_token_that_is_left_is_another_replicas_for_each_source() -> None:
    placement = Placement(experts=((0, 1, 0, EMPTY, 0, EMPTY),))
    tokens_SC = tokens_of_slots(np.array([[4.0, 1.0]] * 3), placement, 0)
    assert tokens_SC.sum(axis=0).tolist() == [4, 3, 4, 0, 4, 0]


def test_parts_of_tokens_stay_parts() -> None:
    found = tokens_of_slots(np.array([[2.5, 1.0]]), Placement(experts=((0, 1, 0, EMPTY),)), 0)
    assert found.tolist() == [[1.25, 1.0, 1.25, 0.0]]


def test_a_placement_is_what_placers_know_and_back() -> None:
    found = [REPLICAS.layer(0, num_places=4)]
    assert found[0].share_SR[0, :2].tolist() == [0.5, 0.5]
    again = Placement.of(found, num_places=4)
    assert again.shares is None
    assert again.experts[0] == (0, 1, 2, 2, 3, 4, 0, 2, 5, 6, 7, EMPTY)
    uneven = LayerPlacement(
        expert_R=np.array([0, 0, 1]), gpu_R=np.array([0, 1, 1]), share_SR=np.array([[0.25, 0.75, 1], [0.75, 0.25, 1]])
    )
    assert Placement.of([uneven], num_places=2).shares is None
    third = LayerPlacement(
        expert_R=np.array([0, 0, 1]), gpu_R=np.array([0, 1, 1]), share_SR=np.array([[0.25, 0.75, 1]])
    )
    assert Placement.of([third], num_places=2) == Placement(
        experts=((0, EMPTY, 0, 1),), shares=((0.25, 0.0, 0.75, 1.0),)
    )


def test_each_expert_twice_under_even_routing_stays_even() -> None:
    found = load_of(scenario(**{"routing.router": "balanced"}), plan(TWICE), rank_tokens=512)
    assert found is not None
    assert found.is_even
    assert len(compile_plan(plan(TWICE), scenario(**{"routing.router": "balanced"})).lanes) == 1
    skewed = load_of(scenario(**SKEWED), plan(TWICE), rank_tokens=512)
    assert skewed is not None
    assert not skewed.is_even


def test_a_token_is_at_a_node_once_however_its_replicas_are_drawn() -> None:
    """Recorded choices of two experts each; every way to draw their replicas, weighed by the shares."""
    experts_UK, count_U = np.array([[0, 1], [1, 2], [2, 3], [0, 3]]), np.array([5, 3, 1, 1])
    placement = Placement(
        experts=((0, 1, 2, EMPTY, 0, 3, 1, EMPTY),), shares=((0.25, 0.5, 1.0, 0.0, 0.75, 1.0, 0.5, 0.0),)
    )
    tokens_E = np.bincount(experts_UK.ravel(), np.repeat(count_U, 2), 4).astype(np.int64)
    sets = TokenSets(experts_UK=experts_UK, count_U=count_U)
    routing = Routing(tokens_LSE=tokens_E[None, None], tokens_per_source=10, top_k=2, sets_LS=((sets,),))
    found = reach_of_parts(routing, part_of_blocks(placement, 0, (0, 1), num_experts=4))[0, 0]
    share_C, row, wanted = placement.share_C(0), np.array(placement.experts[0]), np.zeros(2)
    for choice, count in zip(experts_UK, count_U, strict=True):
        for slots in product(*(np.flatnonzero(row == expert) for expert in choice)):
            wanted[list({slot // 4 for slot in slots})] += count * share_C[list(slots)].prod()
    assert found == pytest.approx(wanted)


# the same as without


def _arrays(program: Program) -> list[Any]:
    tasks = [getattr(program.tasks, field.name).tolist() for field in fields(program.tasks)]
    sizes = [(exchange.kind, exchange.size_bytes) for exchange in program.exchanges]
    return [*tasks, sizes, program.works, program.before_D.tolist(), program.after_D.tolist()]


@pytest.mark.parametrize("router", ["balanced", "zipf", "multinomial"])
@pytest.mark.parametrize("more", [{}, {"all_to_all": "node_dedup", "ep": 8}, {"zero_expert": 3, "overlap_degree": 2}])
def test_experts_in_order_are_to_the_byte_as_without_a_placement(router: str, more: dict[str, Any]) -> None:
    here = scenario(**{"routing.router": router})
    without, with_it = (mp.simulate(here, plan(placement, **more)) for placement in (None, IN_ORDER))
    assert _arrays(without.timeline.program) == _arrays(with_it.timeline.program)
    assert without.timeline.start_s_T.tobytes() == with_it.timeline.start_s_T.tobytes()
    assert without.timeline.end_s_T.tobytes() == with_it.timeline.end_s_T.tobytes()
    assert without.figures == with_it.figures


# what is gained and what it costs


@pytest.mark.parametrize("placer", ["eplb", "local_search"])
def test_balanced_experts_lower_the_step_of_a_skewed_scenario(placer: str) -> None:
    here = mp.load("mixtral-8x7b-prefill-8xh100", {**SKEWED, "workload.global_batch": 16})
    bare = mp.Plan(dp=8, ep=4, stages=(len(here.model.all_layers),), zero_dense=0, zero_expert=0, schedule="gpipe")
    placed = mp.place(here, gpus=4, slots=12, placer=placer).into(bare)
    assert mp.simulate(here, placed).figures.step_s < 0.9 * mp.simulate(here, bare).figures.step_s


def _sums(placement: Placement, **options: Any) -> list[Exchange]:
    program = compile_plan(plan(placement, **options), scenario(**SKEWED))
    return [each for each in program.exchanges if each.kind == "gradients" and each.share_GG is not None]


@pytest.mark.parametrize(("zero", "parts"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_each_replica_passes_on_its_gradients_around_the_ring_of_its_expert(zero: int, parts: int) -> None:
    """Expert 0 stands twice and expert 2 three times; with ZeRO each of the two groups sums its half."""
    experts = scenario().model.all_layers[0].experts
    assert experts is not None
    replicas = Placement(experts=((0, 1, 2, 2, 3, 4, 0, 5, EMPTY, 6, 7, 2),) * LAYERS)
    found = _sums(replicas, zero_expert=zero)
    assert len(found) == LAYERS
    for each in found:
        sent_G = each.size_bytes * np.asarray(each.share_GG).sum(axis=1)
        whole = 4 * experts.expert_parameters_per_rank(1) / parts
        assert sent_G == pytest.approx(whole * np.array([1 + 4 / 3, 4 / 3, 1, 4 / 3]))


def test_without_replicas_no_gradients_are_summed_within_a_group() -> None:
    assert not _sums(Placement(experts=((7, 6, 5, 4, 3, 2, 1, 0),) * LAYERS))
    assert ring_GG(IN_ORDER, 0, 4) is None


def test_memory_grows_by_the_slots() -> None:
    here = scenario(**SKEWED)
    experts = here.model.all_layers[0].experts
    assert experts is not None
    less, more = (mp.simulate(here, plan(placement, zero_expert=0)).figures.memory[0] for placement in (None, REPLICAS))
    added = LAYERS * (12 - 8) / 4 * experts.expert_parameters_per_rank(1)
    assert more.weights - less.weights == 2 * added
    assert more.gradients - less.gradients == 4 * added
    assert more.optimizer - less.optimizer == 12 * added


def test_places_need_not_divide_the_experts() -> None:
    cluster = {"extends": "hgx-h100-rail", "nodes": 1, "gpus_per_node": 3, "nic": {"per_node": 3}}
    here = scenario(**SKEWED, cluster=cluster, **{"workload.global_batch": 12, "choose.tp": 1})
    placement = Placement(experts=((0, 1, 2, 3, 4, 5, 6, 7, EMPTY),) * LAYERS)
    assert mp.simulate(here, plan(placement, dp=3, ep=3)).figures.step_s > 0
    with pytest.raises(mp.PlanError, match="ep 3 does not divide 8 experts"):
        mp.simulate(here, plan(dp=3, ep=3))


# what is wrong


@pytest.mark.parametrize(
    ("experts", "options", "says"),
    [
        ([[0, 1, 2, 3, 4, 5, 6, 8]] * 4, {}, r"experts\[0\]: expert 8 is not one of 0 to 7; use"),
        ([[0, 1, 2, 3, 4, 5, 6, -1]] * 4, {}, r"experts\[0\]: expert 7 stands nowhere; give"),
        (
            [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, -1]] * 3 + [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 2]],
            {},
            r"experts\[3\]: expert 2 stands twice on place 3; move",
        ),
        ([[*range(8)]] * 3, {}, "3 layers, but the model has 4 with experts; give"),
        ([[*range(8), 0]] * 4, {}, "ep 4 does not divide 9 slots; fill up"),
        ([[*range(8)]] * 4, {"ep": 1}, "placement has no effect without expert parallelism; leave it out"),
    ],
)
def test_a_placement_that_cannot_be_says_why(experts: list[list[int]], options: dict[str, Any], says: str) -> None:
    with pytest.raises(mp.PlanError, match=says):
        mp.simulate(scenario(), plan(Placement.model_validate({"experts": experts}), **options))


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"experts": [[0, 1], [0, 1, 2]]}, "layers have 2 to 3 slots; fill up with -1"),
        ({"experts": []}, "at least 1"),
        ({"experts": [[0, -2]]}, "greater than or equal to -1"),
        ({"experts": [[0, 1, 0]], "shares": [[0.5, 1.0]]}, "not a number for each slot; give"),
        ({"experts": [[0, 1, 0]], "shares": [[0.5, 1.0, 0.4]]}, "of layer 0 they do not sum to 1"),
        ({"experts": [[0, 1, -1]], "shares": [[1.0, 1.0, 0.5]]}, "of layer 0 they do not sum to 1"),
    ],
)
def test_a_table_that_is_none_is_refused(document: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Placement.model_validate(document)


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        ({"experts": [[0, 1], [0, 1, 2]]}, r"plan.json: placement: experts: layers have 2 to 3 slots; fill up"),
        ({"experts": [[0, "1"]]}, r"plan.json: placement.experts.0.1: found the text .* write 1"),
        ({"expert": [[0, 1]]}, r"plan.json: placement.expert: unknown key .* did you mean .experts"),
    ],
)
def test_a_file_with_a_bad_placement_is_refused_at_its_place(placement: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan().model_dump(mode="json", by_alias=True) | {"placement": placement}))
    with pytest.raises(mp.CatalogueError, match=says):
        mp.simulate(scenario(), path)


# in and out


def test_a_placement_is_hashed_once_and_read_back_as_it_was() -> None:
    given = plan(REPLICAS)
    again = mp.Plan.model_validate_json(given.model_dump_json(by_alias=True))
    assert (again, hash(again)) == (given, hash(given))
    assert given != plan() != plan(TWICE)
    assert "_hash" in REPLICAS.__dict__
    copied = given.model_copy(update={"micro_batch": 2})
    assert copied.placement is REPLICAS


def test_a_plan_takes_the_placement_of_its_own_groups_alone() -> None:
    found = mp.place(scenario(**SKEWED), gpus=4, slots=12, placer="eplb")
    assert found.into(plan()).placement == found.placement
    with pytest.raises(mp.PlanError, match="ep 8 is not the 4 GPUs that experts are placed on; place them on 8"):
        found.into(plan(ep=8))


def test_the_command_puts_a_placement_into_a_plan_that_is_simulated_and_exported(tmp_path: Path) -> None:
    first, second, experts = tmp_path / "plan.json", tmp_path / "plan2.json", tmp_path / "experts.json"
    here = scenario(**SKEWED)
    document = {"plan": plan().model_dump(mode="json", by_alias=True), "scenario": here.document}
    first.write_text(json.dumps(document))

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    second.write_text(run("place", "--plan", str(first), "--slots", "12", "--placer", "eplb"))
    wanted = mp.place(here, gpus=4, slots=12, placer="eplb")
    read = mp.simulate(json.loads(second.read_text())["scenario"], second)
    assert read.plan.placement == wanted.placement
    told = json.loads(run("simulate", "--plan", str(second), "--json"))
    assert told["step_s"] == read.figures.step_s
    run("export", "sglang", str(experts), "--plan", str(second))
    mp.export(wanted, tmp_path / "direct.json", format="sglang")
    assert experts.read_text() == (tmp_path / "direct.json").read_text()
    with pytest.raises(
        mp.MoeplanError, match=r"exports a placing, not a Plan; place experts \(`moeplan place --plan`\)"
    ):
        mp.export(plan(), experts, format="sglang")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--slots", "12", "--gpus", "8"], "ep 4 is not the 8 GPUs that experts are placed on; place them on 4"),
        (["--load", "counts.csv"], "2 layers, but the model has 4 with experts"),
    ],
)
def test_a_placement_that_does_not_suit_the_plan_is_refused(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = {"plan": plan().model_dump(mode="json", by_alias=True), "scenario": scenario().document}
    Path("plan.json").write_text(json.dumps(document))
    Path("counts.csv").write_text("1,2,3,4,5,6,7,8\n8,7,6,5,4,3,2,1\n")
    done = CliRunner().invoke(app, ["place", "--plan", "plan.json", "--placer", "lpt", *words])
    assert done.exit_code == 2
    assert says in done.stderr


def test_a_setting_of_no_scenario_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("1,2,3,4\n")
    done = CliRunner().invoke(app, ["place", "--load", str(path), "--gpus", "2", "--set", "routing.skew=1"])
    assert done.exit_code == 2
    assert "--set routing.skew=1: no scenario is given; name one, or leave out --set" in done.stderr


def test_lists_of_numbers_are_one_line_in_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from moeplan._screen import print_json

    document = {"a": [[1, 2], [-3, 4.5e-6]], "b": ["[\n1]", 1, None], "c": [], "d": [{"e": [7]}]}
    print_json(document)
    text = capsys.readouterr().out
    assert json.loads(text) == document
    assert "[-3, 4.5e-06]" in text
