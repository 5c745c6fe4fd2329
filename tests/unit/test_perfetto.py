"""A trace keeps the rules by which Perfetto reads one. benchmarks/perfetto_ui.py asks Perfetto itself."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.domain.program import Exchange, Flows, Lane, Program, Rendezvous, Tasks, Work
from moeplan.domain.timeline import Timeline
from moeplan.errors import MoeplanError
from moeplan.exporters._trace import rounded_ns
from moeplan.exporters.perfetto import export

COMPUTE, EXPERT, SHARD, PIPELINE = 0, 2, 3, 4
READ_BY_PERFETTO = {"process_name", "thread_name", "process_sort_index", "thread_sort_index"}


class Builder:
    """Tasks one after another, each as early as its stream and its dependencies allow."""

    def __init__(self, seed: int, idle_share: float) -> None:
        self.rng, self.idle_share = np.random.default_rng(seed), idle_share
        self.rows: list[tuple[int, ...]] = []
        self.start: list[float] = []
        self.end: list[float] = []
        self.pairs: list[tuple[int, int]] = []
        self.free: defaultdict[tuple[int, int], float] = defaultdict(float)

    def duration(self) -> float:
        return 0.0 if self.rng.random() < self.idle_share else float(self.rng.random()) * 1e-5

    def add(self, lane: int, stream: int, unit: int, *, what: tuple[int, int, int], after: list[int]) -> int:
        start = max([self.free[lane, stream]] + [self.end[task] for task in after])
        end = start + self.duration()
        self.pairs += [(task, len(self.rows)) for task in after]
        self.rows.append((lane, stream, unit, *what))
        self.start.append(start)
        self.end.append(end)
        self.free[lane, stream] = end
        return len(self.rows) - 1


def pipeline(*, stages: int = 3, micro_batches: int = 4, layers: int = 2, seed: int = 0, idle: float = 0.0) -> Timeline:
    """Forward passes through stages of two GPUs, then a task of the step. `idle`: share of tasks of no length."""
    build = Builder(seed, idle)
    for batch in range(micro_batches):
        last: list[int] = []
        for stage in range(stages):
            for layer in range(stage * layers, (stage + 1) * layers):
                last = [build.add(stage, COMPUTE, 0, what=(0, layer, batch), after=last)]
                last = [build.add(stage, EXPERT, stage, what=(0, layer, batch), after=last)]
            if stage < stages - 1:
                last = [build.add(stage, PIPELINE, stages + stage, what=(0, -1, batch), after=last)]
    for stage in range(stages):
        build.add(stage, COMPUTE, 1, what=(4, -1, -1), after=[])
    return Timeline(
        program=_program(build, stages),
        start_s_T=np.array(build.start),
        end_s_T=np.array(build.end),
        launch_s_T=np.zeros(len(build.start)),
    )


def _program(build: Builder, stages: int) -> Program:
    ranks, ints, floats = np.arange(2 * stages).reshape(stages, 2), np.zeros(0, dtype=np.int64), np.zeros(0)
    columns, pairs = np.array(build.rows, dtype=np.int64).T, np.array(build.pairs, dtype=np.int64)
    every = Exchange(kind="dispatch", operation="all_to_all", algorithm="linear", groups_NG=ranks, size_bytes=1e6)
    sends = [replace(every, kind="send", operation="send", groups_NG=ranks[s : s + 2].T) for s in range(stages - 1)]
    return Program(
        lanes=tuple(Lane(stage=stage, ranks_R=ranks[stage]) for stage in range(stages)),
        works=(Work(kind="attention", kernels=()), Work(kind="optimizer", kernels=())),
        exchanges=(every, *sends),
        meetings=(
            *(Rendezvous(exchange=0, lanes=(stage,), phases=()) for stage in range(stages)),
            *(Rendezvous(exchange=1 + s, lanes=(s,), phases=()) for s in range(stages - 1)),
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
        before_D=pairs[:, 0], after_D=pairs[:, 1], arbitration="fair", micro_op_bytes=0.0, step_tokens=4096,
        model_flops=1e12, num_gpus=2 * stages,
    )  # fmt: skip


def events_of(timeline: Timeline, folder: Path, **options: Any) -> list[dict[str, Any]]:
    export(timeline, folder / "trace.json", **options)
    document = json.loads((folder / "trace.json").read_text())
    assert document["displayTimeUnit"] == "ns"
    events: list[dict[str, Any]] = document["traceEvents"]
    return events


def kind(events: list[dict[str, Any]], *letters: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] in letters]


def nanoseconds(event: dict[str, Any], key: str = "ts") -> int:
    return round(float(event[key]) * 1000)


@pytest.fixture
def events(tmp_path: Path) -> list[dict[str, Any]]:
    return events_of(pipeline(), tmp_path)


def test_every_task_is_one_slice_with_its_name_and_arguments(events: list[dict[str, Any]]) -> None:
    timeline = pipeline()
    slices = {event["args"]["task"]: event for event in kind(events, "X")}
    assert sorted(slices) == list(range(len(timeline.program.tasks)))
    first, last = slices[0], slices[len(slices) - 1]
    assert (first["name"], first["cat"]) == ("attention L0 F m0", "attention")
    assert first["args"] == {"pass": "forward", "layer": 0, "micro_batch": 0, "chunk": 0, "task": 0}
    assert (last["name"], last["cat"]) == ("optimizer step", "optimizer")


def test_times_are_whole_nanoseconds_in_microseconds(events: list[dict[str, Any]]) -> None:
    timeline = pipeline()
    for event in kind(events, "X"):
        task = event["args"]["task"]
        assert nanoseconds(event) == pytest.approx(timeline.start_s_T[task] * 1e9, abs=0.51)
        assert nanoseconds(event) + nanoseconds(event, "dur") == pytest.approx(timeline.end_s_T[task] * 1e9, abs=0.51)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), idle=st.sampled_from([0.0, 0.3, 1.0]), stages=st.integers(1, 4))
def test_a_trace_keeps_the_rules(seed: int, idle: float, stages: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    timeline = pipeline(seed=seed, idle=idle, stages=stages)
    events = events_of(timeline, tmp_path_factory.mktemp("trace"))
    assert_slices_never_overlap(events)
    assert_arrows_are_whole(events)
    assert len(kind(events, "X")) == len(timeline.program.tasks)


def assert_slices_never_overlap(events: list[dict[str, Any]]) -> None:
    ends: defaultdict[tuple[int, int], int] = defaultdict(int)
    for event in sorted(kind(events, "X"), key=lambda event: (nanoseconds(event), nanoseconds(event, "dur"))):
        thread = event["pid"], event["tid"]
        assert nanoseconds(event) >= ends[thread]
        assert event["dur"] >= 0
        ends[thread] = nanoseconds(event) + nanoseconds(event, "dur")


def assert_arrows_are_whole(events: list[dict[str, Any]]) -> None:
    """Each arrow is s, t, ..., f in the order of the file; each point where one slice, and no other, starts."""
    starts = Counter((event["pid"], event["tid"], event["ts"]) for event in kind(events, "X"))
    letters: defaultdict[int, str] = defaultdict(str)
    times: defaultdict[int, list[float]] = defaultdict(list)
    for event in kind(events, "s", "t", "f"):
        assert starts[event["pid"], event["tid"], event["ts"]] == 1
        assert (event.get("bp") == "e") == (event["ph"] != "s")
        letters[event["id"]] += event["ph"]
        times[event["id"]].append(event["ts"])
    assert all(text == "s" + "t" * (len(text) - 2) + "f" for text in letters.values())
    assert all(found == sorted(found) for found in times.values())


def test_an_arrow_leads_from_what_is_sent_to_what_waits_for_it(events: list[dict[str, Any]]) -> None:
    points = defaultdict(list)
    slices = {(event["pid"], event["tid"], event["ts"]): event["name"] for event in kind(events, "X")}
    for event in kind(events, "s", "t", "f"):
        points[event["id"]].append((event["pid"], slices[event["pid"], event["tid"], event["ts"]]))
    assert len(points) == 2 * 4
    assert points[1] == [(1, "dispatch L1 F m0"), (1, "send F m0"), (2, "attention L2 F m0")]


def test_another_dependency_between_lanes_is_an_arrow_too(tmp_path: Path) -> None:
    timeline = pipeline(micro_batches=1)
    last = len(timeline.program.tasks) - 1
    program = replace(
        timeline.program,
        before_D=np.append(timeline.program.before_D, 0),
        after_D=np.append(timeline.program.after_D, last),
    )
    points = [e for e in events_of(replace(timeline, program=program), tmp_path) if e.get("name") == "dependency"]
    assert [(point["ph"], point["pid"]) for point in points] == [("s", 1), ("f", 3)]


def test_an_arrow_that_would_point_back_in_time_is_left_out(tmp_path: Path) -> None:
    timeline = pipeline()
    behind = np.where(timeline.program.tasks.lane_T == 0, 1.0, 0.0)
    skewed = replace(timeline, start_s_T=timeline.start_s_T + behind, end_s_T=timeline.end_s_T + behind)
    events = events_of(skewed, tmp_path)
    assert_arrows_are_whole(events)
    assert {event["pid"] for event in kind(events, "s", "t", "f")} == {2, 3}


def test_lanes_and_streams_have_names_and_places_and_no_other_metadata(events: list[dict[str, Any]]) -> None:
    named = kind(events, "M")
    assert {event["name"] for event in named} == READ_BY_PERFETTO
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    assert processes == {
        1: "stage 0, 2 GPUs: ranks 0-1",
        2: "stage 1, 2 GPUs: ranks 2-3",
        3: "stage 2, 2 GPUs: ranks 4-5",
        4: "all 6 GPUs",
    }
    threads = {(event["pid"], event["tid"]) for event in named if event["name"] == "thread_name"}
    assert threads == {(event["pid"], event["tid"]) for event in kind(events, "X")}
    places = {event["pid"]: event["args"]["sort_index"] for event in named if event["name"] == "process_sort_index"}
    assert places == {1: 0, 2: 1, 3: 2, 4: 3}


def test_no_number_of_a_process_or_thread_is_zero_or_used_twice(events: list[dict[str, Any]]) -> None:
    threads = {(event["pid"], event["tid"]) for event in kind(events, "X")}
    numbers = [tid for _, tid in threads] + list({pid for pid, _ in threads})
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) > 0


def test_counters_start_and_end_at_nothing_and_count_what_runs(events: list[dict[str, Any]]) -> None:
    timeline = pipeline()
    values = defaultdict(list)
    for event in kind(events, "C"):
        values[event["name"]].append((nanoseconds(event), *event["args"].values()))
    assert set(values) == {"busy", "in flight"}
    assert all(found == sorted(found) and found[-1][1] == 0 for found in values.values())
    start, end = rounded_ns(timeline)
    computes = timeline.program.tasks.stream_T == COMPUTE
    for time, gpus in values["busy"]:
        assert gpus == 2 * ((start <= time) & (time < end) & computes).sum()


def test_gzip_holds_the_same_trace(tmp_path: Path) -> None:
    export(pipeline(), tmp_path / "trace.json")
    export(pipeline(), tmp_path / "trace.JSON.GZ")
    assert gzip.decompress((tmp_path / "trace.JSON.GZ").read_bytes()) == (tmp_path / "trace.json").read_bytes()


@pytest.mark.parametrize("most", [250, 400, 1000, 5000])
def test_a_cut_trace_keeps_whole_micro_batches_and_says_so(most: int, tmp_path: Path, caplog: Any) -> None:
    timeline = pipeline(micro_batches=500)
    with caplog.at_level(logging.WARNING, logger="moeplan"):
        events = events_of(timeline, tmp_path, max_events=most)
    assert len(events) <= most
    tasks, kept = timeline.program.tasks, np.array([event["args"]["task"] for event in kind(events, "X")])
    in_trace = np.bincount(tasks.microbatch_T[kept][tasks.microbatch_T[kept] >= 0], minlength=500)
    assert set(in_trace.tolist()) == {0, 2 * 3 * 2 + 2}
    assert (tasks.microbatch_T[kept] == -1).sum() == 3
    chosen = np.flatnonzero(in_trace)
    assert np.ptp(np.diff(chosen)) <= 1
    (note,) = kind(events, "i")
    assert note["name"].startswith(f"sampled: {len(kept)} of {len(tasks)} tasks: whole micro-batches, evenly spaced")
    assert note["name"] == json.loads((tmp_path / "trace.json").read_text())["otherData"]["sampling"]
    assert note["name"] in caplog.text


def test_where_one_micro_batch_is_too_much_lanes_are_left_out(tmp_path: Path) -> None:
    events = events_of(pipeline(stages=40, micro_batches=3, layers=30), tmp_path, max_events=2000)
    (note,) = kind(events, "i")
    assert "(1 of 3) and " in note["name"]
    assert "of 40 lanes" in note["name"]
    assert len(events) <= 2000


def test_a_cap_that_holds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match=r"max_events: 10 .*allow more"):
        export(pipeline(), tmp_path / "trace.json", max_events=10)
    with pytest.raises(MoeplanError, match=r"max_events: there is room for .* one lane has .*allow more"):
        export(pipeline(stages=1, layers=300), tmp_path / "trace.json", max_events=200)


def test_tasks_of_a_stream_that_overlap_are_an_error_and_rounding_is_none(tmp_path: Path) -> None:
    timeline = pipeline(stages=1, micro_batches=1)
    end = timeline.end_s_T.copy()
    end[0] += 400e-9
    assert_slices_never_overlap(events_of(replace(timeline, end_s_T=end), tmp_path))
    end[0] += 1.0
    with pytest.raises(MoeplanError, match=r"lane 0, compute stream: 'attention L1 F m0' .* record the timeline again"):
        export(replace(timeline, end_s_T=end), tmp_path / "trace.json")
