"""Ranks end: with one another, with their parent, on signals; and what cannot be run is said before any is started."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplan as mp
from moeplan import catalogue
from moeplan.domain.plan import Plan
from moeplan.domain.scenario import Scenario
from moeplan.errors import ExecutionError
from moeplan.executor import execute as executor
from moeplan.executor import launch
from moeplan.executor.execute import Job, execute_all

MOST_S = 30.0


def tiny(**changes: Any) -> Scenario:
    given = {"workload.sequence": 64} | {key.replace("__", "."): value for key, value in changes.items()}
    return catalogue.load("tiny-moe-2-ranks", changes=given)


def plan(given: Scenario, **options: Any) -> Plan:
    return Plan(**({"dp": 2, "ep": 2, "stages": (4,), "precision": given.choices.precision} | options))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs leave their folders, if any, where no other test looks."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left(folder: Path) -> list[str]:
    """What there still is of runs below a folder: their own folders, and processes."""
    return [path.name for path in folder.glob("moeplan-*")] + [f"process {rank}" for rank in ranks_of(folder)]


def ranks_of(folder: Path) -> list[int]:
    """The processes of ranks, in their order, by their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if b"moeplan.executor.worker" in words and bytes(folder) in words:
            found.append(int(path.name))
    return sorted(found)


def is_running(folder: Path) -> bool:
    """Whether the ranks of a run are all in a step."""
    for path in folder.glob("moeplan-*/progress"):
        if np.fromfile(path, np.int64).reshape(-1, launch.COLUMNS)[:, launch.JOB].all():
            return True
    return False


def run_and(folder: Path, harm: Callable[[list[int]], None], **options: Any) -> tuple[str, float]:
    """What a long run says, and how long it takes to say it, once `harm` has come to its ranks."""
    given, hurt_s = tiny(), [0.0]

    def wait() -> None:
        while not is_running(folder):
            time.sleep(0.05)
        hurt_s[0] = time.monotonic()
        harm(ranks_of(folder))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    with pytest.raises(ExecutionError) as refused:
        execute_all([Job(scenario=given, plan=plan(given), steps=500)], device="cpu", **options)
    took_s = time.monotonic() - hurt_s[0]
    thread.join()
    assert left(folder) == []
    return str(refused.value), took_s


def test_a_rank_that_dies_ends_the_run_with_its_name_and_task(own_folder: Path) -> None:
    said, took_s = run_and(own_folder, lambda ranks: os.kill(ranks[1], signal.SIGKILL))
    assert "rank 1 was killed by SIGKILL in " in said
    assert took_s < MOST_S


def test_a_rank_that_hangs_ends_the_run_with_its_name_and_task(own_folder: Path) -> None:
    said, took_s = run_and(own_folder, lambda ranks: os.kill(ranks[0], signal.SIGSTOP), patience_s=3.0)
    # Where it is stopped is chance: in most cases in a task, seldom between two.
    assert re.search(r"stands still for 3 s in (task \d+ \(\w+, (forward|backward|step)|between two tasks)", said)
    assert took_s < MOST_S
    assert launch.PATIENCE_S < MOST_S


BROKEN = """
import os
if os.environ.get("RANK") == "1":
    from moeplan.executor import layers
    def merged(*given):
        raise ArithmeticError("two and two are five")
    layers.merged = merged
"""


def test_a_rank_that_raises_ends_the_run_with_its_name_task_and_words(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folder / "sitecustomize.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(own_folder), *sys.path]))
    given, begun_s = tiny(), time.monotonic()
    with pytest.raises(ExecutionError) as refused:
        execute_all([Job(scenario=given, plan=plan(given))], device="cpu")
    said = str(refused.value)
    assert said.startswith("execute: rank 1: task ")
    assert said.endswith("(merge, forward, layer 0, micro-batch 0, chunk 0): two and two are five")
    assert time.monotonic() - begun_s < 2 * MOST_S
    assert left(own_folder) == []


CHOSEN = {"ep": 2, "tp": 1, "pp": 1, "micro_batch": 4, "overlap_degree": 1, "zero_dense": 0, "zero_expert": 0}
"""So that there is little to plan."""
SETTINGS = [word for key, value in CHOSEN.items() for word in ("--set", f"choose.{key}={value}")]
COMMAND = ["execute", "tiny-moe-2-ranks", *SETTINGS, "--steps", "500", "--device", "cpu"]


def started(folder: Path) -> subprocess.Popen[str]:
    code = "from moeplan.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    until_s = time.monotonic() + 120
    while not is_running(folder):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until_s
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_leaves_no_process_and_no_file(number: signal.Signals, status: int, own_folder: Path) -> None:
    process = started(own_folder)
    process.send_signal(number)
    process.communicate(timeout=MOST_S)
    assert process.returncode == status
    assert left(own_folder) == []


def test_ranks_end_with_a_parent_that_is_killed(own_folder: Path) -> None:
    process = started(own_folder)
    process.kill()
    process.communicate()
    until_s = time.monotonic() + MOST_S
    while left(own_folder) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert left(own_folder) == []


# ---- what is refused before a process starts


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(launch.subprocess, "Popen", refuse)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({}, {"recompute": "selective"}, ("recompute 'selective'", "use none or full")),
    ({}, {"arbitration": "fifo"}, ("arbitration 'fifo'", "use fair")),
    ({}, {"precision": {"compute": "fp8"}}, ("precision.compute 'fp8'", "use fp32 or bf16")),
    ({}, {"precision": {"moments": "bf16"}}, ("moments are bf16", "use one format")),
    ({"workload.phase": "prefill"}, {"schedule": "gpipe"}, ("workload.phase 'prefill'", "use train")),
    ({"model": "gpt-oss-20b"}, {"stages": (24,)}, ("model.layers.0.mixer.", "tiny-moe")),
]


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(("changes", "options", "words"), REFUSED)
def test_what_is_not_run_is_refused_by_name(
    changes: dict[str, Any], options: dict[str, Any], words: tuple[str, ...]
) -> None:
    given = tiny(**{key.replace(".", "__"): value for key, value in changes.items()})
    with pytest.raises(ExecutionError) as refused:
        mp.execute(given, plan(given, **options), device="cpu")
    for word in ("execute: ", *words):
        assert word in str(refused.value)


@pytest.mark.usefixtures("no_process")
def test_more_ranks_than_the_machine_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor.os, "cpu_count", lambda: 1)
    given = tiny(cluster__gpus_per_node=8)
    with pytest.raises(ExecutionError, match="8 ranks, but 1 cores can take 4; use a smaller cluster"):
        mp.execute(given, plan(given, dp=8), device="cpu")


@pytest.mark.usefixtures("no_process")
def test_without_pytorch_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    given = tiny()
    with pytest.raises(ExecutionError, match=r"PyTorch is not installed; pip install 'moeplan\[executor\]'"):
        mp.execute(given, plan(given))


def test_the_verb_itself_needs_no_pytorch() -> None:
    """So that a machine without it gets a message, and no import error."""
    code = "import sys, moeplan as mp; mp.execute, mp.Execution; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(("device", "words"), [("tpu", "use auto, cpu or cuda"), ("cuda", "no CUDA device")])
def test_a_device_that_is_not_there_is_refused(device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = tiny()
    with pytest.raises(ExecutionError, match=words):
        mp.execute(given, plan(given), device=device)


@pytest.mark.usefixtures("no_process")
def test_a_plan_of_another_size_is_refused() -> None:
    given = tiny()
    with pytest.raises(mp.PlanError, match="= 4 GPUs, but the cluster has 2"):
        mp.execute(given, plan(given, dp=4), device="cpu")


@pytest.mark.usefixtures("no_process")
def test_what_the_gpu_or_its_library_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    given = tiny()
    half = plan(given, precision={})
    with pytest.raises(ExecutionError, match="precision bf16: this GPU has none; use fp32"):
        mp.execute(given, half, device="cuda")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ExecutionError, match="built without NCCL; install one with it, or use device cpu"):
        mp.execute(given, half, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ExecutionError, match="2 ranks, but this machine has 1 GPUs; use torchrun"):
        mp.execute(given, half, device="cuda")


@pytest.mark.usefixtures("no_process")
def test_a_plan_of_an_older_schema_is_refused(tmp_path: Path) -> None:
    given = tiny()
    (tmp_path / "plan.json").write_text(
        json.dumps(plan(given).model_dump(mode="json", by_alias=True) | {"schema": "moeplan.plan/v0"})
    )
    with pytest.raises(mp.MoeplanError, match=r"moeplan\.plan/v0"):
        mp.execute(given, tmp_path / "plan.json", device="cpu")


# ---- other ways in


def test_the_command_prints_one_document_and_writes_a_trace(tmp_path: Path) -> None:
    code, trace = "from moeplan.cli import main; main()", tmp_path / "measured.json"
    words = [*COMMAND[:4], "--steps", "2", "--device", "cpu", "--json", "--trace", str(trace)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "moeplan.execution/v1"
    assert len(found["losses"]) == 2
    assert found["step_s"] > 0
    assert json.loads(trace.read_text())["otherData"]["source"] == "measured"


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    given = tiny()
    document = {"scenario": given.document, "plan": plan(given).model_dump(mode="json", by_alias=True)}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    return tmp_path / "plan.json"


def worker_words(plan_file: Path) -> list[str]:
    folder = str(plan_file.parent / "run")
    return ["moeplan.executor.worker", str(plan_file), "--plan", str(plan_file), "--steps", "2", "--device", "cpu",
            "--folder", folder]  # fmt: skip


def in_launch(plan_file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A rank of a launch that is not ours."""
    return subprocess.run(
        [sys.executable, "-m", *worker_words(plan_file)], env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"} | env,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_launch_of_torchrun_is_joined(plan_file: Path) -> None:
    launch_words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launch_words, *worker_words(plan_file)],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["losses"]) == 2
    assert found["sent_bytes"]["dispatch"] > 0


def test_a_launch_of_another_size_is_refused(plan_file: Path) -> None:
    wrong = in_launch(plan_file, RANK="0", WORLD_SIZE="3")
    assert wrong.returncode == 2
    assert "the plan has 2 ranks, but the launch has WORLD_SIZE 3" in wrong.stderr


def test_a_port_in_use_is_named(plan_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = in_launch(plan_file, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2
    assert f"ranks cannot meet at 127.0.0.1:{port}" in done.stderr
    assert "use another port (torchrun --standalone finds a free one)" in done.stderr
