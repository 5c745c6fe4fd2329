"""The importer of Hugging Face configs: exact totals, every alias, and a sentence for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.domain.model import Experts, Model
from moeplan.errors import CatalogueError
from moeplan.importers.hf_config import read

DATA = Path(__file__).parents[1] / "data" / "hf_configs"
# parameters of the module that transformers 5.23 builds on the meta device: all, and those of routed experts
TOTALS = {
    "mixtral-8x7b": (46_702_792_704, 45_097_156_608),
    "mixtral-8x22b": (140_620_634_112, 135_291_469_824),
    "qwen3-30b-a3b": (30_532_122_624, 28_991_029_248),
    "qwen3-235b-a22b": (235_093_634_560, 227_096_395_776),
    "deepseek-v3": (671_026_404_352, 653_908_770_816),
    "kimi-k2": (1_026_408_209_408, 1_014_686_023_680),
    "gpt-oss-20b": (20_914_757_184, 19_116_933_120),
    "gpt-oss-120b": (116_829_156_672, 114_701_598_720),
    "minimax-m2.5": (228_689_748_992, 224_680_476_672),
    "glm-5": (743_911_199_232, 724_775_731_200),
    "llama-4-maverick": (400_711_848_960, 386_547_056_640),
    "llama-4-scout": (107_769_861_120, 96_636_764_160),
    "nemotron-3-super": (120_668_687_360, 112_742_891_520),
    "deepseek-v4-flash": (284_332_230_231, 277_025_390_592),
    "qwen3.5-35b-a3b": (34_660_610_688, 32_212_254_720),
    "gemma-4-26b-a4b": (25_233_141_760, 22_837_989_120),
}
FAMILIES: dict[str, Any] = json.loads((DATA / "families.json").read_text(encoding="utf-8"))
TOY: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
    "intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip


def toy(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (TOY | changes).items() if value != "absent"}


def first_experts(model: Model) -> Experts:
    found = model.layers[model.moe_layers[0]].experts
    assert found is not None
    return found


@pytest.mark.parametrize("name", TOTALS)
def test_the_sixteen_totals_are_exact(name: str) -> None:
    imported = read(DATA / f"{name}.json")
    assert (imported.model.total_parameters, imported.model.routed_parameters) == TOTALS[name]
    assert imported.assumptions == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_the_parameters_that_transformers_builds(family: str) -> None:
    fact = FAMILIES[family]
    model = read(fact["config"]).model
    assert model.total_parameters == fact["total"] + fact.get("difference", 0)
    if "difference" not in fact:
        assert model.routed_parameters == fact["routed"]


def test_a_folder_is_read_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TOY), encoding="utf-8")
    assert read(tmp_path) == read(TOY)


def test_a_dense_model_has_no_experts() -> None:
    assert read(DATA / "qwen3-8b.json").model.moe_layers == ()
    assert read(DATA / "llama-3.1-70b.json").model.total_parameters == 70_553_706_496


@pytest.mark.parametrize("name", ["num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_experts_are_found_under_every_name(name: str) -> None:
    assert read(toy(num_experts="absent", **{name: 8})).model == read(TOY).model


@pytest.mark.parametrize("name", ["moe_top_k", "moe_k", "moe_topk", "top_k_experts"])
def test_top_k_is_found_under_every_name(name: str) -> None:
    assert read(toy(num_experts_per_tok="absent", **{name: 2})).model == read(TOY).model


@pytest.mark.parametrize(
    ("changes", "routed"),
    [
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
        ({"first_k_dense_replace": 3}, (3,)),
        ({"moe_layer_freq": [0, 1, 1, 0]}, (1, 2)),
        ({"moe_layer_freq": 2}, (0, 2)),
        ({"mlp_layer_types": ["dense", "sparse", "moe", "hash_moe"]}, (1, 2, 3)),
        ({"interleave_moe_layer_step": 2}, (1, 3)),
        ({"moe_layers": [2]}, (2,)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1}, (1, 2)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, (1, 2, 3)),
        ({"num_dense_layers": 2}, (2, 3)),
    ],
)
def test_routed_layers_are_found_in_every_spelling(changes: dict[str, Any], routed: tuple[int, ...]) -> None:
    assert read(toy(**changes)).model.moe_layers == routed


def test_an_unknown_family_is_read_by_aliases_and_says_so() -> None:
    imported = read(toy(model_type="brand_new"))
    assert imported.model.moe_layers == (0, 1, 2, 3)
    assert any("'brand_new'" in sentence for sentence in imported.assumptions)
    assert any("tie_word_embeddings" in sentence for sentence in imported.assumptions)


@pytest.mark.parametrize(
    "missing",
    ["num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "vocab_size"],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "brand_new"])
def test_what_cannot_be_guessed_is_refused(missing: str, family: str) -> None:
    with pytest.raises(CatalogueError, match="missing"):
        read(toy(model_type=family, **{missing: "absent"}))


def test_null_is_absent_where_families_write_it() -> None:
    assert read(toy(head_dim=None, n_shared_experts=None)).model == read(TOY).model


def test_heads_of_their_own_width_are_taken() -> None:
    mixer = read(toy(head_dim=48)).model.layers[0].mixer
    assert mixer is not None
    assert mixer.kind == "attention"
    assert mixer.head_dim == 48


def test_llama_4_has_a_shared_expert_that_no_key_names() -> None:
    shared = first_experts(read(DATA / "llama-4-scout.json").model).shared
    assert shared is not None
    assert shared.width == 8192


def test_mtp_modules_are_counted_apart() -> None:
    model = read(DATA / "deepseek-v3.json").model
    assert model.mtp_parameters == model.layers[-1].parameters + 2 * 7168**2 + 3 * 7168
    assert model.total_parameters == TOTALS["deepseek-v3"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 0}, "num_experts: found 0"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: found 0"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: found 9; allowed: 1 to 8"),
        ({"num_experts": True}, "num_experts: found true"),
        ({"hidden_size": 64.0}, "hidden_size: found 64.0"),
        ({"hidden_size": "64"}, "hidden_size: found '64'"),
        ({"num_hidden_layers": -4}, "num_hidden_layers: found -4"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3; allowed: a divisor"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "num_attention_heads: found 5; allowed: a divisor of hidden_size",
        ),
        ({"n_group": 3}, "n_group: found 3; allowed: a divisor"),
        ({"n_group": 2, "topk_group": 3}, "topk_group: found 3"),
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq: .*4 entries"),
        ({"mlp_layer_types": ["dense"] * 5}, "mlp_layer_types: .*4 entries"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types: .*4 entries"),
        ({"layer_types": ["telepathy"] * 4}, "layer_types: found 'telepathy'"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"attention_bias": 1}, "attention_bias: found 1; allowed: true or false"),
        ({"text_config": [1]}, "text_config: found"),
        ({"model_type": 7}, "model_type: found 7"),
        ({"model_type": "jetmoe"}, "mixture of attention heads"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input: found 256"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_found_and_what_is_allowed(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CatalogueError, match=words) as caught:
        read(toy(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "a config is an object"),
        (b'{"a": 1', "line 1: not JSON"),
        (b'{"hidden_size": NaN}', "hidden_size: found NaN"),
        (b'{"hidden_size": -Infinity}', "hidden_size: found -Infinity"),
        (b'{"rope_theta": 1e999}', "rope_theta: found 1e999"),
        (b'{"x": [1, Infinity]}', "x: found Infinity"),
        (b'{"a": 1, "a": 2}', "a: found twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 32"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "byte order mark"),
        ('{"a": 1}'.encode("utf-16-le"), "zero bytes"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "found 999999999999..."),
        (b'{"a": "' + b" " * 16 * 1024 * 1024 + b'"}', "allowed are 16777216"),
    ],
)
def test_a_file_that_is_not_plain_json_is_refused_with_its_name(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CatalogueError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="cannot be read"):
        read(tmp_path / "config.json")


def test_the_infinite_step_that_transformers_writes_is_no_error() -> None:
    assert "Infinity" in (DATA / "nemotron-3-super.json").read_text(encoding="utf-8")
    assert read(DATA / "nemotron-3-super.json").assumptions == ()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_any_value_in_any_field_gives_a_model_or_a_sentence(family: str, data: st.DataObject) -> None:
    config = dict(FAMILIES[family]["config"])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(_VALUES)
    said = "nothing"
    try:
        assert read(config).model.total_parameters > 0
    except CatalogueError as error:
        said = str(error)
    assert "\n" not in said


@given(st.binary(max_size=200))
def test_any_bytes_give_a_sentence(data: bytes) -> None:
    from moeplan.importers._json import parse_object

    said = "x: nothing"
    try:
        assert isinstance(parse_object(data, "x"), dict)
    except CatalogueError as error:
        said = str(error)
    assert said.startswith("x: ")
