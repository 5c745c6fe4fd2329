"""Bad input of every kind is one line that says where, what was found, what is allowed and a remedy.

`tests/data/bad_input/expectations.yaml` names the words that the message for each file must contain.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from ruamel.yaml import YAML

from moeplan.catalogue import document, find, load, read_plan, scenario_from, show, sources
from moeplan.errors import CatalogueError

CORPUS = Path(__file__).parents[1] / "data" / "bad_input"
EXPECTED: dict[str, dict[str, list[str]]] = YAML(typ="safe", pure=True).load(CORPUS / "expectations.yaml")
CASES = [(area, name) for area, files in EXPECTED.items() for name in files]


def _on(cluster: str, *, model: str = "tiny-moe", **changes: object) -> object:
    return scenario_from(model=model, cluster=cluster, global_batch=8, sequence=128, changes=changes)


READERS: dict[str, Callable[[str], object]] = {
    "files": load,
    "yaml": load,
    "scenarios": load,
    "gpus": lambda path: _on("cpu-host", **{"cluster.gpu": path}),
    "topologies": _on,
    "models": lambda path: _on("cpu-host", model=path),
    "configs": lambda path: _on("cpu-host", model=path),
    "plans": read_plan,
}


@contextmanager
def seconds(limit: int) -> Iterator[None]:
    """Stops what hangs; a guard, not a measurement."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not refused within {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(read: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message with which `read` refuses, which is one printable line."""
    with seconds(10), pytest.raises(CatalogueError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable(), repr(message)
    assert len(message) < 600, message
    return message


@pytest.mark.parametrize(("area", "name"), CASES, ids=[f"{area}/{name}" for area, name in CASES])
def test_each_file_of_the_corpus_is_refused_with_its_place_and_a_remedy(area: str, name: str) -> None:
    message = refusal(READERS[area], str(CORPUS / area / name))
    missing = [word for word in EXPECTED[area][name] if word not in message]
    assert not missing, message


def test_the_corpus_and_its_expectations_name_the_same_files() -> None:
    files = {(path.parent.name, path.name) for path in CORPUS.glob("*/*")}
    assert files == set(CASES)
    assert len(files) >= 110


@pytest.mark.parametrize(("area", "name"), CASES, ids=[f"{area}/{name}" for area, name in CASES])
def test_each_message_begins_with_a_file(area: str, name: str) -> None:
    message = refusal(READERS[area], str(CORPUS / area / name))
    place = message.split(": ", 1)[0]
    assert place.rsplit(":", 1)[0].endswith((".yaml", ".json", ".npz")) or place in ("--set", "--model"), message


@pytest.mark.parametrize("size", [300_000, 5_000_000])
def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path, size: int) -> None:
    (tmp_path / "large.yaml").write_text("about: x\n" + "# filler\n" * (size // 9))
    assert "MB; give a smaller file" in refusal(load, tmp_path / "large.yaml")


def test_a_large_document_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text(json.dumps({"a": "x" * 5_000_000}))
    assert "MB; give a smaller file" in refusal(load, tmp_path / "large.json")
    assert "MB; give a smaller file" in refusal(READERS["configs"], str(tmp_path / "large.json"))


@pytest.mark.parametrize(
    "text",
    [
        "a: [" + "1, " * 60_000 + "]",
        "a: " + "[" * 100_000,
        "[" * 100_000,
        "- " * 50_000,
        "? " * 50_000,
        "{a: " * 50_000,
    ],
)
def test_a_file_that_grows_when_read_is_refused_while_it_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "growing.yaml").write_text(text)
    message = refusal(load, tmp_path / "growing.yaml")
    assert any(word in message for word in ("flatten", "split", "not YAML", "keys are text")), message


@pytest.mark.parametrize("depth", [30, 3_000, 300_000])
def test_deep_json_is_refused_before_it_is_read(tmp_path: Path, depth: int) -> None:
    (tmp_path / "deep.json").write_text('{"a": ' + "[" * depth)
    assert "flatten" in refusal(load, tmp_path / "deep.json")


def test_brackets_inside_text_are_not_depth(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps({"schema": "[" * 100 + '\\"{'}))
    assert "schema" in refusal(load, tmp_path / "text.json")


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "circle.yaml").symlink_to(tmp_path / "circle.yaml")
    assert "not a regular file; give" in refusal(load, tmp_path / "pipe.yaml")
    assert "not a regular file; give" in refusal(load, "/dev/zero")
    assert "a directory; give" in refusal(load, tmp_path / "folder.yaml")
    assert "give the path" in refusal(load, tmp_path / "circle.yaml")
    assert "does not exist; give" in refusal(load, tmp_path / "nothing.yaml")
    assert "does not exist; give" in refusal(load, tmp_path / "folder.yaml" / "inside.yaml")
    assert "give the path" in refusal(load, "x" * 5000 + ".yaml")
    assert "give the path" in refusal(load, "nul\0.yaml")


@pytest.mark.parametrize("name", ["", " ", "\n", "mixtral", "x" * 10**6, "<script>alert(1)", "nul\0", "..", "é"])
@pytest.mark.parametrize("read", [load, document, show, sources, find])
def test_an_unknown_name_is_one_short_line(read: Callable[[str], object], name: str) -> None:
    assert "use one of" in (message := refusal(read, name)) or "did you mean" in message


def test_a_file_that_extends_itself_by_another_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"about: x\nextends: ../{tmp_path.name}/b.yaml\n")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "a.yaml")
    assert "leads back to itself" in refusal(load, tmp_path / "a.yaml")


def test_a_source_without_a_value_is_no_dimension_elsewhere(tmp_path: Path) -> None:
    text = "about: x\nsources: {s: {cite: x}}\nmodel: tiny-moe\ncluster: cpu-host\n"
    (tmp_path / "odd.yaml").write_text(text + "workload: {dimensions: {source: s}}\n")
    assert "workload.dimensions: has no value" in refusal(load, tmp_path / "odd.yaml")


def test_a_hostile_file_name_does_not_break_the_line(tmp_path: Path) -> None:
    odd = tmp_path / "two\nlines\x1b[31m.yaml"
    odd.write_text("about: x\n")
    assert "two\\nlines\\x1b[31m.yaml" in refusal(load, odd)
    odd = tmp_path / "two\nlines.json"
    odd.write_text("{}")
    refusal(READERS["configs"], str(odd))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("cluster.nic.bandwith", "25 GB/s", ["cluster.nic", "nic"]),
        ("cluster.links.loopback.bandwith", "25 GB/s", ["cluster.links.loopback.bandwith", "did you mean 'bandwidth'"]),
        ("cluster.links.loopback.bandwidth", "25", ["cluster.links.loopback.bandwidth", "no unit", "400 Gbit/s"]),
        ("cluster.links.loopback.bandwidth", "25 Gb/s", ["bits or as bytes"]),
        ("cluster.links.loopback.bandwidth", "nan GB/s", ["cluster.links.loopback.bandwidth", "write it as in"]),
        ("cluster.gpu.gemm_efficiency", "0.7", ["cluster.gpu.gemm_efficiency", "80 %"]),
        ("cluster.gpu", "h100-smx", ["cluster.gpu", "unknown GPU", "did you mean 'h100-sxm'"]),
        ("cluster.gpu.name", "x", ["cluster.gpu.name", "cannot be set"]),
        ("cluster", "cpu-hots", ["cluster", "did you mean 'cpu-host'"]),
        ("model", "tiny-mo", ["model", "did you mean 'tiny-moe'"]),
        ("nodes", "two", ["cluster.nodes", "whole number"]),
        ("sequence", "128", ["did you mean 'workload.sequence'"]),
        ("wether", "1", ["not the path of a field", "write section.field"]),
        ("worklod.sequence", "1", ["worklod", "did you mean 'workload'"]),
        ("workload.sequnce", "1", ["workload.sequnce", "did you mean 'sequence'"]),
        ("workload.sequence", "", ["workload.sequence", "found nothing"]),
        ("workload.sequence", "1 # two", ["workload.sequence", "one value"]),
        ("workload.sequence", "1\n2", ["workload.sequence", "one value"]),
        ("workload.sequence", "&a 1", ["workload.sequence", "anchor"]),
        ("workload.sequence", "!!int 1", ["workload.sequence", "tag"]),
        ("workload.sequence", "[1", ["workload.sequence", "not YAML"]),
        ("workload.sequence.", "1", ["cannot be set"]),
        ("", "1", ["cannot be set"]),
        ("schema", "1", ["cannot be set"]),
        ("choose.tp", "1,3", ["choose.tp.1", "does not divide"]),
        ("choose.tp", "[]", ["choose.tp", "empty list"]),
        ("routing.skew", "-1", ["routing.skew", "from 0 to 100"]),
        ("routing.router", "zpf", ["routing.router", "did you mean 'zipf'"]),
        ("routing", "zipf", ["routing"]),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_at_its_path(path: str, value: str, words: list[str]) -> None:
    message = refusal(load, "tiny-moe-2-ranks", changes={path: value})
    assert message.startswith("--set"), message
    assert not [word for word in words if word not in message], message


def test_two_changes_of_one_field_are_refused() -> None:
    both = {"nodes": "1", "cluster.nodes": "1"}
    assert "set it once" in refusal(load, "tiny-moe-2-ranks", changes=both)
    inside = {"cluster.gpu": "h100-sxm", "cluster.gpu.memory": "80 GB"}
    assert "set one of the two" in refusal(load, "tiny-moe-2-ranks", changes=inside)


def test_a_message_about_several_fields_has_at_most_three_lines(tmp_path: Path) -> None:
    text = "about: x\nmodel: tiny-moe\ncluster: cpu-host\nworkload: {a: 1, b: 2, c: 3, d: 4, e: 5}\n"
    (tmp_path / "many.yaml").write_text(text)
    with pytest.raises(CatalogueError) as caught:
        load(tmp_path / "many.yaml")
    lines = str(caught.value).split("\n")
    assert len(lines) == 3
    assert all("many.yaml:4: workload." in line for line in lines)
