"""Every model file: it loads, says where its numbers come from, and counts what was published."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moeplan.domain.model import from_mapping
from moeplan.importers.hf_config import read

FILES = sorted((Path(__file__).parents[2] / "scenarios" / "models").glob("*.yaml"))
CONFIGS = Path(__file__).parents[1] / "data" / "hf_configs"
NAMES = {path.stem for path in FILES}


def load(path: Path) -> dict[str, Any]:
    found = YAML(typ="safe", pure=True).load(path)
    assert isinstance(found, dict)
    return found


def last_place(path: Path, field: str) -> float:
    """The value of the last digit that the file prints of a published figure."""
    text = re.search(rf"{field}: {{value: ([\d.e]+),", path.read_text(encoding="utf-8"))
    assert text is not None, f"{path.name}: {field} is not a plain number"
    exponent = Decimal(text.group(1)).as_tuple().exponent
    assert isinstance(exponent, int)
    return float(10.0**exponent)


def test_there_are_models_enough_and_their_names_are_plain() -> None:
    assert len(FILES) >= 60
    assert all(re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", name) for name in NAMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_gives_a_model(path: Path) -> None:
    model = from_mapping(load(path), path.name)
    assert 0 < model.active_parameters <= model.total_parameters
    assert (model.routed_parameters > 0) == any(layer.is_moe for layer in model.all_layers)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_source_is_listed_and_used(path: Path) -> None:
    data = load(path)
    assert next(iter(data)) == "about"
    used = {data["dimensions"]["source"]} | {figure["source"] for figure in data.get("published", {}).values()}
    assert data["dimensions"]["source"] in data["sources"]
    assert used <= set(data["sources"])
    assert all(set(source) == {"cite"} for source in data["sources"].values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_published_count_is_ours_or_the_file_says_why_not(path: Path) -> None:
    data = load(path)
    model = from_mapping(data, path.name)
    for field, figure in data.get("published", {}).items():
        ours, value = getattr(model, field), float(figure["value"])
        agrees = abs(ours - value) <= max(0.01 * value, last_place(path, field) / 2)
        differs = figure.get("note", "").startswith("differs: ")
        assert agrees != differs, f"{path.name}: {field}: ours {ours}, published {value:g}, note {figure.get('note')!r}"


def test_models_that_papers_and_people_ask_for_are_there() -> None:
    wanted = """switch-base-128 switch-large-128 switch-xxl switch-c gshard-600b glam-64b-64e st-moe-32b
        mixtral-8x7b mixtral-8x22b
        deepseekmoe-16b deepseekmoe-145b deepseek-v2 deepseek-v2-lite deepseek-v3 llama-moe-3.5b openmoe-8b
        openmoe-34b openmoe-base fairseq-moe-15b fairseq-moe-52b fairseq-moe-207b fairseq-moe-1.1t v-moe-h v-moe-l
        v-moe-15b cpm-2-moe m6-t-1t nllb-54b nlg-350m-moe-128 nlg-1.3b-moe-128 pr-moe-350m pr-moe-1.3b
        deepspeed-2.4b-moe-128 deepspeed-8b-moe-128 deepspeed-24b-moe-128 deepspeed-47b-moe-128 alpa-moe-10b
        alpa-moe-27b alpa-moe-70b megablocks-xs megablocks-s megablocks-m fastermoe-gpt fastermoe-bert-deep
        fastermoe-bert-wide smartmoe-inky qwen3-30b-a3b qwen3-235b-a22b qwen3.5-35b-a3b gpt-oss-20b gpt-oss-120b
        kimi-k2 glm-4.5 glm-5 llama-4-scout llama-4-maverick minimax-m2 olmoe-1b-7b nemotron-3-super deepseek-v4-flash
        gemma-4-26b-a4b
        gpt-3-175b megatron-530b llama-3-70b tiny-moe tiny-dense"""
    assert set(wanted.split()) == NAMES


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-*.json")), ids=lambda path: path.stem)
def test_a_model_file_and_the_checkpoints_config_give_the_same_model(path: Path) -> None:
    name = {"minimax-m2.5": "minimax-m2"}.get(path.stem, path.stem)
    if name in NAMES:
        file = FILES[0].parent / f"{name}.yaml"
        assert from_mapping(load(file), file.name) == read(path).model
