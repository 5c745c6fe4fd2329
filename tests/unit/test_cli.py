"""The command: what it prints, where, and with which status; and that what a user gets wrong is one message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moeplan as mp
from moeplan import catalogue
from moeplan._flags import grid_of
from moeplan._screen import at_most
from moeplan._waiting import waiting
from moeplan.cli import app
from moeplan.errors import MoeplanError

SMALL = "tiny-moe-2-ranks"
FEW = (
    "choose.tp=1", "choose.cp=1", "choose.etp=1", "choose.micro_batch=1", "choose.recompute=none",
    "choose.zero_dense=1", "choose.zero_expert=1", "choose.overlap_degree=1", "choose.schedule=one_f_one_b",
    "choose.arbitration=fair", "choose.rank_order=tp-cp-ep-dp-pp", "choose.all_to_all=linear",
)  # fmt: skip
"""What leaves few plans, so that they are sought quickly."""
SET = [word for setting in FEW for word in ("--set", setting)]


class Answer:
    """What a command printed and its status."""

    def __init__(self, *words: str) -> None:
        result = CliRunner().invoke(app, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.status, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def run(*words: str) -> Answer:
    """The answer of a command that works."""
    answer = Answer(*words)
    assert answer.status == 0, answer.err
    return answer


def refusal(*words: str) -> str:
    """The message of a command that is refused."""
    answer = Answer(*words)
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("moeplan: ")
    assert answer.err.count("\n") <= 3
    return answer.err


@pytest.fixture(autouse=True, scope="module")
def no_width() -> Iterator[None]:
    """As where nobody set the width of a terminal: test runners that share out the work do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture(scope="module")
def plan_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `plan --json` prints, as a file."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    path.write_text(run("plan", SMALL, *SET, "--json").out)
    return path


# plan


def test_plan_prints_one_document_which_is_the_result_in_python(plan_json: Path) -> None:
    result = mp.PlanResult.model_validate_json(plan_json.read_text())
    assert result == mp.plan(mp.load(SMALL, dict(setting.split("=") for setting in FEW)))
    assert mp.load(result.scenario).name == SMALL


def test_plan_tells_a_person_the_plan_its_cost_and_its_certificate() -> None:
    out = run("plan", SMALL, *SET).out
    for word in (SMALL, "layout", "schedule", "step", "MFU", "peak memory", "certificate", "legal plan", "simulated"):
        assert word in out
    assert "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_a_scenario_can_be_made_of_a_model_and_a_cluster() -> None:
    flags = ("--model", "tiny-moe", "--cluster", "cpu-host", "--global-batch", "8", "--seq", "128")
    found = run("plan", *flags, *SET, "--set", "choose.precision.compute=fp32", "--json").document
    assert found["scenario"]["name"] == "tiny-moe-on-cpu-host"


def test_flags_change_a_scenario_that_is_named() -> None:
    document = run("plan", SMALL, *SET, "--global-batch", "16", "--seq", "64", "--json").document["scenario"]
    assert document["workload"]["global_batch"]["value"] == 16
    assert document["workload"]["sequence"]["value"] == 64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "--model, --cluster, --global-batch, --seq"),
        (["plan", "tiny-moe-2-rank"], "did you mean 'tiny-moe-2-ranks'"),
        (["plan", SMALL, "--set", "nodes"], "key=value"),
        (["plan", SMALL, "--set", "nodes=1", "--set", "nodes=2"], "twice"),
        (["plan", SMALL, "--set", "nodes=1", "--nodes", "2"], "give it once"),
        (["plan", SMALL, "--set", "workload.global_batch=8.5"], "global_batch"),
        (["plan", SMALL, "--planner", "exhaustife"], "did you mean 'exhaustive'"),
        (["plan", SMALL, "--gap", "-1"], "gap"),
        (["plan", SMALL, "--time-limit", "0"], "time limit"),
        (["plan", "--model", "tiny-moe", "--cluster", "cpu-host"], "--global-batch, --seq"),
        (["simulate", "--plan", "nowhere.json"], "nowhere.json: does not exist"),
        (["simulate", SMALL, "--seed", "1"], "--jitter"),
        (["simulate", SMALL, "--slowdown", "2"], "--stragglers"),
        (["simulate", SMALL, "--jitter", "7"], "0 to 2"),
        (["simulate", SMALL, "--plot", "step.png", "--heatmap", "./step.png"], "is asked for twice"),
        (["plan", SMALL, "--nodes", "0"], "--nodes: 0 is not allowed"),
        (["plan", SMALL, "--seq", "0"], "--seq: 0 is not allowed"),
        (["plan", SMALL, "--phase", "training"], "--phase: unknown value 'training'; did you mean 'train'?"),
        (["what-if", SMALL, "nodes=0"], "what-if nodes: 0 is not allowed"),
        (["what-if", SMALL, "nodez=2"], "what-if nodez: is not the path of a field; did you mean 'nodes'?"),
        (["plan", SMALL, "--set", "routing.router=multinomial", "--set", "routing.x=1"], "takes no options; remove it"),
        (["simulate", SMALL, "--plot", "step.xyz"], ".png"),
        (["simulate", SMALL, "--trace", "no/such/folder/step.json"], "there is no folder"),
        (["export", "tabel", "step.csv", SMALL], "did you mean 'table'"),
        (["what-if", "nodes=1,2"], "no scenario is named"),
        (["what-if", SMALL], "what if what?"),
        (["what-if", SMALL, "nodes"], "key=value"),
        (["what-if", SMALL, "nodes=1,,2"], "a value is missing"),
        (["what-if", SMALL, "nodes=1", "nodes=2"], "varied twice"),
        (["what-if", SMALL, "nodez=1"], "nodez"),
        (["list", "modelz"], "did you mean 'models'"),
        (["show", "mixtral-8x7c"], "did you mean 'mixtral-8x7b'"),
        (["show", "h100"], "did you mean 'h100-"),
        (["sources", "mixtral-8x7c"], "did you mean 'mixtral-8x7b'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_gets_wrong_is_one_message(words: list[str], said: str) -> None:
    assert said in refusal(*words)


@pytest.mark.parametrize("words", [["plan", "--wrong"], ["plam"], ["plan", SMALL, "--nodes", "many"], ["show"]])
def test_a_wrong_option_has_status_2(words: list[str]) -> None:
    answer = Answer(*words)
    assert answer.status == 2
    assert answer.out == ""
    assert "Usage: " in answer.err


# simulate and export


def test_simulate_takes_what_plan_printed_and_finds_the_same_step(plan_json: Path) -> None:
    planned = json.loads(plan_json.read_text())
    found = run("simulate", "--plan", str(plan_json), "--json").document
    for key in ("step_s", "mfu", "breakdown_s", "memory", "plan", "scenario"):
        assert found[key] == planned[key]
    assert found["noise"] is None


def test_what_simulate_printed_can_be_simulated_again(plan_json: Path, tmp_path: Path) -> None:
    first = run("simulate", "--plan", str(plan_json), "--json").out
    (tmp_path / "again.json").write_text(first)
    assert run("simulate", "--plan", str(tmp_path / "again.json"), "--json").out == first


def test_a_bare_plan_needs_its_scenario_named(plan_json: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(json.loads(plan_json.read_text())["plan"]))
    assert "name the scenario" in refusal("simulate", "--plan", str(bare))
    assert run("simulate", SMALL, "--plan", str(bare), "--json").document["plan"]["schema"] == "moeplan.plan/v1"


def test_choices_are_refused_beside_a_plan_that_has_chosen(plan_json: Path) -> None:
    said = refusal("simulate", "--plan", str(plan_json), "--set", "choose.tp=2")
    assert "--set choose.tp: choose has no effect on a given plan; " in said


def test_a_plan_of_another_size_is_refused_with_its_file_and_a_remedy(plan_json: Path) -> None:
    said = refusal("simulate", "small-8-gpus", "--plan", str(plan_json))
    assert said.startswith(f"moeplan: {plan_json}: plan: ")
    assert "but the cluster has 8; plan again, or use the scenario that the plan was made for" in said


def test_more_stragglers_than_gpus_are_refused(plan_json: Path) -> None:
    assert "99 stragglers" in (said := refusal("simulate", "--plan", str(plan_json), "--stragglers", "99"))
    assert "use at most 2" in said


def test_a_scenario_can_be_changed_under_a_plan(plan_json: Path) -> None:
    step_s = [
        run("simulate", "--plan", str(plan_json), "--set", f"workload.global_batch={batch}", "--json").document[
            "step_s"
        ]
        for batch in (8, 16)
    ]
    assert step_s[0] < step_s[1]


def test_simulate_writes_traces_and_pictures_and_says_so_on_standard_error(plan_json: Path, tmp_path: Path) -> None:
    files = {"--trace": "step.json", "--plot": "step.svg", "--heatmap": "traffic.png"}
    words = [word for flag, name in files.items() for word in (flag, str(tmp_path / name))]
    answer = run("simulate", "--plan", str(plan_json), *words, "--json")
    assert answer.document["schema"] == "moeplan.simulation/v1"
    assert all(f"wrote {tmp_path / name}" in answer.err for name in files.values())
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert (tmp_path / "traffic.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "step.svg").read_text()


def test_noise_is_in_the_document(plan_json: Path) -> None:
    found = run("simulate", "--plan", str(plan_json), "--stragglers", "1", "--slowdown", "1.5", "--json").document
    assert found["noise"] == {"jitter": 0.0, "stragglers": 1, "slowdown": 1.5, "seed": 0}
    assert found["step_s"] > json.loads(plan_json.read_text())["step_s"]


def test_export_writes_one_file_and_prints_nothing(plan_json: Path, tmp_path: Path) -> None:
    answer = run("export", "table", str(tmp_path / "step.csv"), "--plan", str(plan_json))
    assert answer.out == ""
    assert (tmp_path / "step.csv").read_text().startswith("lane,")


# what-if


def test_what_if_is_a_table_of_the_base_and_every_cell() -> None:
    out = run("what-if", SMALL, *SET, "workload.global_batch=16,-1", "routing.skew=0,1").out
    lines = out.splitlines()
    assert lines[0].split() == ["workload.global_batch", "routing.skew", "plan", "step", "gap", "change"]
    assert [line.split()[:2] for line in lines[2:]] == [["16", "0"], ["16", "1"], ["-1", "0"], ["-1", "1"]]
    assert lines[1].startswith("base")
    assert "+" in lines[2]
    assert "global_batch" in lines[4].partition("routing")[0]


def test_what_if_as_json_holds_the_results() -> None:
    found = run("what-if", SMALL, *SET, "routing.skew=0,1", "--json").document
    assert found["schema"] == "moeplan.what-if/v1"
    assert [row["changes"] for row in found["rows"]] == [{"routing.skew": "0"}, {"routing.skew": "1"}]
    for row in (found["base"], *found["rows"]):
        assert row["step_s"] == row["result"]["step_s"]
        assert row["gap"] == row["result"]["gap"]


def test_what_if_can_keep_the_plan() -> None:
    found = run("what-if", SMALL, *SET, "workload.global_batch=16,9", "--no-replan", "--json").document
    kept, refused = found["rows"]
    assert kept["plan"] == found["base"]["plan"]
    assert kept["gap"] is None
    assert refused["error"]


def test_commas_inside_brackets_and_quotes_belong_to_a_value() -> None:
    assert grid_of(["choose.tp=[1,2],4", "a.b={x: 1, y: 2}", "c.d='1,2'"]) == {
        "choose.tp": ["[1,2]", "4"],
        "a.b": ["{x: 1, y: 2}"],
        "c.d": ["'1,2'"],
    }


def test_a_certificate_never_promises_more_than_is_proven() -> None:
    assert [at_most(share) for share in (0.0, 0.00801, 0.008, 0.0999, 0.5, 2.0)] == [
        "0 %", "0.81 %", "0.8 %", "10 %", "50 %", "200 %",
    ]  # fmt: skip


# list, show, sources


@pytest.mark.parametrize(
    "kind", ["models", "topologies", "cost-models", "scenarios", "schedules", "routers", "planners"]
)
def test_list_names_all_there_is_of_a_kind(kind: str) -> None:
    rows = run("list", kind, "--json").document
    assert [row["name"] for row in rows] == catalogue.names(kind)
    assert all(row["about"] for row in rows)
    assert [line.split()[0] for line in run("list", kind).out.splitlines()] == catalogue.names(kind)


def test_list_alone_names_the_kinds_and_each_can_be_listed() -> None:
    kinds = [row["name"] for row in run("list", "--json").document]
    assert {"models", "cost-models", "scenarios", "exporters"} <= set(kinds)
    for kind in kinds:
        run("list", kind)


def test_show_counts_the_parameters_of_a_model() -> None:
    found = run("show", "mixtral-8x7b", "--json").document
    assert found["total_parameters"] == 46_702_792_704
    assert found["active_parameters"] == 12_879_925_248
    assert found["routed_parameters"] == 45_097_156_608
    assert "46,702,792,704" in run("show", "mixtral-8x7b").out


def test_show_reads_a_config_json() -> None:
    path = next((Path(__file__).parents[1] / "data" / "hf_configs").rglob("*.json"))
    assert run("show", str(path), "--json").document["total_parameters"] > 0


@pytest.mark.parametrize("name", ["h100-sxm", "hgx-h100-rail", SMALL, "zipf", "table"])
def test_show_shows_anything_that_is_listed(name: str) -> None:
    assert run("show", name, "--json").document["name"] == name
    assert name in run("show", name).out


def test_sources_prints_the_bibliography() -> None:
    rows = run("sources", SMALL, "--json").document
    assert rows == [row._asdict() for row in catalogue.sources(SMALL)]
    out = run("sources", SMALL).out
    assert all(row["figure"] in out and row["cite"] in out for row in rows)


@pytest.mark.parametrize("words", [("sources", SMALL), ("show", "deepseek-v3-2048xh800")])
def test_a_narrow_terminal_folds_notes_and_never_a_key(words: tuple[str, str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.split() for line in run(*words).out.splitlines()]
    shown = {cells[0] for cells in lines if cells}
    assert {row.figure for row in catalogue.sources(words[1])} - shown <= {"model.dimensions"}


# A process of its own


def command(*words: str, flags: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *flags, "-m", "moeplan", *words]


def test_it_works_without_assertions(plan_json: Path) -> None:
    done = subprocess.run(command("plan", SMALL, *SET, "--json", flags=("-O",)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("planning ") for line in done.stderr.splitlines()), (
        "how far a slow machine is, if anything"
    )
    assert done.stdout == plan_json.read_text()
    done = subprocess.run(command("plan", "nope", flags=("-O",)), capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(flags: list[str]) -> None:
    with subprocess.Popen(
        command("show", "deepseek-v3-2048xh800", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_is_one_message() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command("list", "models"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("moeplan: cannot write")
    assert done.stderr.count("\n") == 1


def test_closed_streams_do_no_harm() -> None:
    shell = f"{sys.executable} -m moeplan show mixtral-8x7b --json >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell]).returncode == 0


@pytest.mark.parametrize("words", [["plan", SMALL, *SET], ["show", "mixtral-8x7b"]])
def test_a_terminal_of_plain_ascii_is_enough(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command(*words), capture_output=True, env=environment)
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_control_c_is_quiet_and_has_status_130() -> None:
    code = (
        "import os, signal, threading, moeplan.cli as cli, moeplan.catalogue as catalogue\n"
        "catalogue.names = lambda kind: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "list", "models"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# waiting


def test_what_is_over_at_once_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("planning") as tell:
        tell("simulating", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_what_takes_longer_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeplan._waiting._PATIENCE_S", 0.0)
    with waiting("planning") as tell:
        tell("simulating", 1, 4)
        tell("simulating", 2, 4)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "planning: simulating (25.0 %)\n")


def test_on_a_terminal_there_is_a_bar_and_then_it_is_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeplan._waiting._PATIENCE_S", 0.01)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(MoeplanError, match="enough"), waiting("planning") as tell:  # noqa: PT012
        tell("simulating", 1, 2)
        time.sleep(0.3)
        raise MoeplanError("enough")
    out, err = capsys.readouterr()
    assert out == ""
    assert "simulating" in err
    assert err.rstrip().endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))


def test_interrupts_are_not_swallowed_while_waiting() -> None:
    with pytest.raises(KeyboardInterrupt), waiting("planning"):
        signal.raise_signal(signal.SIGINT)
