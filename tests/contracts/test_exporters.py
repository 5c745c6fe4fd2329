"""The law of the exporters' menu, on every dish found there."""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from moeplan import catalogue, menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.domain.placement import ExpertMap
from moeplan.domain.plan import Plan
from moeplan.domain.program import Exchange, Flows, Lane, Program, Rendezvous, Tasks, Work
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError
from moeplan.exporters import traffic, write_atomically
from moeplan.partition.ranks import ranks_of_stage

NAMES = menu.names("exporters")
DISHES = [(name, suffix) for name in NAMES for suffix in menu.module("exporters", name).SUFFIXES]
HOSTILE = "<script>alert(1)</script>\n\x00$\\frac{1}{0}$ \u8eab,\"'=cmd|" + "x" * 100_000
ROWS = (  # lane, stream, unit, pass, layer, micro-batch, start and end in us
    (0, 0, 0, 0, 0, 0, 0, 10), (0, 2, 0, 0, 0, 0, 10, 14), (0, 4, 2, 0, -1, 0, 14, 15), (1, 0, 0, 0, 1, 0, 15, 25),
    (1, 2, 1, 0, 1, 0, 25, 29), (1, 0, 0, 1, 1, 0, 27, 47), (0, 2, 0, 0, 0, 0, 48, 52),
    (0, 3, 3, 4, -1, -1, 52, 60), (0, 0, 1, 4, -1, -1, 60, 62),
)  # fmt: skip
DISPATCHES, SENDS, GRADIENTS = 0, 1, 2


def build_timeline(*, work: str = "attention", rows: tuple[tuple[int, ...], ...] = ROWS) -> Timeline:
    """Two stages of two GPUs."""
    ints, floats = np.zeros(0, dtype=np.int64), np.zeros(0)
    stages = np.array([[0, 1], [2, 3]])
    share_GG = np.array([[0.25, 0.75], [0.5, 0.5]])
    columns = np.array(rows, dtype=np.int64).reshape(-1, 8).T
    whole = Exchange(kind="dispatch", operation="all_to_all", algorithm="linear", groups_NG=stages, size_bytes=8e6)
    program = Program(
        lanes=(Lane(stage=0, ranks_R=stages[0]), Lane(stage=1, ranks_R=stages[1])),
        works=(Work(kind=work, kernels=()), Work(kind="optimizer", kernels=())),
        exchanges=(
            replace(whole, share_GG=share_GG),
            replace(whole, kind="send", operation="send", groups_NG=stages.T),
            replace(whole, kind="gradients", operation="all_reduce"),
        ),
        meetings=(
            Rendezvous(exchange=DISPATCHES, lanes=(0,), phases=()),
            Rendezvous(exchange=DISPATCHES, lanes=(1,), phases=()),
            Rendezvous(exchange=SENDS, lanes=(0,), phases=()),
            Rendezvous(exchange=GRADIENTS, lanes=(0,), phases=()),
        ),
        flows=Flows(
            share_C=floats, extra_bytes_C=floats,
            count_C=ints, crossing_CK=np.zeros((0, 0)), capacity_bytes_per_s_K=floats, link_kind_K=(),
            num_links_K=ints, lanes_C=((0,),),
        ),
        tasks=Tasks(
            lane_T=columns[0], stream_T=columns[1], unit_T=columns[2], pass_T=columns[3], layer_T=columns[4],
            microbatch_T=columns[5], chunk_T=np.zeros_like(columns[0]),
        ),
        before_D=np.array([0, 1, 2][: len(rows)], dtype=np.int64),
        after_D=np.array([1, 2, 3][: len(rows)], dtype=np.int64), arbitration="fair",
        micro_op_bytes=0.0, step_tokens=4096, model_flops=1e12, num_gpus=4,
    )  # fmt: skip
    start, end = columns[6] * 1e-6, columns[7] * 1e-6
    return Timeline(program=program, start_s_T=start, end_s_T=end, launch_s_T=np.zeros(len(start)))


def build_placing(**_: Any) -> ExpertMap:
    """A dense layer between two with four experts in six slots; of an experts' map nothing else can vary."""
    return ExpertMap(num_gpus=2, num_experts=4, rows=((0, 1, 2, 3, 0, 1), None, (3, 2, 1, 0, 3, 2)))


BUILDERS: dict[str, Callable[..., Any]] = {"timeline": build_timeline, "placing": build_placing}


@pytest.fixture(params=DISHES, ids=lambda dish: "".join(dish))
def dish(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    name, suffix = request.param
    return menu.module("exporters", name), suffix


def subject(module: ModuleType) -> str:
    """What a dish exports: the name of its first argument."""
    return next(iter(inspect.signature(module.export).parameters))


def sample(module: ModuleType, **changes: Any) -> Any:
    return BUILDERS[subject(module)](**changes)


def test_every_dish_says_what_it_exports_and_its_options_have_defaults() -> None:
    for name in NAMES:
        first, path, *options = inspect.signature(menu.module("exporters", name).export).parameters.values()
        assert first.name in BUILDERS, f"{name}: add a builder of a {first.name} to this file"
        assert path.name == "path"
        assert all(o.kind is o.KEYWORD_ONLY and o.default is not o.empty for o in options)
        assert menu.about("exporters", name).endswith(".")


def test_the_same_input_gives_the_same_bytes_and_replaces_what_was_there(
    dish: tuple[ModuleType, str], tmp_path: Path
) -> None:
    module, suffix = dish
    path = tmp_path / f"out{suffix}"
    module.export(sample(module), path)
    first = path.read_bytes()
    path.write_text("something else")
    module.export(sample(module), str(path))
    assert path.read_bytes() == first != b""
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_exported_stays_as_it_was(dish: tuple[ModuleType, str], tmp_path: Path) -> None:
    module, suffix = dish
    given = sample(module)
    for array in _arrays(given) if isinstance(given, Timeline) else ():
        array.setflags(write=False)
    module.export(given, tmp_path / f"out{suffix}")


def _arrays(timeline: Timeline) -> tuple[np.ndarray[Any, Any], ...]:
    """The rest cannot be written to anyway."""
    return timeline.start_s_T, timeline.end_s_T, timeline.program.tasks.lane_T, timeline.program.before_D


def test_a_step_without_tasks_is_a_file_too(dish: tuple[ModuleType, str], tmp_path: Path) -> None:
    module, suffix = dish
    module.export(sample(module, rows=()), tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").stat().st_size > 0


def test_hostile_names_do_no_harm(dish: tuple[ModuleType, str], tmp_path: Path) -> None:
    module, suffix = dish
    path = tmp_path / f"a\n<b>$x$ {suffix}"
    module.export(sample(module, work=HOSTILE), path)
    content = path.read_bytes()
    assert len(content) < 2_000_000
    if suffix == ".svg":
        assert b"<script" not in content
    if suffix == ".json":
        json.loads(content)
    if suffix == ".csv":
        rows = list(csv.reader(io.StringIO(content.decode())))
        assert len({len(row) for row in rows}) == 1


def test_no_setting_of_the_user_changes_a_picture(dish: tuple[ModuleType, str], tmp_path: Path) -> None:
    import matplotlib as mpl

    module, suffix = dish
    module.export(sample(module), tmp_path / f"a{suffix}")
    with mpl.rc_context({"font.size": 30, "savefig.dpi": 20, "axes.facecolor": "red"}):
        module.export(sample(module), tmp_path / f"b{suffix}")
        assert mpl.rcParams["font.size"] == 30
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("place", ["missing/out", "out", "file/out"])
def test_a_path_that_cannot_be_written_is_named_and_nothing_is_left(
    dish: tuple[ModuleType, str], place: str, tmp_path: Path
) -> None:
    module, suffix = dish
    (tmp_path / "file").write_text("")
    (tmp_path / f"out{suffix}").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MoeplanError, match=r"(?s)out.*; "):
        module.export(sample(module), tmp_path / (place + suffix))
    assert sorted(tmp_path.rglob("*")) == before


def test_another_suffix_is_refused_with_those_that_are_allowed(dish: tuple[ModuleType, str], tmp_path: Path) -> None:
    module, suffix = dish
    with pytest.raises(MoeplanError, match=f"use .*{suffix}"):
        module.export(sample(module), tmp_path / "out.docx")
    assert not list(tmp_path.iterdir())


def test_no_dish_loads_matplotlib_before_it_draws() -> None:
    lines = [f"import moeplan.exporters.{name}" for name in NAMES] + [
        "import sys",
        "sys.exit('matplotlib' in sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True)


@pytest.mark.parametrize("special", ["/dev/full", "/dev/null"])
def test_a_device_is_refused(special: str) -> None:
    with pytest.raises(MoeplanError, match="is a device"):
        write_atomically(special, "x")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with (
        file_size_limit(100_000),
        pytest.raises(MoeplanError, match=r"out.txt: cannot be written: .*; free some space"),
    ):
        write_atomically(path, b"x" * 1_000_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "out.txt", pieces())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, ""])
def test_an_impossible_name_is_a_moeplan_error_on_one_line(path: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoeplanError) as caught:
        write_atomically(path, "x")
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_read_only_folder_or_file_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(MoeplanError, match="is read-only"):
        write_atomically(tmp_path / "old.txt", "new")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(MoeplanError, match="permission denied; use a folder that you may write in"):
        write_atomically(tmp_path / "new.txt", "new")


def test_links_and_modes_survive(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_atomically(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o640


def test_the_table_accounts_for_every_second_of_the_step(tmp_path: Path) -> None:
    menu.load("exporters", "table", "export")(build_timeline(), tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    for row in [*found["lanes"], found["all"]]:
        assert row["compute_s"] + row["exposed_s"] + row["idle_s"] == pytest.approx(found["step_s"])
    second = found["lanes"][1]
    assert second["compute_s"] == pytest.approx(30e-6)
    assert second["exposed_s"] == pytest.approx(2e-6)
    assert second["exchange_dispatch_s"] == pytest.approx(4e-6)


def test_the_table_as_text_names_every_kind(tmp_path: Path) -> None:
    menu.load("exporters", "table", "export")(build_timeline(), tmp_path / "out.txt")
    text = (tmp_path / "out.txt").read_text()
    assert text.startswith("predicted step: 62 us on 4 GPUs, 16.52 Mtokens/s per GPU\n")
    assert all(kind in text for kind in ("attention", "optimizer", "dispatch", "send", "gradients"))


def test_traffic_counts_each_meeting_once_for_each_of_its_groups() -> None:
    bytes_RR = traffic(build_timeline().program)
    ring = 8e6  # all_reduce of two: 2 (n - 1) / n of the size to the only neighbour
    expected = np.zeros((4, 4))
    expected[0, 1], expected[1, 0] = 2 * 6e6 + ring, 2 * 4e6 + ring
    expected[2, 3], expected[3, 2] = 6e6, 4e6
    expected[0, 2] = expected[1, 3] = 8e6
    np.testing.assert_allclose(bytes_RR, expected)


def test_traffic_between_nodes_sums_that_between_their_gpus() -> None:
    program = build_timeline().program
    by_gpu, by_node = traffic(program), traffic(program, gpus_per_node=2)
    np.testing.assert_allclose(by_node, by_gpu.reshape(2, 2, 2, 2).sum(axis=(1, 3)))


def test_traffic_is_the_same_for_folded_and_unfolded_lanes() -> None:
    folded = build_timeline().program
    lanes = tuple(Lane(stage=rank // 2, ranks_R=np.array([rank])) for rank in range(4))
    dispatch_0, dispatch_1, send, gradients = folded.meetings
    meetings = (
        replace(dispatch_0, lanes=(0, 1)),
        replace(dispatch_1, lanes=(2, 3)),
        send,
        replace(gradients, lanes=(0, 1)),
        replace(send, lanes=(1,)),
    )
    rows = tuple((2 * row[0] + member, *row[1:]) for row in ROWS for member in (0, 1))
    tasks = build_timeline(rows=rows).program.tasks
    second_send = (tasks.unit_T == 2) & (tasks.lane_T % 2 == 1)
    tasks = replace(tasks, unit_T=np.where(second_send, 4, tasks.unit_T))
    unfolded = replace(folded, lanes=lanes, meetings=meetings, tasks=tasks)
    np.testing.assert_allclose(traffic(unfolded), traffic(folded))


def test_a_picture_of_traffic_refuses_nodes_that_are_too_small(tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match=r"gpus_per_node: 0 .* use 1 or more"):
        menu.load("exporters", "heatmap", "export")(build_timeline(), tmp_path / "a.png", gpus_per_node=0)


@pytest.mark.parametrize("window", [(2.0, 1.0), (-1.0, 1.0), (0.0, float("nan"))])
def test_a_chart_refuses_a_window_without_time(window: tuple[float, float], tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match=r"window_s: .* holds no time"):
        menu.load("exporters", "gantt", "export")(build_timeline(), tmp_path / "a.png", window_s=window)


def test_a_chart_of_a_window_by_kind_is_another_picture(tmp_path: Path) -> None:
    chart = menu.load("exporters", "gantt", "export")
    chart(build_timeline(), tmp_path / "a.svg", window_s=(0.0, 20e-6), color_by="kind")
    chart(build_timeline(), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("folded", [True, False])
def test_what_stages_send_one_another_is_in_the_traffic_of_a_compiled_program(folded: bool) -> None:
    given = catalogue.scenario_from(model="tiny-moe", cluster="hgx-h100-rail", nodes=1, global_batch=32, sequence=512)
    plan = Plan(pp=2, dp=4, ep=4, stages=(2, 2))
    bytes_RR = traffic(compile_plan(plan, given, folded=folded))
    once = given.workload.step_tokens * given.model.hidden_size * 2.0
    is_first = np.isin(np.arange(8), ranks_of_stage(plan, 0))
    assert bytes_RR[np.ix_(is_first, ~is_first)].sum() == pytest.approx(once)
    assert bytes_RR[np.ix_(~is_first, is_first)].sum() == pytest.approx(once)


def test_a_chart_names_every_colour_that_it_shows_and_what_its_numbers_are(tmp_path: Path) -> None:
    menu.load("exporters", "gantt", "export")(build_timeline(), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in ("forward", "backward", "once a step", "dispatch", "gradients", "send", "number in a bar", "(2 GPUs)"):
        assert words in text


def test_sglang_gets_a_row_for_every_layer_and_its_own_default_where_there_are_no_experts(tmp_path: Path) -> None:
    menu.load("exporters", "sglang", "export")(build_placing(), tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]}


def test_tensorrt_llm_gets_the_layers_with_experts_alone(tmp_path: Path) -> None:
    menu.load("exporters", "tensorrt_llm", "export")(build_placing(), tmp_path / "a.yaml")
    found = YAML(typ="safe", pure=True).load(tmp_path / "a.yaml")["moe_config"]["load_balancer"]
    assignments = {0: [0, 1, 2, 3, 0, 1], 2: [3, 2, 1, 0, 3, 2]}
    assert found == {"num_slots": 6, "initial_global_assignments": assignments, "layer_updates_per_iter": 0}


@pytest.mark.parametrize("name", ["sglang", "tensorrt_llm"])
def test_an_engine_gets_no_empty_slot(name: str, tmp_path: Path) -> None:
    given = replace(build_placing(), rows=((0, 1, 2, 3, 0, -1),))
    with pytest.raises(MoeplanError, match=r"6 slots on 2 GPUs are not all full, .*; place with slots .* 4 or 6"):
        menu.load("exporters", name, "export")(given, tmp_path / f"a{menu.module('exporters', name).SUFFIXES[0]}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lowest", "largest"), [(2.1e6, 2.2e6), (1.0, 1e6), (3e4, 8e6), (1e7, 1e8)])
def test_both_ends_of_the_colours_of_traffic_are_labelled(lowest: float, largest: float) -> None:
    ticks = menu.module("exporters", "heatmap")._ticks(lowest, largest)
    assert (ticks[0], ticks[-1]) == (lowest, largest)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 10
