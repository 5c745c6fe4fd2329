"""The README shows what works: its two lines, its commands and its Python."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import moeplan as mp
from moeplan import menu
from moeplan.catalogue import names
from moeplan.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LINES = [line for language, text in BLOCKS if not language for line in text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("moeplan ")]
INLINE = re.findall(r"`(moeplan [a-z][^`]*)`", README)


def words_of(line: str) -> list[str]:
    return shlex.split(line.partition(" > ")[0], comments=True)[1:]


def parsed(words: list[str]) -> dict[str, object]:
    """What a command would be called with; a usage error raises."""
    group = typer.main.get_command(app)
    context = group.make_context("moeplan", list(words), resilient_parsing=True)
    name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    assert command is not None
    found: dict[str, object] = command.make_context(name, rest).params
    return found


def test_the_two_lines_are_at_the_top() -> None:
    first = [line for line in README.splitlines() if line][:4]
    assert re.match(r"python3 -m pip install \. +&& moeplan plan mixtral-8x7b-64xh100( |$)", first[2])
    assert re.match(r"python3 -m pip install -e '\.\[test\]' +&& python3 -m pytest( |$)", first[3])


@pytest.mark.parametrize("name", menu.names("planners"))
def test_every_planner_has_its_row(name: str) -> None:
    assert re.search(rf"^\| `{name}` \|", README, re.MULTILINE)


def test_there_are_commands_to_check() -> None:
    assert {words_of(line)[0] for line in COMMANDS} >= {
        "plan",
        "simulate",
        "what-if",
        "list",
        "show",
        "sources",
        "export",
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses_and_names_what_there_is(line: str) -> None:
    values = parsed(words_of(line))
    if "ranks_per_node" in values:  # the command that is to run on the network
        values = parsed(values["words"])  # type: ignore[arg-type]
    scenario = values.get("scenario") or (values.get("words") or [None])[0]  # type: ignore[index]
    assert scenario in (None, "plan.json", *names("scenarios"))
    assert values.get("cluster") is None or values["cluster"] in names("topologies")


@pytest.mark.parametrize("line", [line for line in INLINE if line.upper() != line and "NAME" not in line])
def test_a_command_in_the_text_is_one_of_ours(line: str) -> None:
    parsed([word for word in words_of(line) if word != "SCENARIO"] + (["x"] if "SCENARIO" in line else []))


def test_the_python_is_python_and_names_what_there_is() -> None:
    (text,) = [text for language, text in BLOCKS if language == "python"]
    used = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mp"
    }
    assert used <= set(mp.__all__)
    assert {"load", "plan", "simulate", "export", "what_if"} <= used


def test_every_file_that_the_readme_says_to_add_has_a_folder_of_its_kind() -> None:
    places = re.findall(r"`([\w/]+)/NAME\.(py|yaml)`", README)
    assert len(places) >= 9
    for folder, suffix in places:
        assert list((ROOT / folder).glob(f"*.{suffix}")), folder
        assert suffix == "yaml" or menu.names(folder.removeprefix("moeplan/")), folder


def test_continuous_integration_finds_both_lines_in_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    starts = re.findall(r"line_that_starts_with [\"'](python3 .*?)[\"']\)", script)
    assert len(starts) == 2
    assert all(sum(line.startswith(start) for line in README.splitlines()) == 1 for start in starts)
